"""Encoders by the name of their model, for asyncio: opened on first use, closed when not in use, a batch at a time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import cast

import numpy as np
from numpy.typing import NDArray

from synapse.commands import Context
from synapse.config import Settings
from synapse.encoders.encoder import Encoder, batches, encoder_of
from synapse.encoders.linear import Precision
from synapse.engines.limits import Backend
from synapse.engines.residency import MakeRoom, Reason, Residency, open_residency
from synapse.models.encoder.file import open_encoder_file
from synapse.models.library import ModelLibrary, open_library


@dataclass(frozen=True, slots=True)
class Embeddings:
    """Vectors of texts.

    Attributes:
        vectors: float32[texts, dimensions], each of length 1.
        tokens: how many tokens of each text were read.
        truncated: whether some of it was ignored, because it was too long.
    """

    vectors: NDArray[np.float32]
    tokens: tuple[int, ...]
    truncated: tuple[bool, ...]


class EncoderRunner:
    """An encoder that several tasks share. Their batches take turns, so that a long list keeps nobody waiting long."""

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder
        self._turn = asyncio.Lock()

    async def encode(self, texts: Sequence[str]) -> Embeddings:
        """As `Encoder.encode`, in a thread. When the task is cancelled, the work ends with the current batch."""
        tokens = await asyncio.to_thread(self.encoder.tokenize, texts)
        vectors = np.empty((len(tokens), self.encoder.dimensions), np.float32)
        for chosen in batches([len(text.ids) for text in tokens]):
            async with self._turn:
                vectors[chosen] = await asyncio.to_thread(self.encoder.embed, [tokens[i] for i in chosen])
        return Embeddings(vectors, tuple(len(text.ids) for text in tokens), tuple(text.truncated for text in tokens))

    async def close(self, reason: Reason) -> None:
        """It has nothing but memory, which goes with the last who refers to it."""


class EncoderHost:
    """The encoders of this process."""

    def __init__(self, library: ModelLibrary, settings: Settings, residency: Residency) -> None:
        """No encoder is open yet; the residency closes those that nobody uses."""
        self._library = library
        self._settings = settings
        self._residency = residency

    @asynccontextmanager
    async def use(self, model: str | None = None) -> AsyncIterator[EncoderRunner]:
        """The encoder of a model, opened if it is not yet (in a thread); the default one when no model is named.

        It stays open inside. Only names are looked up, never paths: what comes over HTTP must not choose files.

        Raises:
            NoMemory: it does not fit beside the models that are in use.
            as `open_encoder`.
        """
        found = await asyncio.to_thread(self._library.show_encoder, model or self._settings.default_encoder)
        lease = await self._residency.lease(found.folder, found.name, partial(self._open, found.folder))
        try:
            yield lease.model
        finally:
            lease.release()

    async def _open(self, folder: Path, make_room: MakeRoom) -> EncoderRunner:
        precision = cast(Precision, self._settings.encoder_precision)
        # The kernel has no maps in float32, so there is nothing that `native` could insist on.
        backend = cast(Backend, self._settings.backend) if precision == "int8" else "reference"
        file = await asyncio.to_thread(open_encoder_file, folder)
        await make_room(file.weight_bytes)
        threads = self._settings.threads
        return EncoderRunner(await asyncio.to_thread(encoder_of, file, backend, precision=precision, threads=threads))


@asynccontextmanager
async def open_encoders(context: Context) -> AsyncIterator[EncoderHost]:
    """Opener of the process' encoders, for `Context.get`."""
    yield EncoderHost(await context.get(open_library), context.settings, await context.get(open_residency))
