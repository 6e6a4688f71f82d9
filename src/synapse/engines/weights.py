"""A transformer's weights in float32, as the reference engine holds them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from synapse.models.config import PROJECTIONS, ModelConfig
from synapse.models.gguf_file import ModelFile

Array = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class BlockWeights:
    """One transformer block: `linear` has each projection's matrix, [out, in], and `bias` its vector, [out]."""

    attention_norm: Array
    ffn_norm: Array
    linear: dict[str, Array]
    bias: dict[str, Array]
    q_norm: Array | None
    k_norm: Array | None


@dataclass(frozen=True, slots=True)
class Weights:
    """The whole model. `embedding` and `output` are [vocab, hidden], and one array when they are tied."""

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


def load_weights(file: ModelFile) -> Weights:
    """Dequantise every tensor of a model file.

    Raises:
        ModelFileCorrupt: a tensor is missing or is not what the file says it is.
    """
    config = file.config
    embedding = file.embedding()
    return Weights(
        config=config,
        embedding=embedding,
        output=embedding if config.tied else file.output(),
        output_norm=file.output_norm(),
        blocks=tuple(_load_block(file, config, index) for index in range(config.blocks)),
    )


def _load_block(file: ModelFile, config: ModelConfig, index: int) -> BlockWeights:
    biases = {"q_proj": "q_bias", "k_proj": "k_bias", "v_proj": "v_bias"} if config.qkv_bias else {}
    return BlockWeights(
        attention_norm=file.weight(index, "attention_norm"),
        ffn_norm=file.weight(index, "ffn_norm"),
        linear={projection: file.weight(index, projection) for projection in PROJECTIONS},
        bias={projection: file.weight(index, part) for projection, part in biases.items()},
        q_norm=file.weight(index, "q_norm") if config.qk_norm else None,
        k_norm=file.weight(index, "k_norm") if config.qk_norm else None,
    )
