"""An encoder makes vectors of texts: `encode`. Texts that mean similar things get vectors that point the same way."""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from synapse.config import load_settings
from synapse.encoders.linear import Precision, linear_maker
from synapse.encoders.transformer import EncoderKernel, ReferenceEncoder, TextBatch
from synapse.encoders.weights import load_encoder_weights
from synapse.engines.limits import Backend
from synapse.engines.native.kernel import find
from synapse.errors import InvalidInput, Unavailable
from synapse.kernels.native import python_forced
from synapse.models.encoder.config import EncoderConfig, Pooling
from synapse.models.encoder.file import EncoderFile, open_encoder_file
from synapse.models.encoder.tokenizer import EncoderTokenizer, TokenizedText
from synapse.models.errors import ModelFileCorrupt
from synapse.models.in_use import hold
from synapse.models.library import ModelLibrary

Array = NDArray[np.float32]

BATCH_TOKENS = 1024
"""Tokens that are computed together: enough for a matrix product to be quick, few enough to stay in the cache."""


class Encoder:
    """One encoder. Safe to use from several threads.

    Attributes:
        name: what it is called.
        config: what it looks like.
        dimensions: of a vector.
        max_tokens: longest text in tokens, those that begin and end it included; the rest of a longer one is ignored.
    """

    def __init__(self, name: str, config: EncoderConfig, tokenizer: EncoderTokenizer, kernel: EncoderKernel) -> None:
        self.name = name
        self.config = config
        self.dimensions = config.hidden
        self.max_tokens = config.max_tokens
        self._tokenizer = tokenizer
        self._kernel = kernel

    def encode(self, texts: Sequence[str]) -> Array:
        """The vectors of texts, float32[len(texts), dimensions], each of length 1.

        Args:
            texts: at least one; an empty text has a vector too. The dot product of two vectors is their cosine.

        Raises:
            InvalidInput: there is no text, or something that is no text.
            ModelFileCorrupt: the weights produced numbers that are not finite.
        """
        tokens = self.tokenize(texts)
        vectors = np.empty((len(tokens), self.dimensions), np.float32)
        for chosen in batches([len(text.ids) for text in tokens]):
            vectors[chosen] = self.embed([tokens[i] for i in chosen])
        return vectors

    def tokenize(self, texts: Sequence[str]) -> list[TokenizedText]:
        """The tokens of each text.

        Raises:
            InvalidInput: as `encode`.
        """
        check_texts(texts)
        return self._tokenizer.encode(texts)

    def embed(self, texts: Sequence[TokenizedText]) -> Array:
        """The vectors of texts that are tokens already, computed as one batch."""
        batch = TextBatch.of([text.ids for text in texts])
        vectors = pool(self._kernel.forward(batch), batch, self.config.pooling)
        if not np.isfinite(vectors).all():
            raise ModelFileCorrupt(f"{self.name}: the weights produced numbers that are not finite")
        return vectors


def check_texts(texts: Sequence[str]) -> None:
    """Raises `InvalidInput` for what cannot be encoded."""
    if isinstance(texts, str):
        raise InvalidInput("a list of texts is encoded, not a single one", hint="put the text into a list")
    if not len(texts):
        raise InvalidInput("there is no text to encode", hint="give at least one; it may be empty")
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise InvalidInput(f"only text can be encoded, but number {index} is of the type {type(text).__name__}")


def batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Which texts to compute together: their indices, longest texts first, about `BATCH_TOKENS` tokens at a time."""
    chosen: list[int] = []
    tokens = 0
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if chosen and tokens + lengths[index] > BATCH_TOKENS:
            yield chosen
            chosen, tokens = [], 0
        chosen.append(index)
        tokens += lengths[index]
    if chosen:
        yield chosen


@np.errstate(over="ignore", invalid="ignore")
def pool(hidden: Array, batch: TextBatch, pooling: Pooling) -> Array:
    """One vector of length 1 for each text, of the hidden states [rows, hidden] of its tokens."""
    starts = batch.starts
    if pooling == "cls":
        vectors = hidden[starts]
    else:
        vectors = np.add.reduceat(hidden, starts, axis=0)
        vectors /= np.asarray(batch.lengths, np.float32)[:, None]
    vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), np.float32(1e-12))
    return vectors


def open_encoder(
    model: str | None = None, backend: Backend = "auto", *, precision: Precision = "float32", threads: int | None = None
) -> Encoder:
    """Open an encoder that is pulled, or that lies in a folder.

    Args:
        model: a name of `synapse model list`, or a path; the setting `default_encoder` when left out.
        backend: `reference` is NumPy; `auto` computes `int8` in the kernel where it is there; `native` insists on it.
        precision: of the weights. `int8` is a little less exact, and quicker where the kernel is there.
        threads: of the matrix products of this process; the setting when left out, and 0 means one per core but one.

    Raises:
        NotFound: there is no such model here, or no kernel and `native` was asked for; the hint says how to get it.
        ModelFileCorrupt, UnsupportedModel: its files cannot be used.
        Unavailable: `native` was asked for with float32, or native code is turned off.
        InvalidInput: there is no such backend or precision.
    """
    settings = load_settings()
    folder = ModelLibrary(settings.folder("models")).resolve_encoder(model or settings.default_encoder)
    threads = settings.threads if threads is None else threads
    return open_encoder_folder(folder, backend, precision=precision, threads=threads)


def open_encoder_folder(
    folder: Path, backend: Backend = "auto", *, precision: Precision = "float32", threads: int = 0
) -> Encoder:
    """Open the encoder in a folder; see `open_encoder`."""
    if backend not in ("reference", "native", "auto"):
        raise InvalidInput(f"the backend is reference, native or auto, not {backend!r}")
    return encoder_of(open_encoder_file(folder), backend, precision=precision, threads=threads)


def encoder_of(file: EncoderFile, backend: Backend, *, precision: Precision, threads: int) -> Encoder:
    """An encoder of an open file; see `open_encoder`."""
    linear = linear_maker(precision, backend, threads)
    if backend == "native":
        if python_forced():
            raise Unavailable("native code is turned off", hint="unset SYNAPSE_FORCE_PYTHON")
        find()
    threadpool_limits(threads or max(1, (os.cpu_count() or 1) - 1), user_api="blas")
    kernel = ReferenceEncoder(load_encoder_weights(file, linear))
    encoder = Encoder(file.folder.name, file.config, file.tokenizer, kernel)
    weakref.finalize(encoder, hold(file.folder))
    return encoder
