"""The reference transformer: the forward pass of a Llama-family model in NumPy, float32.

It is the specification that native kernels must agree with, so it is written to be read. The architecture is that of
Llama (RMSNorm, rotary embedding, grouped-query attention, SwiGLU) with what Qwen2 (biases of q, k and v) and Qwen3
(RMSNorm of every query and key head) add to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from synapse.engines.cache.blocks import BLOCK_TOKENS, KVCache
from synapse.engines.choice import UNDECIDED, Choice
from synapse.engines.reference.lora import Layer, LoraGroup, Stack, add_lora, group_by_layer, lora_layer
from synapse.engines.reference.weights import BlockWeights, Weights
from synapse.errors import Unavailable
from synapse.models.adapters.adapter import Adapter
from synapse.models.config import ModelConfig

Array = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Chunk:
    """The part of one sequence that a step computes: `tokens` at positions start, start + 1, …

    Attributes:
        table: the sequence's KV blocks, with room for start + len(tokens) tokens.
        stack: the sequence's layers and their weights.
        wanted: how many of the last tokens need logits: 0, 1, or all of them.
        choices: how the token after each of the wanted is chosen; none if nobody asks.
    """

    tokens: NDArray[np.intp]
    start: int
    table: NDArray[np.intp]
    stack: Stack
    wanted: int
    choices: tuple[Choice, ...] = ()

    @property
    def end(self) -> int:
        return self.start + len(self.tokens)

    def slots(self) -> NDArray[np.intp]:
        """Where in the KV cache each token goes."""
        positions = np.arange(self.start, self.end)
        slots: NDArray[np.intp] = self.table[positions // BLOCK_TOKENS] * BLOCK_TOKENS + positions % BLOCK_TOKENS
        return slots


@dataclass(frozen=True, slots=True)
class StepLogits:
    """The logits of the wanted tokens of a step, chunk after chunk. Valid until the next step.

    Attributes:
        values: float32[n, vocab].
        finite: bool[n]: whether all of a row are finite.
        chosen: int32[n]: the next token by each row's `Choice`; UNDECIDED where it has to be chosen from the logits.
    """

    values: Array
    finite: NDArray[np.bool_]
    chosen: NDArray[np.int32]


CacheT = TypeVar("CacheT")


class Cache(Protocol):
    """Where keys and values are kept; see `KVCache`."""

    def write(self, layer: int, slots: NDArray[np.intp], keys: Array, values: Array) -> None: ...

    def read(self, layer: int, table: NDArray[np.intp], length: int) -> tuple[Array, Array]: ...

    def close(self) -> None: ...


class Transformer(Protocol, Generic[CacheT]):
    """The model behind the batch: weights that never change, and what computes with them."""

    @property
    def config(self) -> ModelConfig: ...

    @property
    def context(self) -> int:
        """Longest sequence, in tokens."""

    @property
    def weight_bytes(self) -> int:
        """Memory of the weights."""

    @property
    def kv_token_bytes(self) -> int:
        """Memory of the keys and values of one token."""

    def new_cache(self, blocks: int) -> CacheT:
        """An empty KV cache of so many blocks."""

    def prepare(self, adapter: Adapter) -> Layer:
        """A checked LoRA layer in the form that `forward` uses."""

    def forward(self, chunks: Sequence[Chunk], cache: CacheT) -> StepLogits:
        """Compute one step for all sequences together, and remember their keys and values in `cache`.

        Numbers that overflow (a layer may hold any finite weight) stay in their own sequence, and show in its logits.
        """

    def close(self) -> None:
        """Give back weights, threads and files."""


class ReferenceTransformer:
    """The reference: see `Transformer`, whose methods these are."""

    def __init__(self, weights: Weights, context: int) -> None:
        self.config = weights.config
        self.context = context
        self.weight_bytes = weights.bytes
        self._weights: Weights | None = weights
        angles = np.outer(np.arange(context), self.config.rope.inverse_frequencies())
        scale = self.config.rope.attention_scale()
        self.cos = (np.cos(angles) * scale).astype(np.float32)
        self.sin = (np.sin(angles) * scale).astype(np.float32)

    @property
    def kv_token_bytes(self) -> int:
        """Keys and values are float32."""
        return self.config.kv_numbers * 4

    def new_cache(self, blocks: int) -> KVCache:
        """An empty KV cache of so many blocks."""
        return KVCache(self.config.blocks, self.config.kv_heads, self.config.head_dim, blocks)

    def prepare(self, adapter: Adapter) -> Layer:
        """A layer in float32."""
        return lora_layer(adapter)

    def close(self) -> None:
        """Let go of the weights."""
        self._weights = None

    @np.errstate(over="ignore", invalid="ignore")
    def forward(self, chunks: Sequence[Chunk], cache: Cache) -> StepLogits:
        """One step; see `Transformer.forward`.

        Raises:
            Unavailable: the engine is closed.
        """
        config, weights = self.config, self._weights
        if weights is None:
            raise Unavailable("the engine is closed", hint="open it again")
        positions = np.concatenate([np.arange(chunk.start, chunk.end) for chunk in chunks])
        slots = np.concatenate([chunk.slots() for chunk in chunks])
        cos, sin = self.cos[positions][:, None], self.sin[positions][:, None]
        groups = group_by_layer([(chunk.stack, len(chunk.tokens)) for chunk in chunks])
        rows = len(positions)

        x = weights.embed(np.concatenate([chunk.tokens for chunk in chunks]))
        for index, block in enumerate(weights.blocks):
            h = rms_norm(x, block.attention_norm, config.norm_eps)
            q = linear(h, block, groups, index, "q_proj").reshape(rows, config.heads, config.head_dim)
            k = linear(h, block, groups, index, "k_proj").reshape(rows, config.kv_heads, config.head_dim)
            v = linear(h, block, groups, index, "v_proj").reshape(rows, config.kv_heads, config.head_dim)
            if block.q_norm is not None and block.k_norm is not None:
                q, k = rms_norm(q, block.q_norm, config.norm_eps), rms_norm(k, block.k_norm, config.norm_eps)
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
            cache.write(index, slots, k, v)
            x += linear(attend_all(q, chunks, cache, index), block, groups, index, "o_proj")
            h = rms_norm(x, block.ffn_norm, config.norm_eps)
            gate, up = linear(h, block, groups, index, "gate_proj"), linear(h, block, groups, index, "up_proj")
            x += linear(silu(gate) * up, block, groups, index, "down_proj")

        x = x[_wanted_rows(chunks)]
        logits = weights.logits(rms_norm(x, weights.output_norm, config.norm_eps))
        return StepLogits(logits, np.isfinite(logits.sum(axis=1)), np.full(len(logits), UNDECIDED, np.int32))


def linear(x: Array, block: BlockWeights, groups: Sequence[LoraGroup], index: int, projection: str) -> Array:
    """A linear map with its bias and layers: x [rows, in] -> [rows, out]."""
    y: Array = x @ block.linear[projection].T
    if projection in block.bias:
        y += block.bias[projection]
    add_lora(y, x, groups, index, projection)
    return y


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """Root mean square normalisation over the last axis (Zhang and Sennrich, 2019, arXiv:1910.07467)."""
    mean_square = np.einsum("...i,...i->...", x, x)[..., None] / np.float32(x.shape[-1])
    normed: Array = x / np.sqrt(mean_square + np.float32(eps)) * weight
    return normed


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """Rotary position embedding of x [rows, heads, head_dim], in the half-split convention of Hugging Face.

    Dimension i turns with dimension i + d/2 by the angle of their position (Su et al., 2021, arXiv:2104.09864), where
    d = 2 x cos.shape[-1] may be less than head_dim; what lies beyond d is left as it is.
    """
    half = cos.shape[-1]
    a, b = x[..., :half], x[..., half : 2 * half]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin, x[..., 2 * half :]], axis=-1)


def silu(x: Array) -> Array:
    """x / (1 + exp(-x)); exp overflowing to infinity for very negative x gives the right zero."""
    y: Array = x / (1 + np.exp(-x))
    return y


def attend_all(q: Array, chunks: Sequence[Chunk], cache: Cache, index: int) -> Array:
    """Attention of every chunk over its own sequence: q [rows, heads, head_dim] -> [rows, heads x head_dim]."""
    out = np.empty((q.shape[0], q.shape[1] * q.shape[2]), np.float32)
    first = 0
    for chunk in chunks:
        last = first + len(chunk.tokens)
        blocks = -(-chunk.end // BLOCK_TOKENS)
        keys, values = cache.read(index, chunk.table[:blocks], chunk.end)
        out[first:last] = attend(q[first:last], keys, values, chunk.start)
        first = last
    return out


def attend(q: Array, keys: Array, values: Array, start: int) -> Array:
    """Causal grouped-query attention of one sequence (Ainslie et al., 2023, arXiv:2305.13245).

    Args:
        q: [n, heads, head_dim], the queries at positions start … start + n - 1.
        keys, values: [kv_heads, start + n, head_dim].

    Returns:
        [n, heads x head_dim].
    """
    n, heads, head_dim = q.shape
    kv_heads, length, _ = keys.shape
    grouped = q.reshape(n, kv_heads, heads // kv_heads, head_dim).transpose(1, 2, 0, 3).reshape(kv_heads, -1, head_dim)
    scores: Array = grouped @ keys.transpose(0, 2, 1)
    scores *= np.float32(head_dim**-0.5)
    if n > 1:
        future = np.arange(length) > np.arange(start, start + n)[:, None]
        scores.reshape(kv_heads, -1, n, length)[..., future] = -np.inf
    scores -= scores.max(axis=-1, keepdims=True)
    np.exp(scores, out=scores)
    scores /= scores.sum(axis=-1, keepdims=True)
    mixed: Array = (scores @ values).reshape(kv_heads, heads // kv_heads, n, head_dim)
    return mixed.transpose(2, 0, 1, 3).reshape(n, heads * head_dim)


def _wanted_rows(chunks: Sequence[Chunk]) -> NDArray[np.intp]:
    rows, end = [], 0
    for chunk in chunks:
        end += len(chunk.tokens)
        rows.append(np.arange(end - chunk.wanted, end))
    return np.concatenate(rows)
