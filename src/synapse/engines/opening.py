"""From a model file to an engine, by the backend that is there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from threadpoolctl import threadpool_limits

from synapse.config import load_settings
from synapse.engines.answering import ASKED_FOR, Answering
from synapse.engines.engine import Engine
from synapse.engines.limits import Backend, Limits
from synapse.engines.native.model import cores
from synapse.engines.native.transformer import open_native, prepare_native
from synapse.engines.reference.transformer import ReferenceTransformer, Transformer
from synapse.engines.reference.weights import load_weights
from synapse.errors import InvalidInput, Unavailable
from synapse.log import Logger
from synapse.models.chat_template import load_chat_template
from synapse.models.gguf_file import ModelFile, open_model_file
from synapse.models.in_use import hold
from synapse.models.tokenizer import load_tokenizer

log = Logger(__name__)


def open_engine_file(
    path: Path, backend: Backend = "auto", limits: Limits | None = None, name: str | None = None
) -> Engine:
    """Open a GGUF file.

    Args:
        name: what the model is called here; a layer may name it so, or as the file does.
        backend: `reference` is the NumPy engine in float32, `native` the kernel on packed weights; `auto` is `native`
            where that works, and the log says why where it does not.

    Raises:
        ModelFileCorrupt, UnsupportedModel: the file cannot be used.
        Unavailable: `native` was asked for and does not work here; the message says why.
        DiskFull: there is no room for the packed weights.
    """
    if backend not in ("reference", "native", "auto"):
        raise InvalidInput(f"the backend is reference, native or auto, not {backend!r}")
    limits = limits or Limits()
    threadpool_limits(limits.threads or max(1, cores() - 1), user_api="blas")
    if backend != "reference":
        prepare_native()
    file = open_model_file(path)
    tokenizer, template = load_tokenizer(file), load_chat_template(file)
    transformer, answering = _open_transformer(file, backend, limits)
    return Engine(transformer, tokenizer, template, limits, name, release=hold(path.parent), answering=answering)


def _open_transformer(
    file: ModelFile, backend: Backend, limits: Limits
) -> tuple[Transformer[Any], Callable[[], Answering]]:
    """The transformer, and what says who computes with it."""
    why = ASKED_FOR
    context = min(file.config.context, limits.max_context)
    if backend != "reference":
        try:
            native = open_native(
                file,
                load_settings().folder("packed"),
                context,
                threads=limits.threads,
                quantisation=limits.quantisation,
                precision=limits.layer_precision,
                patient=backend == "auto",
            )
        except Unavailable as error:
            if backend == "native":
                raise
            log.info("engine.reference", model=file.path.name, reason=error.message, hint=error.hint)
            why = Answering("reference", error.message, error.hint or "")
        else:
            return native, native.answering
    return ReferenceTransformer(load_weights(file), context), lambda: why
