"""What is published about workers."""

from __future__ import annotations

from synapse.callosum.payloads import Payload, event


@event("worker.ready")
class WorkerReady(Payload):
    """A worker can answer; `process` is its process id."""

    model: str
    worker: int
    process: int


@event("worker.ended")
class WorkerEnded(Payload):
    """A worker has ended, for this reason; so many `answers` go on in another."""

    model: str
    worker: int
    reason: str
    answers: int
