"""One small tree of errors. Every surface (terminal, HTTP, tests) translates it; no surface invents its own.

An error says what was expected, what was found and what to do: the first two are the message, the last is the hint.
The direct children of `SynapseError` are the *kinds* a surface knows how to show (an HTTP status, an exit code);
rooms subclass a kind to give an error its own `code`.
"""

from __future__ import annotations

from typing import Any, ClassVar


class SynapseError(Exception):
    """Something a person can read and act on.

    Attributes:
        code: stable and machine readable, for example ``model_not_found``.
        message: what was expected and what was found, in one or two plain sentences.
        hint: what to do about it, or None when the message already says so.
        details: facts for a program, each of them JSON serialisable.
    """

    code: ClassVar[str] = "error"

    def __init__(self, message: str, *, hint: str | None = None, **details: Any) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.details = details

    def __reduce__(self) -> tuple[Any, ...]:
        """It reaches another process as it is, whatever its class wants to know when it is made; its cause stays."""
        return _remade, (type(self), self.args), self.__dict__


def _remade(kind: type[SynapseError], args: tuple[Any, ...]) -> SynapseError:
    return kind.__new__(kind, *args)


class InvalidInput(SynapseError):
    """The request itself is wrong; sending it again unchanged cannot work."""

    code = "invalid_input"


class Unauthorized(SynapseError):
    """Nobody is known to be asking: the key is missing or wrong."""

    code = "unauthorized"


class Forbidden(SynapseError):
    """Somebody known is asking for what they may not do."""

    code = "forbidden"


class NotFound(SynapseError):
    """The thing named does not exist."""

    code = "not_found"


class Conflict(SynapseError):
    """The thing exists already, is in use, or has changed since it was read."""

    code = "conflict"


class TooLarge(SynapseError):
    """More bytes than the limit allows."""

    code = "too_large"


class Overloaded(SynapseError):
    """The queue is full; the same request can work a little later."""

    code = "overloaded"


class TimedOut(SynapseError):
    """The time limit passed before the work was done."""

    code = "timed_out"


class Unavailable(SynapseError):
    """Something outside is missing: the network, a database, an optional package."""

    code = "unavailable"


class Corrupt(SynapseError):
    """Bytes on disk or from outside are not what they claim to be; nothing of them was used."""

    code = "corrupt"


class InternalError(SynapseError):
    """A defect of Synapse itself."""

    code = "internal_error"
