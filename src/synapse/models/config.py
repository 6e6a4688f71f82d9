"""What a model looks like: its shape and its rotary position embedding, read from GGUF metadata and checked.

Key names: the GGUF specification (github.com/ggml-org/ggml, docs/gguf.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from synapse.models.errors import ModelFileCorrupt, UnsupportedModel

ARCHITECTURES = ("llama", "qwen2", "qwen3")
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

# Far beyond any real model, and small enough that a product of two of them cannot exhaust memory by itself.
LARGEST_DIMENSION = 2**20
LARGEST_CONTEXT = 2**31

Number = TypeVar("Number", int, float)


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary position embedding (Su et al. 2021), with the scalings that stretch it over longer contexts.

    Attributes:
        theta: the base of the frequencies.
        dimensions: how many dimensions of a head are rotated.
        kind: which scaling; ``linear`` divides positions, ``llama3`` divides each frequency by its own factor,
            ``yarn`` is Peng et al. 2023.
        factor: how many times longer than `original_context` the context became (linear, yarn).
        original_context: the context of the training before it was stretched, in tokens (yarn).
        frequency_factors: one divisor for each frequency (llama3).
        beta_fast, beta_slow: rotations over the original context above which a frequency is kept, and below which it
            is fully interpolated (yarn).
        attention_factor: multiplies YaRN's own attention scale.
    """

    theta: float
    dimensions: int
    kind: Literal["default", "linear", "llama3", "yarn"] = "default"
    factor: float = 1.0
    original_context: int = 0
    frequency_factors: tuple[float, ...] = ()
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0

    def inverse_frequencies(self) -> NDArray[np.float64]:
        """Radians per position, after scaling: float64[dimensions / 2], fastest first."""
        half = self.dimensions // 2
        plain = self.theta ** (-np.arange(half, dtype=np.float64) / half)
        match self.kind:
            case "linear":
                return plain / self.factor
            case "llama3":
                return plain / np.asarray(self.frequency_factors, dtype=np.float64)
            case "yarn":
                kept = 1.0 - self._interpolated_share(half)
                return plain * kept + plain / self.factor * (1.0 - kept)
            case _:
                return plain

    def _interpolated_share(self, half: int) -> NDArray[np.float64]:
        """YaRN's ramp: 0 for frequencies left alone, 1 for those fully interpolated."""

        def index_of(rotations: float) -> float:
            turns = self.original_context / (rotations * 2.0 * math.pi)
            return half * math.log(turns) / math.log(self.theta)

        low = max(math.floor(index_of(self.beta_fast)), 0)
        high = min(math.ceil(index_of(self.beta_slow)), self.dimensions - 1)
        span = high - low or 0.001
        return np.clip((np.arange(half, dtype=np.float64) - low) / span, 0.0, 1.0)

    def attention_scale(self) -> float:
        """What cos and sin are multiplied with: YaRN's 0.1 ln(factor) + 1 (times `attention_factor`), else 1."""
        if self.kind != "yarn":
            return 1.0
        return self.attention_factor * (0.1 * math.log(self.factor) + 1.0 if self.factor > 1.0 else 1.0)


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The shape of a Llama-family decoder.

    Attributes:
        architecture: ``llama`` (also Mistral and SmolLM), ``qwen2`` or ``qwen3``.
        name: what its makers call it, for people.
        blocks, hidden, intermediate, heads, kv_heads, head_dim, vocab: counts and widths.
        context: tokens it was made for.
        norm_eps: epsilon of the RMS norms.
        tied: the output head is the embedding.
        qkv_bias: the q, k and v projections have biases.
        qk_norm: q and k are RMS-normalised per head before the rotation.
    """

    architecture: str
    name: str
    blocks: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    context: int
    norm_eps: float
    rope: RopeConfig
    tied: bool
    qkv_bias: bool
    qk_norm: bool

    @property
    def kv_numbers(self) -> int:
        """How many numbers the keys and values of a token are."""
        return 2 * self.blocks * self.kv_heads * self.head_dim

    def linear_shape(self, projection: str) -> tuple[int, int]:
        """(out, in) of one of `PROJECTIONS`.

        Raises:
            KeyError: there is no projection of that name.
        """
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "q_proj": (queries, self.hidden),
            "k_proj": (keys, self.hidden),
            "v_proj": (keys, self.hidden),
            "o_proj": (self.hidden, queries),
            "gate_proj": (self.intermediate, self.hidden),
            "up_proj": (self.intermediate, self.hidden),
            "down_proj": (self.hidden, self.intermediate),
        }[projection]


class _Keys:
    """Metadata looked up by key, checked to have the type and range that a model can have."""

    def __init__(self, metadata: Mapping[str, object], architecture: str) -> None:
        self._metadata = metadata
        self._architecture = architecture

    def find(self, key: str) -> object | None:
        return self._metadata.get(f"{self._architecture}.{key}")

    def integer(self, key: str, default: int | None = None, *, largest: int = LARGEST_DIMENSION) -> int:
        return self._number(key, default, _as_integer, 1, largest)

    def real(self, key: str, default: float | None = None, *, smallest: float, largest: float) -> float:
        return self._number(key, default, _as_real, smallest, largest)

    def _number(
        self, key: str, default: Number | None, convert: Callable[[object], Number | None], low: Number, high: Number
    ) -> Number:
        value = self.find(key)
        if value is None:
            if default is None:
                raise ModelFileCorrupt(f"the metadata has no {self._architecture}.{key}")
            return default
        number = convert(value)
        if number is None or not low <= number <= high:
            raise ModelFileCorrupt(
                f"{self._architecture}.{key} must be between {low:g} and {high:g}, but is {str(value)[:40]}"
            )
        return number


def _as_integer(value: object) -> int | None:
    """The integer that this is, or that every block agrees on where a file gives one per block."""
    if isinstance(value, list) and value and all(item == value[0] for item in value):
        value = value[0]
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _as_real(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def read_config(
    metadata: Mapping[str, object], shapes: Mapping[str, tuple[int, ...]], rope_factors: tuple[float, ...]
) -> ModelConfig:
    """The configuration that the metadata and the tensors' names and shapes describe.

    Args:
        metadata: the GGUF key-value pairs.
        shapes: every tensor's shape, row-major.
        rope_factors: the values of ``rope_freqs.weight``, empty when there is no such tensor.

    Raises:
        ModelFileCorrupt: a key is missing, has the wrong type or range, or contradicts another or the tensors.
        UnsupportedModel: the file describes a model that no engine here runs; the message names what.
    """
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str):
        raise ModelFileCorrupt("the metadata has no general.architecture")
    if architecture not in ARCHITECTURES:
        raise UnsupportedModel(
            f"the architecture {architecture[:40]!r} is not supported",
            hint=f"supported are {', '.join(ARCHITECTURES)} (Llama, SmolLM2, Mistral, Qwen2, Qwen2.5, Qwen3)",
        )
    keys = _Keys(metadata, architecture)
    context = keys.integer("context_length", largest=LARGEST_CONTEXT)
    _refuse_unsupported(metadata, keys, context)

    hidden = keys.integer("embedding_length")
    heads = keys.integer("attention.head_count")
    kv_heads = keys.integer("attention.head_count_kv", heads)
    head_dim = keys.integer("attention.key_length", hidden // heads)
    if keys.integer("attention.value_length", head_dim) != head_dim:
        raise UnsupportedModel("keys and values of different widths are not supported")
    if heads % kv_heads or head_dim < 2 or head_dim % 2:
        raise ModelFileCorrupt(f"{heads} heads of width {head_dim} cannot share {kv_heads} key-value heads")
    name = metadata.get("general.name")
    return ModelConfig(
        architecture=architecture,
        name=name if isinstance(name, str) else architecture,
        blocks=keys.integer("block_count", largest=4096),
        hidden=hidden,
        intermediate=keys.integer("feed_forward_length"),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocab=_vocabulary(metadata, shapes),
        context=context,
        norm_eps=keys.real("attention.layer_norm_rms_epsilon", smallest=0.0, largest=1.0),
        rope=_rope(keys, head_dim, context, rope_factors),
        tied="output.weight" not in shapes,
        qkv_bias="blk.0.attn_q.bias" in shapes,
        qk_norm="blk.0.attn_q_norm.weight" in shapes,
    )


def _refuse_unsupported(metadata: Mapping[str, object], keys: _Keys, context: int) -> None:
    experts = keys.find("expert_count")
    if experts not in (None, 0):
        raise UnsupportedModel(f"mixture-of-experts models are not supported, and this one has {experts} experts")
    window = keys.find("attention.sliding_window")
    if isinstance(window, int) and 0 < window < context:
        raise UnsupportedModel(f"sliding-window attention is not supported, and this model has a window of {window}")
    parts = metadata.get("split.count")
    if isinstance(parts, int) and parts > 1:
        raise UnsupportedModel(
            f"this file is one part of {parts}", hint="join the parts first: llama-gguf-split --merge FIRST-PART OUT"
        )


def _vocabulary(metadata: Mapping[str, object], shapes: Mapping[str, tuple[int, ...]]) -> int:
    embedding = shapes.get("token_embd.weight")
    if embedding is None or len(embedding) != 2:
        raise ModelFileCorrupt("the file has no token embedding (token_embd.weight)")
    tokens = metadata.get("tokenizer.ggml.tokens")
    if isinstance(tokens, list) and len(tokens) != embedding[0]:
        raise ModelFileCorrupt(f"the tokenizer has {len(tokens)} tokens, but the embedding has {embedding[0]} rows")
    return embedding[0]


def _rope(keys: _Keys, head_dim: int, context: int, rope_factors: tuple[float, ...]) -> RopeConfig:
    dimensions = keys.integer("rope.dimension_count", head_dim)
    if dimensions != head_dim:
        raise UnsupportedModel(f"rotating {dimensions} of a head's {head_dim} dimensions is not supported")
    theta = keys.real("rope.freq_base", 10000.0, smallest=1.0001, largest=1e12)
    kind = keys.find("rope.scaling.type")
    if kind in (None, "none"):
        # Files from before rope.scaling.type say only this.
        kind = "none" if keys.find("rope.scale_linear") is None else "linear"
    if rope_factors:
        if kind != "none":
            raise UnsupportedModel(f"rope_freqs.weight together with {kind} rope scaling is not supported")
        if len(rope_factors) != dimensions // 2 or not all(0 < f < math.inf for f in rope_factors):
            raise ModelFileCorrupt(f"rope_freqs.weight must hold {dimensions // 2} positive factors")
        return RopeConfig(theta, dimensions, "llama3", frequency_factors=rope_factors)
    if kind == "none":
        return RopeConfig(theta, dimensions)
    if kind == "linear":
        old = keys.real("rope.scale_linear", 0.0, smallest=1e-6, largest=1e6)
        factor = keys.real("rope.scaling.factor", old or None, smallest=1e-6, largest=1e6)
        return RopeConfig(theta, dimensions, "linear", factor)
    if kind == "yarn":
        return RopeConfig(
            theta,
            dimensions,
            "yarn",
            factor=keys.real("rope.scaling.factor", smallest=1e-6, largest=1e6),
            original_context=keys.integer("rope.scaling.original_context_length", context, largest=LARGEST_CONTEXT),
            beta_fast=keys.real("rope.scaling.yarn_beta_fast", 32.0, smallest=1e-6, largest=1e6),
            beta_slow=keys.real("rope.scaling.yarn_beta_slow", 1.0, smallest=1e-6, largest=1e6),
            attention_factor=keys.real("rope.scaling.attn_factor", 1.0, smallest=1e-6, largest=1e6),
        )
    raise UnsupportedModel(
        f"the rope scaling {str(kind)[:40]!r} is not supported", hint="supported are linear, yarn and Llama 3's"
    )
