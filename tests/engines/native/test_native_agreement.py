"""The kernel computes what the reference computes with the same weights, whatever the shape of the model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from support.native_engine import (
    Logits,
    by_kernel,
    distances,
    engine_library,
    feed,
    new_cache,
    pieces,
    rounding_reference,
    some_tokens,
    tiny_native,
)
from support.small_gguf import stored_as, write_small_gguf
from support.tiny_models import build_tiny_model
from synapse.engines.choice import UNDECIDED
from synapse.engines.native.call import padded
from synapse.engines.native.examples import CONTEXT, small_config, small_model, some_choices
from synapse.engines.native.layers import GROUP
from synapse.engines.native.model import NativeModel
from synapse.engines.native.packed.file import Quantisation, open_packed
from synapse.engines.native.packed.packing import Kind
from synapse.engines.native.packed.source_hash import source_sha256
from synapse.engines.reference.transformer import Chunk, ReferenceTransformer
from synapse.engines.reference.weights import load_weights
from synapse.engines.sampling import choose
from synapse.errors import Unavailable
from synapse.models.config import RopeConfig
from synapse.models.gguf_file import open_model_file

Closing = Callable[[NativeModel], NativeModel]
BOUND: dict[Kind, tuple[float, float]] = {"q4": (0.12, 0.05), "q4_0": (0.12, 0.05), "q8": (0.0025, 0.0012)}
"""How far the farthest row of logits may be from the reference's, and all in the mean, as a share of its spread.

With weights of four bits the activations have eight, else sixteen: then what is left is mostly the cache's float16.
Measured were 0.057 and 0.025, and 0.0012 and 0.0005.
"""
ROUNDED: dict[Kind, float] = {"q4": 0.56, "q4_0": 0.56, "q8": 0.05}
"""The mean where weights were rounded besides: measured were 0.28 and 0.024, on models too small to bear it well."""
DIGITS: dict[Kind, float] = {"q4": 1e-6, "q4_0": 1e-6, "q8": 1e-4}
"""The median where the reference rounds activations as the kernel does: measured were 4e-7 and 6e-5."""


def plain(dimensions: int) -> RopeConfig:
    return RopeConfig(theta=10_000.0, dimensions=dimensions)


def yarn(dimensions: int) -> RopeConfig:
    return replace(plain(dimensions), kind="yarn", factor=4.0, original_context=32)


SHAPES: dict[str, tuple[str, bool, dict[str, Any]]] = {
    "one narrow head": (
        "llama",
        True,
        {"heads": 1, "kv_heads": 1, "head_dim": 8, "rope": plain(8), "hidden": 40, "intermediate": 33},
    ),
    "as many key heads as heads": (
        "qwen2",
        True,
        {"heads": 5, "kv_heads": 5, "head_dim": 16, "rope": plain(16), "hidden": 80},
    ),
    "three heads share a key head": (
        "llama",
        True,
        {"heads": 9, "kv_heads": 3, "head_dim": 64, "rope": plain(64), "hidden": 192},
    ),
    "four share one": ("qwen3", False, {"heads": 8, "kv_heads": 2, "head_dim": 40, "rope": plain(40), "hidden": 97}),
    "seven share one": (
        "qwen2",
        True,
        {"heads": 14, "kv_heads": 2, "head_dim": 64, "rope": plain(64), "hidden": 128},
    ),
    "ten wide ones share one": ("qwen3", True, {"heads": 10, "kv_heads": 1, "head_dim": 128, "rope": plain(128)}),
    "few dimensions rotate": ("qwen3", False, {"head_dim": 24, "rope": plain(10)}),
    "half of them do, with yarn": ("llama", False, {"head_dim": 32, "rope": yarn(16), "kv_heads": 3}),
    "no width is a multiple of anything": (
        "qwen2",
        False,
        {"hidden": 101, "intermediate": 67, "vocab": 1009, "blocks": 3},
    ),
    "fewer tokens than are sought": ("llama", False, {"vocab": 37, "hidden": 64, "intermediate": 64}),
    "every width is a multiple of 32": (
        "llama",
        False,
        {"heads": 2, "head_dim": 32, "rope": plain(32), "hidden": 64, "intermediate": 96},
    ),
}


def three_sequences(model: NativeModel) -> list[list[Chunk]]:
    """100 tokens over four blocks that lie apart, 33 in chunks that cross a border, 9 one by one."""
    tokens = [some_tokens(model.packed.config, count, seed) for seed, count in enumerate((100, 33, 9))]
    sizes: list[tuple[int, ...]] = [(61, 1, 1, 1, 2), (7, 24, 1), (1,) * 9]
    tables = ([9, 2, 14, 5], [7, 3], [11])
    return [pieces(*parts) for parts in zip(tokens, tables, sizes, strict=True)]


def assert_close(found: Logits, expected: Logits, kind: Kind) -> None:
    far, (most, mean) = distances(found, expected), BOUND[kind]
    assert far.max() < most
    assert far.mean() < mean


@pytest.mark.parametrize("kind", ["q4", "q4_0", "q8"])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_gives_the_references_logits(shape: str, kind: Kind, close: Closing) -> None:
    architecture, tied, fields = SHAPES[shape]
    model = close(tiny_native(architecture, kind=kind, tied=tied, threads=2, **fields))
    sequences = three_sequences(model)
    found = feed(by_kernel(model), new_cache(model, 16), *sequences)
    expected = feed(model.reference.forward, new_cache(model, 16), *sequences)
    assert_close(np.concatenate(found), np.concatenate(expected), kind)


@pytest.mark.parametrize("kind", ["q4", "q4_0", "q8"])
@pytest.mark.parametrize("shape", SHAPES)
def test_one_block_is_computed_to_the_last_digits(shape: str, kind: Kind, close: Closing) -> None:
    """Most rows: in the others the order of sums has turned a rounding over, of an activation or of the cache."""
    architecture, tied, fields = SHAPES[shape]
    model = close(tiny_native(architecture, kind=kind, tied=tied, threads=2, **fields | {"blocks": 1}))
    sequences = [pieces(some_tokens(model.packed.config, 1 + 2 * n, n), [2 * n + 1, 2 * n]) for n in range(20)]
    found = feed(by_kernel(model), new_cache(model, 40), *sequences)
    expected = feed(rounding_reference(model).forward, new_cache(model, 40), *sequences)
    assert np.median(distances(np.concatenate(found), np.concatenate(expected))) < DIGITS[kind]


@pytest.mark.parametrize("kind", ["q4", "q4_0", "q8"])
def test_chunks_of_any_size_give_the_bits_of_one_chunk(kind: Kind, close: Closing) -> None:
    model = close(tiny_native("qwen3", kind=kind, threads=2))
    tokens, table = some_tokens(model.packed.config, 120), [3, 0, 2, 1]
    (whole,) = feed(by_kernel(model), new_cache(model, 4), pieces(tokens, table))
    for sizes in ((1,) * 120, (31, 2, 64, 5), (32, 32, 32), (119,), (3, 4, 5, 7, 8, 9, 11, 13, 16, 17)):
        (cut,) = feed(by_kernel(model), new_cache(model, 4), pieces(tokens, table, sizes))
        assert np.array_equal(cut, whole)


@pytest.mark.parametrize("storage", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0"])
def test_a_file_keeps_its_numbers_where_its_blocks_have_the_form_of_the_kernels(
    storage: str, tmp_path: Path, close: Closing
) -> None:
    """Float16 weights become eight bits; those of four and eight bits are the same before and after packing."""
    family = {"Q8_0": "qwen2", "Q4_1": "qwen3"}.get(storage, "llama")
    path = build_tiny_model(tmp_path / "tiny.gguf", family, storage=storage, tied=storage == "Q4_0").path
    file = open_model_file(path)
    exact = ReferenceTransformer(load_weights(file), 256)
    sequence = pieces(some_tokens(file.config, 70), [2, 0, 1], (50,))
    (expected,) = feed(exact.forward, exact.new_cache(3), sequence)
    for quantisation in get_args(Quantisation):
        packed = open_packed(file, source_sha256(path, tmp_path), tmp_path, quantisation)
        model = close(NativeModel(packed, 256, 2))
        (found,) = feed(by_kernel(model), new_cache(model, 3), sequence)
        (same_weights,) = feed(model.reference.forward, new_cache(model, 3), sequence)
        kind = packed.kind("blk.0.attn_q.weight")
        as_it_is = {"Q4_0": "q4_0", "Q4_1": "q4"}.get(storage, "q8")
        assert kind == {"auto": as_it_is, "int8": "q8", "4bit": "q4_0" if storage == "Q4_0" else "q4"}[quantisation]
        assert_close(found, same_weights, kind)
        if quantisation == "auto" and storage in ("Q8_0", "Q4_0", "Q4_1"):
            assert_close(found, expected, kind)
        else:
            assert distances(found, expected).mean() < ROUNDED[kind]


def test_a_file_of_mixed_blocks_is_computed_each_in_its_own_way(tmp_path: Path, close: Closing) -> None:
    """Eight-bit and sixteen-bit activations of one row stand side by side, as in files that llama.cpp calls Q4_K_M."""
    kinds = [stored_as(type_, vocab=40) for type_ in ("Q8_0", "Q4_0")]
    names = sorted(kinds[0])
    tensors = {name: kinds[number % 2][name] for number, name in enumerate(names)}
    path = write_small_gguf(tmp_path / "mixed.gguf", tensors=tensors, vocab=40)
    file = open_model_file(path)
    exact = ReferenceTransformer(load_weights(file), 64)
    model = close(NativeModel(open_packed(file, source_sha256(path, tmp_path), tmp_path), 64, 2))
    assert {model.packed.kind(f"blk.0.attn_{which}.weight") for which in "qkv"} == {"q4_0", "q8"}
    sequence = pieces(some_tokens(file.config, 50), [1, 0], (40, 1))
    (found,) = feed(by_kernel(model), new_cache(model, 2), sequence)
    (expected,) = feed(exact.forward, exact.new_cache(3), sequence)
    assert_close(found, expected, "q4_0")


@pytest.mark.parametrize("kind", ["q4", "q4_0", "q8"])
def test_the_first_and_the_last_token_at_the_first_and_the_last_place(kind: Kind, close: Closing) -> None:
    model = close(tiny_native(kind=kind, vocab=353, context=96))
    tokens = np.array([0, 352] * 48)
    sequence = pieces(tokens, [0, 1, 2], (95,))
    (found,) = feed(by_kernel(model), new_cache(model, 3), sequence)
    (expected,) = feed(model.reference.forward, new_cache(model, 3), sequence)
    assert_close(found, expected, kind)


@pytest.mark.parametrize("vocab", [29, 64, 211])
def test_each_row_gets_its_own_choice_and_equal_logits_go_by_id(vocab: int, close: Closing) -> None:
    packed = small_model(replace(small_config("llama", tied=False), vocab=vocab), "q8", np.random.default_rng(0))
    groups = packed.array("output.weight").reshape(padded(vocab) // GROUP, -1)
    groups[:] = groups[0]  # every 16th token has the same weights
    model = close(NativeModel(packed, CONTEXT, 2))
    (chunk,) = pieces(some_tokens(packed.config, 20), [0])
    chunk = replace(chunk, choices=some_choices(vocab, 20, np.random.default_rng(1)))
    answer = model.compute(engine_library(), [chunk], new_cache(model, 1))
    assert all(len(np.unique(row)) <= GROUP for row in answer.values), "there are ties"
    expected = np.array([choose(row, choice) for row, choice in zip(answer.values, chunk.choices, strict=True)])
    decided = answer.chosen != UNDECIDED
    assert np.array_equal(answer.chosen[decided], expected[decided])
    assert decided.sum() >= 18


def test_a_model_that_the_kernel_cannot_run_is_refused_with_what_is_missing() -> None:
    with pytest.raises(Unavailable, match="multiple of 8 dimensions; this model's have 12"):
        tiny_native(head_dim=12, rope=plain(12))
