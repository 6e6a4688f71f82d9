"""Model files in the shape of larger models: they are what they say, and the same each time."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from benchmarks.shapes import Shape, write_shape
from support.tiny_models import build_tiny_model
from synapse.models.gguf_file import open_model_file
from synapse.models.tokenizer import load_tokenizer


def test_a_shape_has_the_template_s_tokenizer_and_its_own_numbers_always_the_same(tmp_path: Path) -> None:
    template = build_tiny_model(tmp_path / "tiny.gguf").path
    shape = Shape(hidden=64, intermediate=96, blocks=2, heads=4, kv_heads=2)
    first, second = (write_shape(tmp_path / f"{number}.gguf", template, shape) for number in range(2))
    assert first.read_bytes() == second.read_bytes()
    file = open_model_file(first)
    config = file.config
    assert (config.hidden, config.intermediate, config.blocks) == (64, 96, 2)
    assert (config.heads, config.kv_heads, config.head_dim) == (4, 2, 16)
    assert {type_.name for name, type_ in file.types.items() if "norm" not in name} == {"Q4_0"}
    text = "the captain looked at the map"
    known, found = (load_tokenizer(open_model_file(path)) for path in (template, first))
    assert found.encode(text) == known.encode(text)
    spread = np.std(file.tensor("blk.1.ffn_down.weight")) * shape.intermediate**0.5
    assert 0.9 < spread < 1.1  # outputs are about as large as inputs
