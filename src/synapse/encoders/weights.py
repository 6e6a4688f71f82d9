"""An encoder's weights as the engine holds them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from synapse.encoders.linear import Linear, LinearMaker
from synapse.models.encoder.config import EncoderConfig
from synapse.models.encoder.file import EncoderFile

Array = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Norm:
    """Weight and bias of a layer norm, each [hidden]."""

    weight: Array
    bias: Array


@dataclass(frozen=True, slots=True)
class EncoderBlock:
    """One block. `qkv` is query, key and value in one map, [hidden] -> [3 x hidden]."""

    qkv: Linear
    attention_output: Linear
    attention_norm: Norm
    up: Linear
    down: Linear
    output_norm: Norm


@dataclass(frozen=True, slots=True)
class EncoderWeights:
    """The whole encoder.

    Attributes:
        words: [vocab, hidden].
        positions: [positions, hidden]; the embedding of the only token type that a single text has is added already.
    """

    config: EncoderConfig
    words: Array
    positions: Array
    embedding_norm: Norm
    blocks: tuple[EncoderBlock, ...]


def load_encoder_weights(file: EncoderFile, linear: LinearMaker) -> EncoderWeights:
    """Read every tensor of an encoder, its linear maps through `linear`.

    Raises:
        ModelFileCorrupt: a tensor holds numbers that are not finite.
    """
    return EncoderWeights(
        config=file.config,
        words=file.embedding("word"),
        positions=file.embedding("position") + file.embedding("token_type")[0],
        embedding_norm=Norm(*file.embedding_norm()),
        blocks=tuple(_load_block(file, index, linear) for index in range(file.config.blocks)),
    )


def _load_block(file: EncoderFile, index: int, linear: LinearMaker) -> EncoderBlock:
    weights, biases = zip(*(file.part(index, name) for name in ("query", "key", "value")), strict=True)
    return EncoderBlock(
        qkv=linear(np.concatenate(weights), np.concatenate(biases)),
        attention_output=linear(*file.part(index, "attention_output")),
        attention_norm=Norm(*file.part(index, "attention_norm")),
        up=linear(*file.part(index, "up")),
        down=linear(*file.part(index, "down")),
        output_norm=Norm(*file.part(index, "output_norm")),
    )
