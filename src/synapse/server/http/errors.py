"""How an error looks over HTTP: OpenAI's shape on its routes, RFC 9457 problem+json on the command routes.

Sources: https://platform.openai.com/docs/guides/error-codes and https://www.rfc-editor.org/rfc/rfc9457.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.responses import JSONResponse, Response

from synapse import errors


class BadField(errors.InvalidInput):
    """A field of the request body has a value that cannot be used; `details["param"]` names it."""

    code = "invalid_value"


class UnsupportedField(errors.InvalidInput):
    """A field of OpenAI's API that changes the meaning of a request and that this server cannot honour."""

    code = "unsupported_parameter"


class UnknownModel(errors.NotFound):
    """Neither a persona nor a pulled model has this name."""

    code = "model_not_found"


class BadKey(errors.Unauthorized):
    """No API key, or one that is unknown or revoked."""

    code = "invalid_api_key"


class NotLocal(errors.Forbidden):
    """Without API keys only this machine may ask, and not a web page of another site that it shows."""

    code = "not_local"


class WrongMediaType(errors.InvalidInput):
    """A body that is not plain JSON."""

    code = "unsupported_media_type"


class WrongMethod(errors.InvalidInput):
    """The path exists, but not for this HTTP method."""

    code = "method_not_allowed"


class SlowBody(errors.TimedOut):
    """The client took too long to send the body of its request."""

    code = "request_timeout"


class ClientGone(errors.SynapseError):
    """The client hung up; nobody is there to read an answer."""

    code = "client_closed_request"


@dataclass(frozen=True, slots=True)
class Kind:
    """How one kind of error is shown: HTTP status, RFC 9457 title, OpenAI's `type`."""

    status: int
    title: str
    openai_type: str = "invalid_request_error"


KINDS: Mapping[type[errors.SynapseError], Kind] = {
    errors.InvalidInput: Kind(400, "Invalid request"),
    WrongMethod: Kind(405, "Method not allowed"),
    WrongMediaType: Kind(415, "Unsupported media type"),
    errors.Unauthorized: Kind(401, "Not authenticated"),
    errors.Forbidden: Kind(403, "Not allowed"),
    errors.NotFound: Kind(404, "Not found"),
    errors.Conflict: Kind(409, "Conflict"),
    errors.TooLarge: Kind(413, "Too large"),
    errors.Corrupt: Kind(422, "Corrupt data"),
    errors.Overloaded: Kind(429, "Overloaded", "rate_limit_error"),
    SlowBody: Kind(408, "Request timed out"),
    errors.TimedOut: Kind(504, "Timed out", "timeout_error"),
    errors.Unavailable: Kind(503, "Unavailable", "server_error"),
    ClientGone: Kind(499, "Client closed the request"),
    errors.SynapseError: Kind(500, "Internal error", "server_error"),
}

RETRY_AFTER = {429: "1", 503: "5"}
"""Seconds a client should wait. A queue of short answers moves on within a second."""


def kind_of(error: errors.SynapseError) -> Kind:
    """The most specific kind that the error belongs to."""
    return next(KINDS[parent] for parent in type(error).__mro__ if parent in KINDS)


def openai_body(error: errors.SynapseError) -> dict[str, Any]:
    """OpenAI's error object. The hint follows the message, because OpenAI's shape has no place of its own for it."""
    message = f"{error.message} (hint: {error.hint})" if error.hint else error.message
    body = {
        "message": message,
        "type": kind_of(error).openai_type,
        "param": error.details.get("param"),
        "code": error.code,
    }
    return {"error": body}


def problem_body(error: errors.SynapseError, instance: str) -> dict[str, Any]:
    """RFC 9457 problem details; `code`, `hint` and `details` are extension members."""
    kind = kind_of(error)
    body: dict[str, Any] = {
        "type": f"urn:synapse:error:{error.code}",
        "title": kind.title,
        "status": kind.status,
        "detail": error.message,
        "instance": instance,
        "code": error.code,
    }
    if error.hint:
        body["hint"] = error.hint
    if error.details:
        body["details"] = error.details
    return body


def is_command_path(path: str) -> bool:
    """Whether errors of this path are problem+json."""
    return path == "/v1/commands" or path.startswith("/v1/commands/")


def error_response(error: errors.SynapseError, path: str) -> Response:
    """The response for an error on a path, in the shape that this path speaks."""
    status = kind_of(error).status
    headers = {}
    if status in RETRY_AFTER:
        headers["Retry-After"] = RETRY_AFTER[status]
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if is_command_path(path):
        problem = problem_body(error, path)
        return JSONResponse(problem, status, headers, media_type="application/problem+json")
    return JSONResponse(openai_body(error), status, headers)


def from_validation(found: Sequence[Any], body: object) -> errors.SynapseError:
    """Pydantic's errors about a request body as one readable error that names the first wrong field.

    Args:
        found: as `ValidationError.errors()` or FastAPI's `RequestValidationError.errors()` give them.
        body: the parsed body, to tell the names of fields from pydantic's names for the branches of a union.
    """
    broken = [error for error in found if error["type"] == "json_invalid"]
    if any("recursion" in f"{error.get('msg')} {error.get('ctx')}".lower() for error in broken):
        return too_deep()
    if broken:
        return errors.InvalidInput("the body is not JSON", hint="send one JSON object, encoded as UTF-8")
    named = [(field_path(error, body), error) for error in found]
    first = named[0][0]
    # Of the branches of a union, the one that got furthest is the one that was meant.
    param = max((path for path, _ in named if path.startswith(first)), key=len)
    here = [error for path, error in named if path == param]
    if here[0]["type"] == "extra_forbidden":
        return UnsupportedField(f"there is no field {param}", hint="leave it out", param=param)
    reasons = " or ".join(dict.fromkeys(str(error["msg"]) for error in here))
    if not param:
        return errors.InvalidInput(f"the body does not fit: {reasons}", hint="send one JSON object")
    if here[0]["type"] == "missing":
        return BadField(f"the field {param} is missing", param=param)
    return BadField(f"the field {param} does not fit: {reasons}", param=param)


def too_deep() -> errors.InvalidInput:
    """A body whose lists and objects lie in one another deeper than they can be read."""
    return errors.InvalidInput(
        "the JSON of the body is nested too deeply", hint="use fewer lists and objects within others"
    )


def field_path(error: Mapping[str, Any], body: object) -> str:
    """Where in the body a pydantic error is, as ``messages[0].content``."""
    path = ""
    at = body
    parts = [part for part in error["loc"] if part != "body"]
    for index, part in enumerate(parts):
        if isinstance(part, int) and isinstance(at, list) and part < len(at):
            path += f"[{part}]"
            at = at[part]
        elif isinstance(at, dict) and (part in at or (index == len(parts) - 1 and error["type"] == "missing")):
            path += f".{part}" if path else str(part)
            at = at.get(part)
    return path
