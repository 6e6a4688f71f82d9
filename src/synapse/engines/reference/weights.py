"""A transformer's weights, as the reference engine holds them: all in float32, or packed and unpacked when used."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from synapse.engines.native.packed.model import PackedModel
from synapse.models.config import PROJECTIONS, ModelConfig
from synapse.models.gguf_file import PARTS, ModelFile

Array = NDArray[np.float32]

LOGIT_ROWS = 4096
"""Rows of a packed output head that are in float32 at a time."""


@dataclass(frozen=True, slots=True)
class BlockWeights:
    """One transformer block: `linear` has each projection's matrix, [out, in], and `bias` its vector, [out]."""

    attention_norm: Array
    ffn_norm: Array
    linear: Mapping[str, Array]
    bias: dict[str, Array]
    q_norm: Array | None
    k_norm: Array | None


class Weights(Protocol):
    """The whole model. `bytes` is the memory of all its arrays."""

    @property
    def config(self) -> ModelConfig: ...

    @property
    def output_norm(self) -> Array: ...

    @property
    def blocks(self) -> Sequence[BlockWeights]: ...

    @property
    def bytes(self) -> int: ...

    def embed(self, tokens: NDArray[np.intp]) -> Array:
        """The embeddings of tokens, a fresh float32[len(tokens), hidden]."""

    def logits(self, x: Array) -> Array:
        """The output head: x [rows, hidden] -> [rows, vocab]."""


@dataclass(frozen=True, slots=True)
class FloatWeights:
    """Every weight in float32. `embedding` and `output` are [vocab, hidden], and one array when they are tied."""

    config: ModelConfig
    embedding: Array
    output: Array
    output_norm: Array
    blocks: tuple[BlockWeights, ...]

    @property
    def bytes(self) -> int:
        """Memory of all arrays, in bytes."""
        arrays = [self.embedding, self.output_norm]
        if self.output is not self.embedding:
            arrays.append(self.output)
        for block in self.blocks:
            arrays += [block.attention_norm, block.ffn_norm, *block.linear.values(), *block.bias.values()]
        return sum(array.nbytes for array in arrays)

    def embed(self, tokens: NDArray[np.intp]) -> Array:
        return self.embedding[tokens]

    def logits(self, x: Array) -> Array:
        logits: Array = x @ self.output.T
        return logits


class PackedWeights:
    """The weights of a packed model; a matrix is in float32 only while it is used."""

    def __init__(self, model: PackedModel) -> None:
        self.config = model.config
        self.bytes = model.bytes
        self.output_norm: Array = model.array("output_norm.weight")
        self.blocks = tuple(_packed_block(model, index) for index in range(self.config.blocks))
        self._model = model
        self._output = "token_embd.weight" if self.config.tied else "output.weight"

    def embed(self, tokens: NDArray[np.intp]) -> Array:
        return self._model.rows("token_embd.weight", tokens)

    def logits(self, x: Array) -> Array:
        logits = np.empty((len(x), self.config.vocab), np.float32)
        for first in range(0, self.config.vocab, LOGIT_ROWS):
            last = min(first + LOGIT_ROWS, self.config.vocab)
            np.matmul(x, self._model.matrix(self._output, first, last).T, out=logits[:, first:last])
        return logits


def load_weights(file: ModelFile) -> FloatWeights:
    """Dequantise every tensor of a model file.

    Raises:
        ModelFileCorrupt: a tensor is missing or is not what the file says it is.
    """
    config = file.config
    embedding = file.embedding()
    return FloatWeights(
        config=config,
        embedding=embedding,
        output=embedding if config.tied else file.output(),
        output_norm=file.output_norm(),
        blocks=tuple(_load_block(file, index) for index in range(config.blocks)),
    )


def packed_weights(model: PackedModel) -> PackedWeights:
    """The weights of a packed model, which must stay open: a matrix is in float32 only while it is used."""
    return PackedWeights(model)


class _PackedLinear(Mapping[str, Array]):
    """The matrices of a block by projection, unpacked when asked for."""

    def __init__(self, model: PackedModel, index: int) -> None:
        self._model = model
        self._index = index

    def __getitem__(self, projection: str) -> Array:
        return self._model.matrix(f"blk.{self._index}.{PARTS[projection]}")

    def __iter__(self) -> Iterator[str]:
        return iter(PROJECTIONS)

    def __len__(self) -> int:
        return len(PROJECTIONS)


def _load_block(file: ModelFile, index: int) -> BlockWeights:
    linear = {projection: file.weight(index, projection) for projection in PROJECTIONS}
    return _block(file.config, linear, lambda part: file.weight(index, part))


def _packed_block(model: PackedModel, index: int) -> BlockWeights:
    return _block(model.config, _PackedLinear(model, index), lambda part: model.array(f"blk.{index}.{PARTS[part]}"))


def _block(config: ModelConfig, linear: Mapping[str, Array], vector: Callable[[str], Array]) -> BlockWeights:
    biases = {"q_proj": "q_bias", "k_proj": "k_bias", "v_proj": "v_bias"} if config.qkv_bias else {}
    return BlockWeights(
        attention_norm=vector("attention_norm"),
        ffn_norm=vector("ffn_norm"),
        linear=linear,
        bias={projection: vector(part) for projection, part in biases.items()},
        q_norm=vector("q_norm") if config.qk_norm else None,
        k_norm=vector("k_norm") if config.qk_norm else None,
    )
