"""Encoders by the name of their model, for asyncio: opened on first use, each computing one batch at a time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
from numpy.typing import NDArray

from synapse.commands import Context
from synapse.commands.openings import Openings
from synapse.config import Settings
from synapse.encoders.encoder import Encoder, batches, open_encoder_folder
from synapse.encoders.linear import Precision
from synapse.engines.limits import Backend
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


class EncoderHost:
    """The encoders of this process."""

    def __init__(self, library: ModelLibrary, settings: Settings) -> None:
        self._library = library
        self._settings = settings
        self._openings: Openings[Path, EncoderRunner] = Openings()

    async def get(self, model: str | None = None) -> EncoderRunner:
        """The encoder of a model, opened if it is not yet (in a thread); the default one when no model is named.

        Only names are looked up, never paths: what comes over HTTP must not choose files.

        Raises:
            as `open_encoder`.
        """
        found = await asyncio.to_thread(self._library.show_encoder, model or self._settings.default_encoder)
        return await self._openings.get(found.folder, lambda: self._open(found.folder))

    async def _open(self, folder: Path) -> EncoderRunner:
        precision = cast(Precision, self._settings.encoder_precision)
        # The kernel has no maps in float32, so there is nothing that `native` could insist on.
        backend = cast(Backend, self._settings.backend) if precision == "int8" else "reference"
        threads = self._settings.threads
        return EncoderRunner(
            await asyncio.to_thread(open_encoder_folder, folder, backend, precision=precision, threads=threads)
        )

    async def close(self) -> None:
        """Forget all encoders; one that is being opened is given up."""
        await self._openings.close()


@asynccontextmanager
async def open_encoders(context: Context) -> AsyncIterator[EncoderHost]:
    """Opener of the process' encoders, for `Context.get`."""
    host = EncoderHost(await context.get(open_library), context.settings)
    try:
        yield host
    finally:
        await host.close()
