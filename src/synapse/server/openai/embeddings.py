"""`POST /v1/embeddings`, in the form of OpenAI's: vectors of texts.

Source: https://platform.openai.com/docs/api-reference/embeddings/create.
"""

from __future__ import annotations

import asyncio
import base64
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field

from synapse.encoders import Embeddings, open_encoders
from synapse.errors import TimedOut
from synapse.server.catalogue import list_encoders
from synapse.server.http.errors import BadField, UnknownModel
from synapse.server.http.routing import ServerState, guarded
from synapse.server.openai.generation import unless_gone

MAX_TEXTS = 2048
"""Texts of one request, as OpenAI's."""

router = APIRouter(route_class=guarded("chat"), tags=["openai"])


class EmbeddingsBody(BaseModel):
    """What OpenAI's clients send. Token ids instead of texts are refused: they are those of another tokenizer."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str = Field(description="name of an encoder that is pulled", min_length=1, max_length=256)
    input: str | Annotated[list[str], Field(fail_fast=True, min_length=1, max_length=MAX_TEXTS)] = Field(
        description=f"a text, or up to {MAX_TEXTS}"
    )
    encoding_format: Literal["float", "base64"] | None = Field(
        None, description="numbers (the default), or the bytes of little-endian float32 in base64"
    )
    dimensions: int | None = Field(None, ge=1, description="as many as the encoder has; no other number is possible")
    user: Any = Field(None, description="accepted and ignored")

    @property
    def texts(self) -> list[str]:
        return [self.input] if isinstance(self.input, str) else self.input


@router.post("/v1/embeddings")
async def create_embeddings(request: Request, body: EmbeddingsBody) -> dict[str, Any]:
    """Make vectors of texts. What of a text is longer than the encoder reads is ignored."""
    state: ServerState = request.app.state.server
    with state.slots.take(1):
        made = await unless_gone(request, _encode(state, body))
    rows = zip(range(len(body.texts)), _written(made, body.encoding_format or "float"), strict=True)
    tokens = sum(made.tokens)
    return {
        "object": "list",
        "data": [{"object": "embedding", "index": index, "embedding": vector} for index, vector in rows],
        "model": body.model,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }


async def _encode(state: ServerState, body: EmbeddingsBody) -> Embeddings:
    """The vectors, within the time that a request may take.

    Raises:
        UnknownModel: there is no such encoder.
        BadField: another number of dimensions is asked for than it has.
        TimedOut: it took too long.
    """
    if body.model not in await list_encoders(state.context):
        raise UnknownModel(f"there is no encoder {body.model[:200]!r}", hint="GET /v1/models lists them", param="model")
    seconds = state.context.settings.request_timeout
    try:
        async with (
            asyncio.timeout(seconds),
            (await state.context.get(open_encoders)).use(body.model) as runner,
        ):
            if body.dimensions not in (None, runner.encoder.dimensions):
                raise BadField(f"{body.model} makes vectors of {runner.encoder.dimensions} numbers", param="dimensions")
            return await runner.encode(body.texts)
    except TimeoutError as error:
        raise TimedOut(
            f"the texts were not encoded after {seconds:g} seconds",
            hint="send fewer at once, or raise SYNAPSE_REQUEST_TIMEOUT",
        ) from error


def _written(made: Embeddings, encoding: str) -> list[Any]:
    if encoding == "float":
        numbers: list[Any] = made.vectors.tolist()
        return numbers
    return [base64.b64encode(vector.tobytes()).decode() for vector in made.vectors.astype("<f4")]
