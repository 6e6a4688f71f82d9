"""Layers as PEFT writes them change the kernel's logits as they change the reference's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pytest
from numpy.typing import NDArray

from support.native_engine import (
    by_kernel,
    distances,
    feed,
    new_cache,
    pieces,
    some_tokens,
    tiny_adapter,
    tiny_native,
    write_adapter,
)
from support.peft_layers import save_layer
from support.tiny_models import build_tiny_model
from synapse.engines.native.examples import small_config
from synapse.engines.native.layers import Precision, pack_layer
from synapse.engines.native.model import NativeModel
from synapse.engines.native.packed.file import open_packed
from synapse.engines.native.packed.source_hash import source_sha256
from synapse.engines.reference.lora import Stack, lora_layer
from synapse.engines.reference.transformer import Chunk
from synapse.models.adapters.adapter import Adapter, LoraFactors, read_adapter
from synapse.models.config import PROJECTIONS
from synapse.models.gguf_file import open_model_file

Distances = NDArray[np.float64]
Closing = Callable[[NativeModel], NativeModel]
BOUND: dict[Precision, tuple[float, float]] = {"float16": (0.007, 0.0023), "int8": (0.085, 0.035)}
"""How far the farthest row may be from the reference with the file's own factors, and all in the mean.

Measured were 0.0035 and 0.0011, and 0.041 and 0.017, with layers that are as large as the model itself.
"""


@pytest.fixture(scope="module")
def model() -> Iterator[NativeModel]:
    made = tiny_native("qwen3", threads=2, tied=False)
    yield made
    made.close()


def packed(*layers: tuple[Adapter, float], blocks: int = 2, precision: Precision = "float16") -> Stack:
    return tuple((pack_layer(adapter, blocks, precision), weight) for adapter, weight in layers)


def plain(*layers: tuple[Adapter, float]) -> Stack:
    return tuple((lora_layer(adapter), weight) for adapter, weight in layers)


def far(model: NativeModel, *stacks: tuple[Stack, Stack], count: int = 40) -> Distances:
    """How far the kernel is, in each row, from the reference: sequences have the first and the second stack of each."""
    sequences: list[list[list[Chunk]]] = [[], []]
    for n, pair in enumerate(stacks):
        tokens = some_tokens(model.packed.config, count, n)
        for side, stack in zip(sequences, pair, strict=True):
            side.append(pieces(tokens, [2 * n + 1, 2 * n], (count - 3, 1, 1), stack))
    found = feed(by_kernel(model), new_cache(model, 2 * len(stacks)), *sequences[0])
    expected = feed(model.reference.forward, new_cache(model, 2 * len(stacks)), *sequences[1])
    return distances(np.concatenate(found), np.concatenate(expected))


def assert_near(
    model: NativeModel, *stacks: list[tuple[Adapter, float]], precision: Precision = "float16", count: int = 40
) -> None:
    """The kernel with packed layers computes what the reference does with the layers as their files have them."""
    found = far(model, *((packed(*stack, precision=precision), plain(*stack)) for stack in stacks), count=count)
    most, mean = BOUND[precision]
    assert found.max() < most
    assert found.mean() < mean


@pytest.mark.parametrize("precision", get_args(Precision))
@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("rank", [1, 3, 8, 16, 64, 256])
def test_every_rank_in_every_type_gives_the_references_logits(
    model: NativeModel, rank: int, dtype: Literal["F32", "F16", "BF16"], precision: Precision, tmp_path: Path
) -> None:
    config = model.packed.config
    adapter = read_adapter(write_adapter(tmp_path / "layer", tiny_adapter(config, rank=rank), dtype), config)
    assert {f.A.dtype for f in adapter.factors.values()} == {np.dtype(np.float16 if dtype == "F16" else np.float32)}
    assert_near(model, [(adapter, 1.0)], precision=precision)
    assert far(model, (packed((adapter, 1.0)), ())).max() > 0.3, "the layer matters"


PEFT: dict[str, dict[str, Any]] = {
    "attention only": {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]},
    "feed-forward only": {"target_modules": ["gate_proj", "up_proj", "down_proj"], "r": 5},
    "one map of one block": {"target_modules": ["down_proj"], "layers_to_transform": [1]},
    "rank-stabilised": {"target_modules": list(PROJECTIONS), "r": 16, "use_rslora": True},
    "a rank for each map": {
        "target_modules": list(PROJECTIONS),
        "rank_pattern": {"q_proj": 9, "down_proj": 1, "0.self_attn.v_proj": 20},
        "alpha_pattern": {"q_proj": 3, "up_proj": 64},
    },
}


@pytest.mark.parametrize("options", PEFT.values(), ids=PEFT)
def test_layers_that_peft_has_written(options: dict[str, Any], tmp_path: Path, close: Closing) -> None:
    tiny = build_tiny_model(tmp_path / "tiny.gguf", "llama", heads=6, kv_heads=2, hidden=96, storage="Q8_0")
    file = open_model_file(tiny.path)
    folder = save_layer(tmp_path / "layer", model=deepcopy(tiny.reference), **options)
    adapter = read_adapter(folder, file.config)
    model = close(NativeModel(open_packed(file, source_sha256(tiny.path, tmp_path), tmp_path), 256, 2))
    for precision in get_args(Precision):
        assert_near(model, [(adapter, 1.0)], precision=precision)
    assert far(model, (packed((adapter, 1.0)), ())).max() > 0.1, "the layer matters"


def test_stacks_of_several_layers_with_any_weights(model: NativeModel) -> None:
    config = model.packed.config
    a, b, c = (tiny_adapter(config, rank=rank, seed=rank, size=0.3) for rank in (2, 8, 40))
    stacks: list[list[tuple[Adapter, float]]] = [
        [(a, 1.0), (b, 1.0), (c, 1.0)],
        [(c, -1.0)],
        [(b, 2.5), (a, -0.75)],
        [(a, 0.0), (b, 1.0)],
        [],
        [(a, 1e-3), (c, 1.0)],
    ]
    assert_near(model, *stacks)


def test_a_weight_of_zero_is_as_no_layer_to_the_bit(model: NativeModel) -> None:
    tokens = some_tokens(model.packed.config, 30)
    stack = packed((tiny_adapter(model.packed.config), 0.0))
    (found,) = feed(by_kernel(model), new_cache(model, 1), pieces(tokens, [0], (20,), stack))
    (expected,) = feed(by_kernel(model), new_cache(model, 1), pieces(tokens, [0], (20,)))
    assert np.array_equal(found, expected)


def test_a_batch_of_many_layers_some_of_them_shared(model: NativeModel) -> None:
    """33 sequences over 20 layers of different ranks and precisions, up to three in a stack."""
    config = model.packed.config
    adapters = [tiny_adapter(config, rank=1 + 5 * n % 37, seed=n, size=0.5) for n in range(20)]
    stacks = []
    for n in range(33):
        chosen = sorted({n % 20, n * n % 20, 7 * n % 20})[: n % 4]
        stacks.append([(adapters[layer], 0.5 + 0.25 * (n % 5) - place) for place, layer in enumerate(chosen)])
    assert_near(model, *stacks, count=9)


@pytest.mark.parametrize(
    "targets", [[(0, "q_proj")], [(1, "down_proj")], [(0, "v_proj"), (1, "o_proj"), (1, "up_proj")]]
)
def test_layers_of_few_maps_beside_layers_of_others(model: NativeModel, targets: list[tuple[int, str]]) -> None:
    config = model.packed.config
    few, all_ = tiny_adapter(config, rank=12, targets=targets), tiny_adapter(config, rank=4, seed=1, size=0.3)
    assert_near(model, [(few, 1.0)], [(all_, 1.0)], [(few, -1.0), (all_, 0.5)], [])


@pytest.mark.parametrize("precision", get_args(Precision))
@pytest.mark.parametrize("factor", [1e-12, 1e-6, 3e5, 1e12])
def test_factors_far_from_one_that_balance_each_other(model: NativeModel, factor: float, precision: Precision) -> None:
    """Float16 alone would hold neither: trainers leave one factor small, and converters fold scales into one."""
    adapter = tiny_adapter(model.packed.config, rank=4)
    moved = {
        key: LoraFactors(f.A * np.float32(factor), f.B / np.float32(factor), f.scale)
        for key, f in adapter.factors.items()
    }
    scaled = packed((replace(adapter, factors=moved), 1.0), precision=precision)
    assert far(model, (scaled, plain((adapter, 1.0)))).max() < BOUND[precision][0]


@pytest.mark.parametrize("precision", get_args(Precision))
def test_a_rank_that_is_a_thousand_times_smaller_than_the_others_keeps_its_digits(precision: Precision) -> None:
    """Singular values fall off, so the ranks of a factor have sizes of their own."""
    adapter = tiny_adapter(small_config("llama", tied=True), rank=8)
    for factors in adapter.factors.values():
        factors.A[3] *= np.float32(1e-3)
        factors.B[:, 3] *= np.float32(1e-3)
    layer = pack_layer(adapter, 2, precision)
    for key, (A, B) in layer.factors.items():
        f = adapter.factors[key]
        found, expected = np.outer(B[:, 3], A[3]), np.outer(f.B[:, 3], f.A[3]) * np.float32(f.scale)
        assert np.linalg.norm(found - expected) < 0.02 * np.linalg.norm(expected)
