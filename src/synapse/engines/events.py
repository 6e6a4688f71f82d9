"""What is published about engines and the layers in their memory. Nothing is published for each token or step."""

from __future__ import annotations

from typing import Literal

from synapse.callosum.payloads import Payload, event


@event("engine.opened")
class EngineOpened(Payload):
    """A model is ready to answer; opening it took so many `seconds`."""

    model: str
    seconds: float


@event("engine.closed")
class EngineClosed(Payload):
    """A model was taken out of memory: nobody had asked for it for a while (`idle`), another needed its room
    (`memory`), or the process ends (`stopped`)."""

    model: str
    reason: Literal["idle", "memory", "stopped"]


@event("engine.failed")
class EngineFailed(Payload):
    """A step of an engine failed, and with it so many answers that were being generated."""

    error: str
    answers: int


@event("layer.loaded")
@event("layer.evicted")
class LayerInMemory(Payload):
    """A LoRA layer came into the memory of an engine, or gave way to others. `layer` is the sha256 of its content."""

    layer: str
    model: str
    bytes: int
