"""The transformer of the native engine, which takes the reference's place."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from synapse.engines.answering import Answering
from synapse.engines.native.cache import HalfCache
from synapse.engines.native.layers import PackedLayer, Precision, pack_layer
from synapse.engines.native.model import NativeModel, check_shape
from synapse.engines.native.packed.file import Quantisation, open_packed
from synapse.engines.native.packed.model import Checked
from synapse.engines.native.packed.source_hash import source_sha256
from synapse.engines.native.steps import Steps
from synapse.engines.reference.transformer import Chunk, StepLogits
from synapse.errors import Unavailable
from synapse.models.adapters.adapter import Adapter
from synapse.models.gguf_file import ModelFile
from synapse.models.head import ModelHead


class NativeTransformer:
    """A packed model and who computes with it: see `Transformer`, whose methods these are."""

    def __init__(self, model: NativeModel, steps: Steps, precision: Precision = "int8") -> None:
        self.config = model.packed.config
        self.context = model.context
        self.weight_bytes = model.packed.bytes
        self._model: NativeModel | None = model
        self._precision: Precision = precision
        self._steps = steps

    @property
    def kv_token_bytes(self) -> int:
        """Keys and values are float16."""
        return self.config.kv_numbers * 2

    def new_cache(self, blocks: int) -> HalfCache:
        """An empty KV cache of so many blocks."""
        return HalfCache(self.config.blocks, self.config.kv_heads, self.config.head_dim, blocks)

    def prepare(self, adapter: Adapter) -> PackedLayer:
        """A layer in strips."""
        return pack_layer(adapter, self.config.blocks, self._precision)

    @np.errstate(over="ignore", invalid="ignore")
    def forward(self, chunks: Sequence[Chunk], cache: HalfCache) -> StepLogits:
        """One step; see `Transformer.forward`.

        A step that is compared leaves the keys and values of the side whose answer is given: the same request gets the
        same tokens whether or not chance has picked a step of it.

        Raises:
            Unavailable: the engine is closed, or its weights were cut short on the disk.
        """
        model = self._model
        if model is None:
            raise Unavailable("the engine is closed", hint="open it again")
        try:
            answer = self._steps.forward(model, tuple(chunks), cache)
            model.packed.check()
            return answer
        finally:
            model.forget()

    def answering(self) -> Answering:
        """Who computes the steps now."""
        return self._steps.answering()

    def close(self) -> None:
        """Send the threads home and let go of the weights."""
        if self._model is not None:
            self._model.close()
            self._model = None


def open_native(
    file: ModelFile | ModelHead,
    folder: Path,
    context: int,
    *,
    steps: Steps,
    threads: int = 0,
    quantisation: Quantisation = "auto",
    precision: Precision = "int8",
    checked: Checked | None = None,
) -> NativeTransformer:
    """The native transformer of a model file, packed into `folder` if it is not there yet.

    Args:
        checked: see `open_packed`.

    Raises:
        Unavailable: the kernel does not answer in this process, or cannot run this model; the message says why.
        ModelFileCorrupt: a weight is not finite.
        DiskFull: there is no room for the packed model.
    """
    steps.check()
    check_shape(file.config)
    packed = open_packed(file, source_sha256(file.path, folder), folder, quantisation, checked)
    try:
        return NativeTransformer(NativeModel(packed, context, threads), steps, precision)
    except Unavailable:
        packed.close()
        raise
