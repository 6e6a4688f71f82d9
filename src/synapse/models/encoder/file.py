"""Opening an encoder: a folder as sentence-transformers or transformers writes it, checked before anything is used.

Names of tensors are those of transformers' `BertModel` and `XLMRobertaModel`. The folder comes from a stranger: sizes
are bounded, every claim of its files is checked against the others, and pickle files are never opened.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from mmap import mmap
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from synapse.errors import NotFound
from synapse.kernels.mapped_file import MappedFile
from synapse.models.adapters.errors import LayerCorrupt, LayerRefused
from synapse.models.encoder.config import (
    EncoderConfig,
    read_encoder_config,
)
from synapse.models.encoder.names import WEIGHTS_FILE
from synapse.models.encoder.tokenizer import (
    EncoderTokenizer,
    load_encoder_tokenizer,
)
from synapse.models.errors import ModelFileCorrupt, UnsupportedModel
from synapse.models.safetensors_file import ITEM_BYTES, TensorSlot, read_header, read_tensor

PICKLE_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".pkl", ".ckpt"})
PREFIXES = ("", "bert.", "roberta.")
"""Heads for other tasks put the encoder one level deeper."""
WEIGHT_TYPES: Mapping[str, int] = {**ITEM_BYTES, "I64": 8}
"""I64 is the type of `position_ids`, a buffer that older versions of transformers saved and nobody needs."""
UNUSED_PREFIXES = ("pooler.", "cls.", "lm_head.", "embeddings.position_ids", "embeddings.token_type_ids")
"""Tensors that are not part of the encoder: heads for its training, and buffers."""

LINEAR_PARTS = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "attention_output": "attention.output.dense",
    "up": "intermediate.dense",
    "down": "output.dense",
}
NORM_PARTS = {"attention_norm": "attention.output.LayerNorm", "output_norm": "output.LayerNorm"}
"""The parts of a block, and what they are called after ``encoder.layer.N.``; each has a weight and a bias."""
EMBEDDINGS = ("word", "position", "token_type")


class EncoderFile:
    """An open encoder. The weights are memory-mapped, so the folder must not change while this object lives.

    Attributes:
        folder: where it is.
        config: what it looks like.
        tokenizer: what turns texts into its token ids.
        weight_bytes: memory of its weights in float32.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config: EncoderConfig = read_encoder_config(folder)
        self._data = _map_weights(folder)
        self._slots = _read_slots(self._data.memory)
        _check_shapes(self.config, self._slots)
        self.weight_bytes = sum(4 * prod(shape) for shape in _expected_shapes(self.config).values())
        self.tokenizer: EncoderTokenizer = load_encoder_tokenizer(folder, self.config)

    def embedding(self, which: str) -> NDArray[np.float32]:
        """One of `EMBEDDINGS`: float32[vocab, positions or token types, hidden].

        Raises:
            ModelFileCorrupt: it holds numbers that are not finite.
        """
        return self._tensor(f"embeddings.{which}_embeddings.weight")

    def embedding_norm(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Weight and bias of the layer norm after the embeddings, each float32[hidden]."""
        return self._tensor("embeddings.LayerNorm.weight"), self._tensor("embeddings.LayerNorm.bias")

    def part(self, block: int, name: str) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Weight and bias of one of `LINEAR_PARTS` ([out, in] and [out]) or `NORM_PARTS` (both [hidden])."""
        prefix = _part_name(block, name)
        return self._tensor(f"{prefix}.weight"), self._tensor(f"{prefix}.bias")

    def _tensor(self, name: str) -> NDArray[np.float32]:
        values = read_tensor(self._data.memory, self._slots[name])
        if self._data.lost:
            raise ModelFileCorrupt(f"{WEIGHTS_FILE} was cut short while it was open", hint="get the model again")
        if not np.isfinite(values).all():
            raise ModelFileCorrupt(f"{WEIGHTS_FILE}: the tensor {name} holds NaN or infinite values")
        return values


def open_encoder_file(folder: Path, name: str | None = None) -> EncoderFile:
    """Open the encoder in a folder and check all of it but the weights' values.

    Args:
        name: what errors call it; the folder's name when left out.

    Raises:
        NotFound: there is no such folder.
        ModelFileCorrupt: a file is missing, truncated, altered, or contradicts another.
        UnsupportedModel: it describes something that no engine here runs.
    """
    if not folder.is_dir():
        raise NotFound(f"there is no folder {folder}", hint="give the folder that save_pretrained wrote")
    try:
        return EncoderFile(folder)
    except (ModelFileCorrupt, UnsupportedModel) as error:
        raise type(error)(f"{name or folder.name}: {error.message}", hint=error.hint, path=str(folder)) from error


def _map_weights(folder: Path) -> MappedFile:
    path = folder / WEIGHTS_FILE
    try:
        with path.open("rb") as file:
            return MappedFile(file)
    except FileNotFoundError as error:
        pickles = sorted(each.name for each in folder.iterdir() if each.suffix in PICKLE_SUFFIXES)
        if pickles:
            raise UnsupportedModel(
                f"{pickles[0]} is a pickle file, which can run any code when it is opened; only safetensors are read",
                hint="save it again with transformers: AutoModel.from_pretrained(…).save_pretrained(FOLDER)",
            ) from error
        raise ModelFileCorrupt(
            f"{WEIGHTS_FILE} is missing", hint="weights in several files are not supported"
        ) from error
    except (OSError, ValueError) as error:  # ValueError: it is empty
        raise ModelFileCorrupt(f"{WEIGHTS_FILE} cannot be read: {error}") from error


def _read_slots(data: mmap) -> dict[str, TensorSlot]:
    """The tensors of the encoder itself, by their names without a prefix."""
    try:
        slots = read_header(data, WEIGHT_TYPES)
    except LayerRefused as error:
        kind = ModelFileCorrupt if isinstance(error, LayerCorrupt) else UnsupportedModel
        raise kind(f"{WEIGHTS_FILE}: {error.message}", hint=error.hint) from error
    prefix = next((each for each in PREFIXES if f"{each}embeddings.word_embeddings.weight" in slots), "")
    found = {}
    for name, slot in slots.items():
        plain = name.removeprefix(prefix)
        if plain.startswith(UNUSED_PREFIXES):
            continue
        if plain in found:
            raise ModelFileCorrupt(f"{WEIGHTS_FILE}: the tensor {plain:.80} is there twice")
        found[plain] = slot
    return found


def _check_shapes(config: EncoderConfig, slots: Mapping[str, TensorSlot]) -> None:
    """Every tensor that the configuration needs is there with its shape, and none is left over."""
    expected = _expected_shapes(config)
    for name, shape in expected.items():
        if name not in slots:
            raise ModelFileCorrupt(f"{WEIGHTS_FILE}: the tensor {name} is missing")
        slot = slots[name]
        if slot.shape != shape or slot.dtype not in ITEM_BYTES:
            raise ModelFileCorrupt(
                f"{WEIGHTS_FILE}: the tensor {name} must have the shape {list(shape)}, but is {slot.dtype}"
                f" {list(slot.shape)}"
            )
    extra = sorted(slots.keys() - expected.keys())
    if extra:
        raise UnsupportedModel(f"{config.architecture} encoders have no tensor {extra[0][:80]}, but this one does")


def _expected_shapes(config: EncoderConfig) -> dict[str, tuple[int, ...]]:
    hidden, intermediate = config.hidden, config.intermediate
    rows = dict(zip(EMBEDDINGS, (config.vocab, config.positions, config.token_types), strict=True))
    shapes: dict[str, tuple[int, ...]] = {
        f"embeddings.{which}_embeddings.weight": (count, hidden) for which, count in rows.items()
    }
    shapes |= {f"embeddings.LayerNorm.{kind}": (hidden,) for kind in ("weight", "bias")}
    for block in range(config.blocks):
        for name in LINEAR_PARTS:
            width = intermediate if name == "up" else hidden
            shapes[f"{_part_name(block, name)}.weight"] = (width, intermediate if name == "down" else hidden)
            shapes[f"{_part_name(block, name)}.bias"] = (width,)
        for name in NORM_PARTS:
            shapes |= {f"{_part_name(block, name)}.{kind}": (hidden,) for kind in ("weight", "bias")}
    return shapes


def _part_name(block: int, name: str) -> str:
    return f"encoder.layer.{block}.{(LINEAR_PARTS | NORM_PARTS)[name]}"
