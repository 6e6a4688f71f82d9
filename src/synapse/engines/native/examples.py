"""Small models and steps that use every part of the kernel: what a new build must answer like the reference."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from synapse.engines.cache.blocks import BLOCK_TOKENS
from synapse.engines.choice import Choice, Edits
from synapse.engines.native.cache import HalfCache
from synapse.engines.native.layers import PackedLayer, Precision, pack_layer
from synapse.engines.native.model import NativeModel
from synapse.engines.native.packed.file import PackedModel
from synapse.engines.native.packed.packing import Kind
from synapse.engines.reference.transformer import Chunk
from synapse.models.adapters.adapter import Adapter, LoraFactors
from synapse.models.config import PROJECTIONS, ModelConfig, RopeConfig
from synapse.models.gguf_file import PARTS

Call = tuple[NativeModel, tuple[Chunk, ...], HalfCache]
CONTEXT = 128


def small_config(architecture: str, *, tied: bool) -> ModelConfig:
    """A model of no use but for its shape: no width is a multiple of another, and few are of 32."""
    return ModelConfig(
        architecture=architecture,
        name="example",
        blocks=2,
        hidden=72,
        intermediate=104,
        heads=6,
        kv_heads=2,
        head_dim=24,
        vocab=211,
        context=CONTEXT,
        norm_eps=1e-5,
        rope=RopeConfig(theta=10_000.0, dimensions=24),
        tied=tied,
        qkv_bias=architecture == "qwen2",
        qk_norm=architecture == "qwen3",
    )


def small_model(config: ModelConfig, kind: Kind, random: np.random.Generator) -> PackedModel:
    """Random weights, packed."""
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (config.vocab, config.hidden)}
    if not config.tied:
        shapes["output.weight"] = (config.vocab, config.hidden)
    for block in range(config.blocks):
        shapes |= {f"blk.{block}.{PARTS[name]}": config.linear_shape(name) for name in PROJECTIONS}
        shapes |= {f"blk.{block}.{PARTS[name]}": (config.hidden,) for name in ("attention_norm", "ffn_norm")}
        if config.qkv_bias:
            shapes |= {f"blk.{block}.{PARTS[f'{w}_bias']}": config.linear_shape(f"{w}_proj")[:1] for w in "qkv"}
        if config.qk_norm:
            shapes |= {f"blk.{block}.{PARTS[name]}": (config.head_dim,) for name in ("q_norm", "k_norm")}
    shapes["output_norm.weight"] = (config.hidden,)
    tensors: dict[str, NDArray[np.float32]] = {}
    for name, shape in shapes.items():
        values = random.standard_normal(shape, np.float32)
        tensors[name] = values / np.float32(shape[-1] ** 0.5) if len(shape) == 2 else 1 + values / np.float32(8)
    return PackedModel.of(config, tensors, kind)


def small_layer(name: str, config: ModelConfig, rank: int, precision: Precision, seed: int) -> PackedLayer:
    """Random factors of every linear map but one."""
    random = np.random.default_rng(seed)
    factors = {}
    for block in range(config.blocks):
        for projection in PROJECTIONS:
            if (block, projection) == (1, "k_proj"):
                continue
            out, width = config.linear_shape(projection)
            A = random.standard_normal((rank, width), np.float32) / np.float32(width**0.5)
            B = random.standard_normal((out, rank), np.float32) / np.float32(rank**0.5)
            factors[block, projection] = LoraFactors(A, B, 0.5)
    adapter = Adapter(name, rank, rank / 2, False, PROJECTIONS, None, 0, factors)
    return pack_layer(adapter, config.blocks, precision)


def some_choices(vocab: int, count: int, random: np.random.Generator) -> tuple[Choice, ...]:
    """Choices of every kind, in turn."""
    tokens = random.permutation(vocab)[:9].astype(np.int32)
    numbers = [random.random(9, np.float32) for _ in range(3)]
    edits = Edits(tokens, numbers[0] * 4, 1 + numbers[1], numbers[2])
    mask = random.integers(0, 2**32, -(-vocab // 32), np.uint32)
    kinds: tuple[dict[str, Any], ...] = (
        {},
        {"temperature": 0.7, "top_p": 0.95},
        {"temperature": 1.0},
        {"temperature": 1.3, "top_k": 20, "top_p": 0.8, "min_p": 0.01},
        {"temperature": 0.9, "min_p": 0.1, "edits": edits},
        {"temperature": 1.0, "mask": mask, "edits": edits},
    )
    start = int(random.integers(len(kinds)))
    return tuple(Choice(uniform=random.random(), **kinds[(start + n) % len(kinds)]) for n in range(count))


def choice_examples() -> list[tuple[NDArray[np.float32], Choice]]:
    """Rows of logits from peaked to flat, with ties, and choices for them."""
    random = np.random.default_rng(11)
    rows = [random.standard_normal(1000, np.float32) * np.float32(size) for size in (0.0, 0.3, 2.0, 8.0)]
    rows += [np.round(rows[2]), rows[3][:37]]
    return [(row, choice) for row in rows for choice in some_choices(len(row), 12, random)]


def examples(threads: int = 2) -> list[Call]:
    """Steps without state: several sequences from their beginning, with and without layers."""
    calls: list[Call] = []
    cases: tuple[tuple[str, bool, Kind], ...] = (
        ("llama", True, "q8"),
        ("qwen2", False, "q4"),
        ("qwen3", True, "q8"),
        ("llama", False, "q4"),
        ("llama", True, "q4_0"),
    )
    for seed, (architecture, tied, kind) in enumerate(cases):
        random = np.random.default_rng(seed)
        config = small_config(architecture, tied=tied)
        model = NativeModel(small_model(config, kind, random), CONTEXT, threads)
        layers = [
            small_layer("a", config, 5, "float16", seed),
            small_layer("b", config, 16, "int8", seed),
            small_layer("c", config, 9, "float16", seed + 1),
        ]
        stacks = ((), ((layers[0], 1.0),), ((layers[1], 0.7), (layers[0], -0.4)), ((layers[2], 1.0),))
        chunks, blocks = [], 0
        for stack, count in zip(stacks, (1, 3, 37, 8), strict=True):
            needed = -(-count // BLOCK_TOKENS)
            tokens = random.integers(0, config.vocab, count).astype(np.intp)
            table = np.arange(blocks + needed - 1, blocks - 1, -1)
            wanted = min(count, 1 + seed)
            chunks.append(Chunk(tokens, 0, table, stack, wanted, some_choices(config.vocab, wanted, random)))
            blocks += needed
        calls.append((model, tuple(chunks), HalfCache(config.blocks, config.kv_heads, config.head_dim, blocks)))
        calls.append((model, tuple(chunks[:1]), HalfCache(config.blocks, config.kv_heads, config.head_dim, 1)))
    return calls
