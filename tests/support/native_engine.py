"""The compiled kernel of the engine, kept between runs, and what feeds it step by step without an `Engine`."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from numpy.typing import NDArray

from support.pattern_kernel import kernel_build
from synapse.engines.cache.blocks import BLOCK_TOKENS
from synapse.engines.native.cache import HalfCache
from synapse.engines.native.examples import CONTEXT, small_config, small_model
from synapse.engines.native.kernel import KERNEL
from synapse.engines.native.model import NativeModel
from synapse.engines.native.packed.model import PackedModel
from synapse.engines.native.packed.packing import Kind
from synapse.engines.reference.lora import Stack
from synapse.engines.reference.transformer import Cache, Chunk, ReferenceTransformer, StepLogits
from synapse.engines.reference.weights import PackedWeights
from synapse.hotpath.paths import ready
from synapse.kernels.checks import FOLDER, load_build
from synapse.kernels.compiler import CompilerMissing
from synapse.kernels.spec import KernelBuild
from synapse.models.adapters.adapter import Adapter, LoraFactors
from synapse.models.config import PROJECTIONS, ModelConfig
from synapse.models.gguf_file import PARTS

Logits = NDArray[np.float32]
Forward = Callable[[Sequence[Chunk], Any], StepLogits]
PATIENCE = 100.0
"""Seconds that a busy machine gets to test a new build in another process and to burn it in."""


def engine_build() -> KernelBuild:
    """The kernel, compiled by the first run that needs it."""
    try:
        return kernel_build(KERNEL)
    except CompilerMissing as error:
        pytest.skip(error.message)


@cache
def engine_library() -> ctypes.CDLL:
    """The kernel, opened in this process without a hot path."""
    build = engine_build()
    return load_build(KERNEL, build, build.path.parent)


def put_kernel(home: Path) -> Path:
    """A home whose cache of kernels has the build, and knows that it has passed its checks."""
    build = engine_build()
    engine_library()
    folder = home / FOLDER
    shutil.copytree(build.path.parent / "passed", folder / "passed")
    shutil.copy2(build.path, folder)
    return home


@contextmanager
def living_in(home: Path) -> Iterator[None]:
    """The kernel answers inside: for fixtures of a session or module, which no test's environment reaches."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SYNAPSE_HOME", str(home))
        patch.delenv("SYNAPSE_FORCE_PYTHON", raising=False)
        wait_until_ready()
        yield


def wait_until_ready() -> None:
    """Fails when the kernel does not answer in this process."""
    state = ready("engine", PATIENCE)
    assert state.native, state.why


def tiny_native(
    architecture: str = "llama",
    *,
    kind: Kind = "q8",
    tied: bool = True,
    threads: int = 1,
    context: int = CONTEXT,
    seed: int = 0,
    **shape: Any,
) -> NativeModel:
    """A random model in memory; `shape` are fields of `ModelConfig`."""
    config = replace(small_config(architecture, tied=tied), context=context, **shape)
    return NativeModel(small_model(config, kind, np.random.default_rng(seed)), context, threads)


def tiny_adapter(
    config: ModelConfig,
    *,
    rank: int = 8,
    seed: int = 0,
    targets: Iterable[tuple[int, str]] | None = None,
    size: float = 1.0,
    dtype: type[np.float16] | type[np.float32] = np.float32,
) -> Adapter:
    """A layer with random factors of the given linear maps (all, when left out), as large as the model's weights."""
    random = np.random.default_rng(seed)
    if targets is None:
        targets = [(block, projection) for block in range(config.blocks) for projection in PROJECTIONS]
    factors = {}
    for block, projection in targets:
        out, width = config.linear_shape(projection)
        A = random.standard_normal((rank, width)) / width**0.5
        B = random.standard_normal((out, rank)) / rank**0.5 * size
        factors[block, projection] = LoraFactors(A.astype(dtype), B.astype(dtype), 0.5)
    return Adapter(f"{config.hidden}-{rank}-{seed}-{size}", rank, rank / 2, False, PROJECTIONS, None, 0, factors)


def new_cache(model: NativeModel, blocks: int = 64) -> HalfCache:
    """An empty KV cache for a model."""
    config = model.packed.config
    return HalfCache(config.blocks, config.kv_heads, config.head_dim, blocks)


def by_kernel(model: NativeModel) -> Forward:
    """What computes steps: the kernel."""
    return lambda chunks, cache: model.compute(engine_library(), chunks, cache)


def some_tokens(config: ModelConfig, count: int, seed: int = 0) -> NDArray[np.intp]:
    """Random tokens."""
    return np.random.default_rng(seed).integers(0, config.vocab, count)


def pieces(tokens: NDArray[np.intp], table: Sequence[int], sizes: Iterable[int] = (), stack: Stack = ()) -> list[Chunk]:
    """A sequence in chunks of these sizes, and the rest in one; the logits of all its tokens are wanted."""
    chunks, start = [], 0
    for size in (*sizes, len(tokens)):
        here = tokens[start : start + size]
        if len(here):
            chunks.append(Chunk(here, start, np.asarray(table, np.intp), stack, len(here)))
            start += len(here)
    assert start <= len(table) * BLOCK_TOKENS
    return chunks


def feed(forward: Forward, cache: Cache, *sequences: Sequence[Chunk]) -> list[Logits]:
    """Compute sequences side by side, a chunk of each a step, and return the logits of each, [tokens, vocab]."""
    found: list[list[Logits]] = [[] for _ in sequences]
    for step in range(max(map(len, sequences))):
        here = [(n, chunks[step]) for n, chunks in enumerate(sequences) if step < len(chunks)]
        answer, first = forward([chunk for _, chunk in here], cache), 0
        for n, chunk in here:
            found[n].append(answer.values[first : first + chunk.wanted].copy())
            first += chunk.wanted
    return [np.concatenate(logits) for logits in found]


def distances(found: Logits, expected: Logits) -> NDArray[np.float64]:
    """How far each row is from the expected one, as a share of the spread of that."""
    spread = np.linalg.norm(expected - expected.mean(axis=1, keepdims=True), axis=1)
    return np.asarray(np.linalg.norm(found - expected, axis=1) / spread, np.float64)


def divergences(found: Logits, expected: Logits) -> NDArray[np.float64]:
    """The Kullback-Leibler divergence of each row from the expected one, in nats."""
    q, p = log_softmax(found), log_softmax(expected)
    return np.asarray((np.exp(p) * (p - q)).sum(axis=1), np.float64)


def log_softmax(logits: Logits) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))


def resident_bytes() -> int:
    """Memory of this process that is in RAM."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class _RoundedMap:
    """A linear map whose inputs are rounded first, in the place of its matrix: `x @ map.T`."""

    __array_ufunc__ = None

    def __init__(self, matrix: Logits, steps: int) -> None:
        self._matrix = matrix
        self._steps = steps

    @property
    def T(self) -> _RoundedMap:  # noqa: N802 (as NumPy calls it)
        return self

    def __rmatmul__(self, x: Logits) -> Logits:
        return np.asarray(rounded(x, self._steps) @ self._matrix.T)


class _RoundingWeights(PackedWeights):
    """Packed weights as the kernel uses them: with inputs rounded to 8 bits where it has 4-bit weights, else 16."""

    def __init__(self, model: PackedModel) -> None:
        super().__init__(model)
        self._packed = model
        self.blocks = tuple(
            replace(block, linear={name: self._map(f"blk.{index}.{PARTS[name]}") for name in PROJECTIONS})
            for index, block in enumerate(self.blocks)
        )

    def _map(self, name: str) -> Any:
        return _RoundedMap(self._packed.matrix(name), 127 if self._packed.kind(name) != "q8" else 32767)

    def logits(self, x: Logits) -> Logits:
        found: Logits = x @ self._map("token_embd.weight" if self.config.tied else "output.weight").T
        return found


def rounded(x: Logits, steps: int) -> Logits:
    """Numbers rounded to so many steps of the largest in each block of 32."""
    blocks = np.pad(x, ((0, 0), (0, -x.shape[1] % 32))).reshape(len(x), -1, 32)
    top = np.abs(blocks).max(axis=2, keepdims=True)
    scale = np.maximum(top, np.float32(1e-30)) / np.float32(steps)
    return np.asarray((np.rint(blocks / scale) * scale).reshape(len(x), -1)[:, : x.shape[1]], np.float32)


def rounding_reference(model: NativeModel) -> ReferenceTransformer:
    """The reference with the kernel's rounding of activations: what is left is the order of sums.

    Where that turns over a rounding, a number moves by one step; on a small model this shows.
    """
    return ReferenceTransformer(_RoundingWeights(model.packed), model.context)


def write_adapter(folder: Path, adapter: Adapter, dtype: Literal["F32", "F16", "BF16"] = "F32") -> Path:
    """Write a layer as PEFT does, in one of the types that are read."""
    import torch
    from safetensors.torch import save_file

    types = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    tensors = {}
    for (block, projection), factors in adapter.factors.items():
        part = "self_attn" if projection in ("q_proj", "k_proj", "v_proj", "o_proj") else "mlp"
        name = f"base_model.model.model.layers.{block}.{part}.{projection}"
        for letter, factor in (("A", factors.A), ("B", factors.B)):
            tensors[f"{name}.lora_{letter}.weight"] = torch.from_numpy(factor).to(types[dtype])
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    targets = sorted({projection for _, projection in adapter.factors})
    said = {"peft_type": "LORA", "r": adapter.rank, "lora_alpha": adapter.alpha, "target_modules": targets}
    (folder / "adapter_config.json").write_text(json.dumps(said | {"bias": "none"}))
    return folder
