"""From a model file to an engine, by the backend that is there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from threadpoolctl import threadpool_limits

from synapse.config import Settings, load_settings
from synapse.engines.answering import ASKED_FOR, Answering
from synapse.engines.engine import Engine, cache_tokens, layer_bytes
from synapse.engines.limits import Backend, Limits
from synapse.engines.native.model import check_shape, cores
from synapse.engines.native.packed.file import packed_size
from synapse.engines.native.packed.model import Checked
from synapse.engines.native.steps import Steps, Supervised
from synapse.engines.native.transformer import open_native
from synapse.engines.reference.transformer import ReferenceTransformer, Transformer
from synapse.engines.reference.weights import load_weights
from synapse.errors import InvalidInput, Unavailable
from synapse.log import Logger
from synapse.models.head import ModelHead, read_head
from synapse.models.in_use import hold

log = Logger(__name__)


@dataclass(frozen=True, slots=True)
class NativeParts:
    """What only a native engine needs.

    Attributes:
        steps: who computes its steps.
        packed: the folder of packed models.
        checked: see `open_packed`.
    """

    steps: Steps
    packed: Path
    checked: Checked | None = None


def open_engine_file(
    path: Path,
    backend: Backend = "auto",
    limits: Limits | None = None,
    name: str | None = None,
    *,
    settings: Settings | None = None,
) -> Engine:
    """Open a GGUF file. Its kernel is supervised (see `synapse.hotpath`), which takes a store, and a process at first.

    Args:
        name: what the model is called here; a layer may name it so, or as the file does.
        backend: `reference` is the NumPy engine in float32, `native` the kernel on packed weights; `auto` is `native`
            where that works, and the log says why where it does not.
        settings: those of the environment when left out.

    Raises:
        ModelFileCorrupt, UnsupportedModel: the file cannot be used.
        Unavailable: `native` was asked for and does not work here; the message says why.
        DiskFull: there is no room for the packed weights.
    """
    check_backend(backend)
    steps = Supervised(patient=backend == "auto")
    if backend != "reference":
        steps.prepare()
    settings = settings or load_settings()
    native = NativeParts(steps, settings.folder("packed"))
    return engine_of(read_head(path), backend, limits or Limits(), name, native)


def engine_of(model: ModelHead, backend: Backend, limits: Limits, name: str | None, native: NativeParts) -> Engine:
    """An engine of a model file; see `open_engine_file`."""
    threadpool_limits(limits.threads or max(1, cores() - 1), user_api="blas")
    tokenizer, release = model.tokenizer.build(), hold(model.path.parent)
    try:
        transformer, answering = _open_transformer(model, backend, limits, native)
        return Engine(transformer, tokenizer, model.chat_template, limits, name, release=release, answering=answering)
    except BaseException:
        release()
        raise


def check_backend(backend: Backend) -> None:
    """Raises `InvalidInput` when there is no such backend."""
    if backend not in ("reference", "native", "auto"):
        raise InvalidInput(f"the backend is reference, native or auto, not {backend!r}")


def computes_natively(model: ModelHead, backend: Backend, steps: Steps) -> bool:
    """Whether the engine of this file will be the native one, as far as can be known before its weights are read.

    Raises:
        Unavailable: `native` was asked for and does not work here; the message says why.
    """
    if backend == "reference":
        return False
    try:
        steps.check()
        check_shape(model.config)
    except Unavailable:
        if backend == "native":
            raise
        return False
    return True


def needed_bytes(model: ModelHead, limits: Limits, *, native: bool) -> int:
    """The memory that an engine of this file may come to take: weights, KV cache, and layers."""
    if native:
        weights, number = packed_size(model, limits.quantisation), 2
    else:
        weights, number = 4 * sum(map(prod, model.shapes.values())), 4
    token = number * model.config.kv_numbers
    return weights + token * cache_tokens(limits, context_of(model, limits), token) + layer_bytes(limits)


def context_of(model: ModelHead, limits: Limits) -> int:
    """The longest sequence, in tokens."""
    return min(model.config.context, limits.max_context)


def _open_transformer(
    model: ModelHead, backend: Backend, limits: Limits, parts: NativeParts
) -> tuple[Transformer[Any], Callable[[], Answering]]:
    """The transformer, and what says who computes with it."""
    why = ASKED_FOR
    context = context_of(model, limits)
    if backend != "reference":
        try:
            native = open_native(
                model,
                parts.packed,
                context,
                steps=parts.steps,
                threads=limits.threads,
                quantisation=limits.quantisation,
                precision=limits.layer_precision,
                checked=parts.checked,
            )
        except Unavailable as error:
            if backend == "native":
                raise
            log.info("engine.reference", model=model.path.name, reason=error.message, hint=error.hint)
            why = Answering("reference", error.message, error.hint or "")
        else:
            return native, native.answering
    return ReferenceTransformer(load_weights(model.file()), context), lambda: why
