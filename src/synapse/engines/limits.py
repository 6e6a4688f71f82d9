"""How an engine is opened: by which backend, and how much it may hold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast

from synapse.config import Settings
from synapse.engines.native.layers import Precision
from synapse.engines.native.packed.file import Quantisation

Backend = Literal["reference", "native", "auto"]


@dataclass(frozen=True, slots=True)
class Limits:
    """How much an engine may hold.

    Attributes:
        max_context: longest sequence, in tokens; the model's own context when that is shorter.
        max_batch: sequences that share one step.
        kv_cache_tokens: tokens the KV cache holds; 0 means as many as `kv_cache_bytes` and an eighth of the machine's
            memory have room for, but at least one sequence of the longest length. Memory is taken as they fill.
        kv_cache_bytes: see `kv_cache_tokens`.
        step_tokens: tokens computed in one step, over all sequences.
        max_layers, max_layer_bytes: layers kept in memory; the least recently used that no sequence needs goes first.
        threads: threads that compute; 0 means one per core for the kernel, and one per core but one for the reference:
            BLAS threads wait for one another by spinning, so a single other busy process on the last core would slow
            them many times over.
        quantisation: how exactly the native engine keeps weights: `auto` as the file has them, else `int8` or `4bit`.
        layer_precision: how exactly it keeps LoRA layers: `int8`, or `float16` in twice the memory.
        prompt_lookup: whether one or two sequences that share a step guess what comes next (see `PromptLookup`).
    """

    max_context: int = 8192
    max_batch: int = 16
    kv_cache_tokens: int = 0
    kv_cache_bytes: int = 2**30
    step_tokens: int = 256
    max_layers: int = 20
    max_layer_bytes: int = 500 * 2**20
    threads: int = 0
    quantisation: Quantisation = "auto"
    layer_precision: Precision = "int8"
    prompt_lookup: bool = True


def limits_from(settings: Settings) -> Limits:
    """The engine's limits as the user set them."""
    return Limits(
        max_context=settings.max_context,
        max_batch=settings.max_batch,
        kv_cache_tokens=settings.kv_cache_tokens,
        kv_cache_bytes=settings.kv_cache_bytes,
        threads=settings.threads,
        max_layers=settings.max_layers,
        max_layer_bytes=settings.max_layer_bytes,
        quantisation=cast(Quantisation, settings.quantisation),
        layer_precision=cast(Precision, settings.layer_precision),
    )
