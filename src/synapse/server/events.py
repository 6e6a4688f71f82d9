"""What is published about the server."""

from __future__ import annotations

from synapse.callosum.payloads import Payload, event


@event("server.started")
class ServerStarted(Payload):
    """A server begins to answer."""

    version: str
    process: int


@event("server.stopped")
class ServerStopped(Payload):
    """A server has answered what was asked of it and ends, after so many `seconds`."""

    process: int
    seconds: float


@event("server.request.finished")
class RequestFinished(Payload):
    """A request was answered, or its client hung up (499). The path is as the client sent it, without its query."""

    method: str
    path: str
    status: int
    seconds: float
    request_id: str


@event("key.created")
@event("key.revoked")
@event("key.removed")
class KeyNews(Payload):
    """An API key was made, made useless, or deleted."""

    name: str
    permissions: tuple[str, ...]
