"""What is published about models."""

from __future__ import annotations

from synapse.callosum.payloads import Payload, event


@event("model.pulled")
class ModelPulled(Payload):
    """A model is here that was not before. `source` is where it came from, `seconds` how long that took."""

    name: str
    kind: str
    source: str
    size_bytes: int
    seconds: float


@event("model.removed")
class ModelRemoved(Payload):
    """A model's files were deleted."""

    name: str
    freed_bytes: int
