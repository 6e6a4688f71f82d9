"""The native engine: the hot path `engine`, and the transformer that takes the reference's place."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from synapse.engines.answering import NATIVE, Answering
from synapse.engines.native.cache import HalfCache
from synapse.engines.native.examples import examples
from synapse.engines.native.kernel import agrees, bind, find
from synapse.engines.native.layers import PackedLayer, Precision, pack_layer
from synapse.engines.native.model import NativeModel
from synapse.engines.native.packed.file import Quantisation, open_packed
from synapse.engines.native.packed.source_hash import source_sha256
from synapse.engines.reference.transformer import Chunk, StepLogits
from synapse.errors import Unavailable
from synapse.hotpath.paths import PATHS, hotpath, ready, standing
from synapse.hotpath.rollout.plan import Plan, Stage
from synapse.kernels.native import NativeSide
from synapse.models.adapters.adapter import Adapter
from synapse.models.gguf_file import ModelFile

PATH = "engine"
COMPARED = 1e-5
"""Of the steps, how many are compared with the reference before their tokens are chosen: one takes it a second."""
PLAN: Plan = (Stage("full", share=1.0, compare=COMPARED, dwell=timedelta(days=30), min_samples=0),)
"""A build that has agreed in its burn-in answers every step: the reference is too slow to stand in for weeks."""


def _burn_in() -> list[tuple[Any, ...]]:
    return list(islice(examples(), 4))


@hotpath(PATH, kernel=NativeSide(find, bind), agrees=agrees, plan=PLAN, burn_in=_burn_in)
def forward(model: NativeModel, chunks: tuple[Chunk, ...], cache: HalfCache) -> StepLogits:
    """One step: see `Transformer.forward`. Keys and values are written where the chunks say, whoever computes them.

    What the kernel has written for the same step is kept, in case its answer is the one that is given.
    """
    if model.computed is chunks:
        model.put_back = cache.keep(np.concatenate([chunk.slots() for chunk in chunks]))
    return model.reference.forward(chunks, cache)


class NativeTransformer:
    """A packed model behind the hot path: see `Transformer`, whose methods these are."""

    def __init__(self, model: NativeModel, precision: Precision = "int8") -> None:
        self.config = model.packed.config
        self.context = model.context
        self.weight_bytes = model.packed.bytes
        self._model: NativeModel | None = model
        self._precision: Precision = precision

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
            answer = forward(model, tuple(chunks), cache)
            model.packed.check()
            if model.put_back is not None and PATHS[PATH].native_answered:
                model.put_back()
            return answer
        finally:
            model.forget()

    def answering(self) -> Answering:
        """Who computes the steps now. The reference does on the same weights while it is not decided that they can."""
        state = standing(PATH)
        return NATIVE if state.native else Answering("reference", state.why, state.hint)

    def close(self) -> None:
        """Send the threads home and let go of the weights."""
        if self._model is not None:
            self._model.close()
            self._model = None


def prepare_native() -> None:
    """Begin in the background what `open_native` waits for, before the model file is read."""
    ready(PATH, timeout=0)


def open_native(
    file: ModelFile,
    folder: Path,
    context: int,
    *,
    threads: int = 0,
    quantisation: Quantisation = "auto",
    precision: Precision = "int8",
    patient: bool = False,
) -> NativeTransformer:
    """The native transformer of a model file, packed into `folder` if it is not there yet.

    Args:
        patient: open it although the kernel is not ready yet, when that may change by itself (a store that is locked,
            a burn-in that goes on): the reference computes the steps until then.

    Raises:
        Unavailable: the kernel does not answer in this process, or cannot run this model; the message says why.
        ModelFileCorrupt: a weight is not finite.
        DiskFull: there is no room for the packed model.
    """
    state = ready(PATH)
    if not state.native and (state.final or not patient):
        raise Unavailable(
            f"the native engine is not ready: {state.why}",
            hint=state.hint or "`synapse hotpath status` says how it stands",
        )
    packed = open_packed(file, source_sha256(file.path, folder), folder, quantisation)
    try:
        return NativeTransformer(NativeModel(packed, context, threads), precision)
    except Unavailable:
        packed.close()
        raise
