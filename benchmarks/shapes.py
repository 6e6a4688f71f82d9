"""Model files in the shape of models that people use, with random weights: only their cost means something."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter
from numpy.typing import NDArray

BLOCK, BLOCK_BYTES = 32, 18
"""Of Q4_0: weights, and bytes with their scale."""
TOKENIZER = ("tokenizer.", "general.name")
"""What is taken from the template."""


@dataclass(frozen=True)
class Shape:
    """Of a Llama model; the vocabulary is the template's."""

    hidden: int
    intermediate: int
    blocks: int
    heads: int
    kv_heads: int


SHAPES = {"1b": Shape(hidden=2048, intermediate=8192, blocks=16, heads=32, kv_heads=8)}
"""1b: Llama 3.2 1B."""


def write_shape(path: Path, template: Path, shape: Shape) -> Path:
    """Write a GGUF file of that shape with random Q4_0 weights, the same each time, and return its path.

    Args:
        template: a GGUF file whose tokenizer and chat template it gets.
    """
    random = np.random.default_rng(1)
    reader = GGUFReader(template)
    writer = GGUFWriter(path, "llama")
    for field in reader.fields.values():
        if field.name.startswith(TOKENIZER):
            if field.types[0] == GGUFValueType.ARRAY:
                writer.add_array(field.name, field.contents())
            else:
                writer.add_key_value(field.name, field.contents(), field.types[0])
    head = shape.hidden // shape.heads
    writer.add_context_length(8192)
    writer.add_embedding_length(shape.hidden)
    writer.add_feed_forward_length(shape.intermediate)
    writer.add_block_count(shape.blocks)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(500_000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    vocab = len(reader.fields["tokenizer.ggml.tokens"].data)
    _add(writer, "token_embd.weight", _random_q4_0(vocab, shape.hidden, random))
    writer.add_tensor("output_norm.weight", np.ones(shape.hidden, np.float32))
    linear = {
        "attn_q": (shape.hidden, shape.hidden),
        "attn_k": (shape.kv_heads * head, shape.hidden),
        "attn_v": (shape.kv_heads * head, shape.hidden),
        "attn_output": (shape.hidden, shape.hidden),
        "ffn_gate": (shape.intermediate, shape.hidden),
        "ffn_up": (shape.intermediate, shape.hidden),
        "ffn_down": (shape.hidden, shape.intermediate),
    }
    for block in range(shape.blocks):
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{block}.{name}.weight", np.ones(shape.hidden, np.float32))
        for name, (out, width) in linear.items():
            _add(writer, f"blk.{block}.{name}.weight", _random_q4_0(out, width, random))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _random_q4_0(out: int, width: int, random: np.random.Generator) -> NDArray[np.uint8]:
    """Codes at random, and one scale, with which outputs are about as large as inputs."""
    blocks = random.integers(0, 256, (out * width // BLOCK, BLOCK_BYTES), dtype=np.uint8)
    blocks[:, :2] = np.array([1 / (4.6 * width**0.5)], "<f2").view(np.uint8)
    return blocks.reshape(out, -1)


def _add(writer: GGUFWriter, name: str, raw: NDArray[np.uint8]) -> None:
    writer.add_tensor(name, raw, raw_dtype=GGMLQuantizationType.Q4_0)
