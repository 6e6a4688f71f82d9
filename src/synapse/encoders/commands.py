"""The commands of the group `embedding`."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, Field

from synapse.commands import Argument, Context, LocalPath, command, looks_like_path
from synapse.encoders.host import open_encoders

MAX_TEXTS = 2048
MODEL = "an encoder of `synapse model list`; by default the setting default_encoder"

Texts = Annotated[list[str], Field(min_length=1, max_length=MAX_TEXTS)]


class CreateEmbeddings(BaseModel):
    """Which texts."""

    texts: Annotated[Texts, Argument()] = Field(description="one text or several")
    model: Annotated[str | None, LocalPath(looks_like_path)] = Field(None, description=MODEL)


class CompareTexts(BaseModel):
    """Which texts to hold against which."""

    text: Annotated[str, Argument()] = Field(description="the text that the others are compared with")
    others: Annotated[Texts, Argument()] = Field(description="one text or several")
    model: Annotated[str | None, LocalPath(looks_like_path)] = Field(None, description=MODEL)


class Embedding(BaseModel):
    """The vector of one text."""

    text: str
    tokens: int = Field(description="how many were read")
    truncated: bool = Field(description="whether the rest of the text was ignored, because it is too long")
    vector: list[float] = Field(description="of length 1")


class EmbeddingList(BaseModel):
    """Vectors, in the order of the texts."""

    model: str
    dimensions: int
    items: list[Embedding]


class Likeness(BaseModel):
    """How near one text is to the one that all are compared with."""

    cosine: float = Field(description="of the two vectors: 1 is the same meaning, about 0 is nothing in common")
    text: str


class LikenessList(BaseModel):
    """The texts, nearest first."""

    items: list[Likeness]


@command("embedding/create", permission="read")
async def create_embeddings(params: CreateEmbeddings, context: Context) -> EmbeddingList:
    """Make vectors of texts."""
    async with (await context.get(open_encoders)).use(params.model) as runner:
        made = await runner.encode(params.texts)
        name, dimensions = runner.encoder.name, runner.encoder.dimensions
    rows = zip(params.texts, made.tokens, made.truncated, made.vectors.tolist(), strict=True)
    items = [Embedding(text=t, tokens=n, truncated=cut, vector=vector) for t, n, cut, vector in rows]
    return EmbeddingList(model=name, dimensions=dimensions, items=items)


@command("embedding/compare", permission="read")
async def compare_texts(params: CompareTexts, context: Context) -> LikenessList:
    """Say which texts are nearest in meaning to a text."""
    async with (await context.get(open_encoders)).use(params.model) as runner:
        vectors = (await runner.encode([params.text, *params.others])).vectors
    pairs = zip((vectors[1:] @ vectors[0]).tolist(), params.others, strict=True)
    found = sorted(pairs, key=lambda pair: -pair[0])
    return LikenessList(items=[Likeness(cosine=cosine, text=text) for cosine, text in found])
