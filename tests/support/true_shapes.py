"""GGUF files in the true shapes of models that people run, with random weights: written block by block, in seconds."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from numpy.typing import NDArray

from support.tiny_models import write_byte_tokenizer

Q4_0, Q8_0 = GGMLQuantizationType.Q4_0, GGMLQuantizationType.Q8_0
SPREAD = {Q4_0: 4.6, Q8_0: 74.0}
"""The standard deviation of codes that are all equally likely."""


@dataclass(frozen=True)
class Shape:
    """What a model looks like; `bias` is of q, k and v, and `factors` are those of Llama 3's rotary embedding."""

    architecture: str
    blocks: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocab: int
    context: int
    theta: float
    eps: float
    bias: bool = False
    factors: bool = False
    head_dim: int = 64


LLAMA_3_2_1B = Shape("llama", 16, 2048, 8192, 32, 8, 128_256, 131_072, 500_000.0, 1e-5, factors=True)
"""huggingface.co/meta-llama/Llama-3.2-1B, config.json."""
QWEN_2_5_HALF_B = Shape("qwen2", 24, 896, 4864, 14, 2, 151_936, 32_768, 1_000_000.0, 1e-6, bias=True)
"""huggingface.co/Qwen/Qwen2.5-0.5B, config.json."""


def write_true_shape(path: Path, shape: Shape, seed: int = 0) -> Path:
    """Write a model whose head is tied to its embedding, in Q4_0, and Q8_0 where converters keep more bits."""
    random = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, shape.architecture)
    writer.add_name("true shape")
    writer.add_block_count(shape.blocks)
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.hidden)
    writer.add_feed_forward_length(shape.intermediate)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_layer_norm_rms_eps(shape.eps)
    writer.add_rope_freq_base(shape.theta)
    write_byte_tokenizer(writer, vocab=shape.vocab)
    for name, rows, columns, type_ in _matrices(shape):
        writer.add_tensor(name, _random_blocks(random, rows, columns, type_), raw_dtype=type_)
    for name, values in _vectors(shape, random):
        writer.add_tensor(name, values.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _matrices(shape: Shape) -> Iterator[tuple[str, int, int, GGMLQuantizationType]]:
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    yield "token_embd.weight", shape.vocab, shape.hidden, Q8_0
    for block in range(shape.blocks):
        more = Q8_0 if block % 4 == 0 else Q4_0
        yield f"blk.{block}.attn_q.weight", queries, shape.hidden, Q4_0
        yield f"blk.{block}.attn_k.weight", keys, shape.hidden, Q4_0
        yield f"blk.{block}.attn_v.weight", keys, shape.hidden, more
        yield f"blk.{block}.attn_output.weight", shape.hidden, queries, Q4_0
        yield f"blk.{block}.ffn_gate.weight", shape.intermediate, shape.hidden, Q4_0
        yield f"blk.{block}.ffn_up.weight", shape.intermediate, shape.hidden, Q4_0
        yield f"blk.{block}.ffn_down.weight", shape.hidden, shape.intermediate, more


def _vectors(shape: Shape, random: np.random.Generator) -> Iterator[tuple[str, NDArray[np.float64]]]:
    yield "output_norm.weight", 1 + random.standard_normal(shape.hidden) / 8
    for block in range(shape.blocks):
        yield f"blk.{block}.attn_norm.weight", 1 + random.standard_normal(shape.hidden) / 8
        yield f"blk.{block}.ffn_norm.weight", 1 + random.standard_normal(shape.hidden) / 8
        if shape.bias:
            for which, heads in (("q", shape.heads), ("k", shape.kv_heads), ("v", shape.kv_heads)):
                yield f"blk.{block}.attn_{which}.bias", random.standard_normal(heads * shape.head_dim) / 4
    if shape.factors:
        yield "rope_freqs.weight", _llama3_factors(shape)


def _llama3_factors(shape: Shape) -> NDArray[np.float64]:
    """What Llama 3.2 divides its frequencies by: `rope_scaling` of its config.json (factor 32, 1 and 4 of 8192)."""
    frequencies = shape.theta ** (-np.arange(0, shape.head_dim, 2) / shape.head_dim)
    turns = 8192 * frequencies / (2 * math.pi)
    smooth = np.clip((turns - 1) / (4 - 1), 0, 1)
    return np.asarray(1 / ((1 - smooth) / 32 + smooth), np.float64)


def _random_blocks(
    random: np.random.Generator, rows: int, columns: int, type_: GGMLQuantizationType
) -> NDArray[np.uint8]:
    """uint8[rows, bytes of a row]: random codes, and a scale that keeps the size of what is multiplied."""
    block, size = GGML_QUANT_SIZES[type_]
    count = columns // block
    blocks = np.frombuffer(random.bytes(rows * count * size), np.uint8).reshape(rows, count, size).copy()
    scales = (random.uniform(0.8, 1.2, (rows, count)) / (SPREAD[type_] * columns**0.5)).astype("<f2")
    blocks[..., :2] = scales[..., None].view(np.uint8)
    return blocks.reshape(rows, -1)
