"""GGUF files written by hand, to say exactly what is in them. No torch, so they take milliseconds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.quants import quantize
from numpy.typing import NDArray

HIDDEN, HEADS, KV_HEADS, INTERMEDIATE = 32, 4, 2, 64

Tensors = dict[str, NDArray[Any]]


def small_metadata(architecture: str = "llama") -> dict[str, Any]:
    """The keys of a one-block model, without a tokenizer."""
    return {
        f"{architecture}.block_count": 1,
        f"{architecture}.context_length": 64,
        f"{architecture}.embedding_length": HIDDEN,
        f"{architecture}.feed_forward_length": INTERMEDIATE,
        f"{architecture}.attention.head_count": HEADS,
        f"{architecture}.attention.head_count_kv": KV_HEADS,
        f"{architecture}.attention.layer_norm_rms_epsilon": 1e-5,
        f"{architecture}.rope.freq_base": 10000.0,
    }


def small_tensors(vocab: int = 8) -> Tensors:
    """Random float32 weights that fit `small_metadata`."""
    random = np.random.default_rng(0)
    width = HIDDEN // HEADS
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (vocab, HIDDEN),
        "output_norm.weight": (HIDDEN,),
        "blk.0.attn_norm.weight": (HIDDEN,),
        "blk.0.ffn_norm.weight": (HIDDEN,),
        "blk.0.attn_q.weight": (HEADS * width, HIDDEN),
        "blk.0.attn_k.weight": (KV_HEADS * width, HIDDEN),
        "blk.0.attn_v.weight": (KV_HEADS * width, HIDDEN),
        "blk.0.attn_output.weight": (HIDDEN, HEADS * width),
        "blk.0.ffn_gate.weight": (INTERMEDIATE, HIDDEN),
        "blk.0.ffn_up.weight": (INTERMEDIATE, HIDDEN),
        "blk.0.ffn_down.weight": (HIDDEN, INTERMEDIATE),
    }
    return {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def stored_as(type_: str, vocab: int = 8) -> dict[str, tuple[NDArray[Any], gguf.GGMLQuantizationType]]:
    """The matrices of `small_tensors` in a type that `gguf` can quantise to."""
    kind = gguf.GGMLQuantizationType[type_]
    matrices = {name: values for name, values in small_tensors(vocab).items() if values.ndim == 2}
    return {name: (quantize(values, kind), kind) for name, values in matrices.items()}


def write_small_gguf(
    path: Path,
    *,
    architecture: str = "llama",
    metadata: Mapping[str, Any] | None = None,
    tensors: Mapping[str, NDArray[Any] | tuple[NDArray[Any], gguf.GGMLQuantizationType]] | None = None,
    tokenizer: Callable[[gguf.GGUFWriter], None] | None = None,
    vocab: int = 8,
) -> Path:
    """Write a one-block model; `metadata` and `tensors` replace what is there by name, None takes it away."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in (small_metadata(architecture) | dict(metadata or {})).items():
        _add(writer, key, value)
    if tokenizer is not None:
        tokenizer(writer)
    for name, data in (small_tensors(vocab) | dict(tensors or {})).items():
        if isinstance(data, tuple):
            writer.add_tensor(name, data[0], raw_dtype=data[1])
        elif data is not None:
            writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    match value:
        case None:
            return
        case bool():
            writer.add_bool(key, value)
        case int():
            writer.add_uint32(key, value)
        case float():
            writer.add_float32(key, value)
        case str():
            writer.add_string(key, value)
        case list():
            writer.add_array(key, value)
