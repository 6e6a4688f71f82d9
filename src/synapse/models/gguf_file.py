"""Reading GGUF files: metadata, configuration and weights, from a memory map.

The `gguf` package reads the format; this module checks everything it read against the size of the file before anything
is allocated, reads long arrays in one go, and hands weights out as float32 in the layout of the original checkpoints.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
from gguf import GGUFReader, GGUFValueType, ReaderField
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from numpy.typing import NDArray

from synapse.errors import NotFound
from synapse.kernels.fatal_signals import Guarded, guard
from synapse.models.config import PROJECTIONS, ModelConfig, read_config
from synapse.models.errors import ModelFileCorrupt, UnsupportedModel

TENSOR_TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K")
"""How weights may be stored. K-quantised files hold Q5_0 and Q5_1 where a row is no multiple of 256."""

Scalar = TypeVar("Scalar", np.float32, np.uint8)

VERSIONS = (2, 3)
SMALLEST_FIELD = 13  # bytes: the length of an empty key, a type, one byte of value
SMALLEST_TENSOR = 32  # bytes: the length of an empty name, one dimension, a type, an offset
LARGEST_ALIGNMENT = 2**16
MOST_DIMENSIONS = 4
DEQUANTISE_BYTES = 2**16  # at a time: few calls, and the temporaries stay in the cache (four times slower at 2**18)

PARTS = {
    "attention_norm": "attn_norm.weight",
    "ffn_norm": "ffn_norm.weight",
    "q_proj": "attn_q.weight",
    "k_proj": "attn_k.weight",
    "v_proj": "attn_v.weight",
    "o_proj": "attn_output.weight",
    "gate_proj": "ffn_gate.weight",
    "up_proj": "ffn_up.weight",
    "down_proj": "ffn_down.weight",
    "q_bias": "attn_q.bias",
    "k_bias": "attn_k.bias",
    "v_bias": "attn_v.bias",
    "q_norm": "attn_q_norm.weight",
    "k_norm": "attn_k_norm.weight",
}
"""The parts of a block, and what they are called in GGUF after ``blk.N.``."""


class _Reader(GGUFReader):
    """`gguf`'s reader, made safe against hostile files and quick on long arrays.

    The original reads past the end without noticing, trusts every count, and takes seconds over a vocabulary.

    Attributes:
        guarded: whether the file was cut short under the map.
    """

    guarded: Guarded | None = None

    def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> NDArray[Any]:
        if self.guarded is None:  # the first thing that is read: the original has just mapped the file
            self.guarded = guard(cast(Any, self.data)._mmap)
        size, count = np.dtype(dtype).itemsize, int(count)
        if not 0 <= count * size <= len(self.data) - offset:
            raise ModelFileCorrupt(f"the file ends in the middle of something that starts at byte {int(offset)}")
        values: NDArray[Any] = super()._get(offset, dtype, count, override_order)
        return values

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> tuple[int, list[Any], list[int], list[Any]]:
        if raw_type != GGUFValueType.ARRAY:
            parts: tuple[int, list[Any], list[int], list[Any]] = super()._get_field_parts(orig_offs, raw_type)
            return parts
        item_type = GGUFValueType(int(self._get(orig_offs, np.uint32)[0]))
        count = int(self._get(orig_offs + 4, np.uint64)[0])
        start = orig_offs + 12
        if item_type == GGUFValueType.ARRAY:
            raise ModelFileCorrupt("an array of arrays is not metadata that a model has")
        if item_type == GGUFValueType.STRING:
            values, end = self._read_strings(start, count)
        else:
            values = self._get(start, self.gguf_scalar_to_np[item_type], count)
            end = start + values.nbytes
        return end - orig_offs, [values], [0], [GGUFValueType.ARRAY, item_type]

    def _read_strings(self, start: int, count: int) -> tuple[NDArray[np.object_], int]:
        """`count` strings from byte `start` on, and where they end."""
        if count * 8 > len(self.data) - start:
            raise ModelFileCorrupt(f"an array claims {count} strings, more than the file can hold")
        values = np.empty(count, dtype=object)
        raw, length, position = self.data.data, struct.Struct("<Q"), start
        for i in range(count):
            position += 8
            if position > len(raw):
                raise ModelFileCorrupt(f"the file ends inside an array of strings that starts at byte {start}")
            end = position + length.unpack_from(raw, position - 8)[0]
            if end > len(raw):
                raise ModelFileCorrupt(f"the file ends inside an array of strings that starts at byte {start}")
            values[i] = str(raw[position:end], "utf-8")
            position = end
        return values, position

    def _build_fields(self, offs: int, count: int) -> int:
        if int(count) * SMALLEST_FIELD > len(self.data) - offs:
            raise ModelFileCorrupt(f"the file claims {int(count)} metadata fields, more than it can hold")
        end: int = super()._build_fields(offs, count)
        return end

    def _build_tensor_info(self, offs: int, count: int) -> tuple[int, list[ReaderField]]:
        if int(count) * SMALLEST_TENSOR > len(self.data) - offs:
            raise ModelFileCorrupt(f"the file claims {int(count)} tensors, more than it can hold")
        alignment = self.fields.get("general.alignment")
        if alignment is not None and int(alignment.parts[-1][0]) > LARGEST_ALIGNMENT:
            raise ModelFileCorrupt(f"the alignment must be at most {LARGEST_ALIGNMENT} bytes")
        table: tuple[int, list[ReaderField]] = super()._build_tensor_info(offs, count)
        return table

    def _get_tensor_info_field(self, orig_offs: int) -> ReaderField:
        name_length = int(self._get(orig_offs, np.uint64)[0])
        self._get(orig_offs + 8, np.uint8, name_length)
        dimensions = int(self._get(orig_offs + 8 + name_length, np.uint32)[0])
        if not 1 <= dimensions <= MOST_DIMENSIONS:
            raise ModelFileCorrupt(f"a tensor has {dimensions} dimensions; 1 to {MOST_DIMENSIONS} are possible")
        field: ReaderField = super()._get_tensor_info_field(orig_offs)
        self._check_tensor(field)
        return field

    def _check_tensor(self, field: ReaderField) -> None:
        shape, raw_type, offset = (part.tolist() for part in field.parts[3:6])
        try:
            type_ = GGMLQuantizationType(raw_type[0])
        except ValueError as error:
            raise ModelFileCorrupt(f"the tensor {field.name[:60]} has the unknown type {raw_type[0]}") from error
        if type_.name not in TENSOR_TYPES:
            raise UnsupportedModel(
                f"the tensor {field.name[:60]} is stored as {type_.name}, which is not supported",
                hint=f"use a file quantised to one of {', '.join(TENSOR_TYPES)}",
            )
        block, size = GGML_QUANT_SIZES[type_]
        elements = 1
        for dimension in shape:
            elements *= dimension
        if elements == 0 or shape[0] % block or elements // block * size + offset[0] > len(self.data):
            raise ModelFileCorrupt(f"the tensor {field.name[:60]} of shape {shape[::-1]} does not fit into the file")


class ModelFile:
    """An open model: its configuration and metadata at hand, its weights read when asked for.

    The file is memory-mapped, so it must not change while this object lives. One that became shorter is refused before
    and after a weight is read of it. Safe to use from several threads.

    Attributes:
        path: where the file is.
        config: what the model looks like.
        metadata: the GGUF key-value pairs as Python values.
        shapes: the tensors that an engine needs, by name, matrices as (out, in).
        types: how each is stored.
    """

    def __init__(self, path: Path, reader: _Reader) -> None:
        self.path = path
        self.metadata: Mapping[str, object] = {name: _value(field) for name, field in reader.fields.items()}
        self._size = len(reader.data)
        self._guarded = reader.guarded
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        shapes = {name: tuple(tensor.shape.tolist()[::-1]) for name, tensor in self._tensors.items()}
        factors = self._plain("rope_freqs.weight").reshape(-1).tolist() if "rope_freqs.weight" in shapes else []
        self.config: ModelConfig = read_config(self.metadata, shapes, tuple(factors))
        self.shapes: Mapping[str, tuple[int, ...]] = _expected_shapes(self.config)
        _check_tensors(self.config, self.shapes, shapes)
        self.types: Mapping[str, GGMLQuantizationType] = {name: self._tensors[name].tensor_type for name in self.shapes}

    def tensor(self, name: str) -> NDArray[np.float32]:
        """A weight by its GGUF name, as a fresh C-contiguous float32 array, matrices as (out, in).

        Llama files store the rows of q and k interleaved; here they come in the half-split order that every other
        architecture uses, so that one rotary embedding serves them all.

        Raises:
            NotFound: the model has no such tensor.
            ModelFileCorrupt: the file has become shorter since it was opened.
        """
        self._check(name)
        values = self._half_split(name, self._plain(name))
        self.check_whole()
        return values

    def stored(self, name: str) -> NDArray[np.uint8]:
        """A matrix in blocks of its type, as the file has it: uint8[out, bytes of a row], with the rows as in `tensor`.

        A view of the file unless rows had to be reordered.

        Raises:
            as `tensor`.
        """
        self._check(name)
        tensor = self._tensors[name]
        return self._half_split(name, np.asarray(tensor.data).view(np.uint8).reshape(int(tensor.shape[1]), -1))

    def weight(self, block: int, part: str) -> NDArray[np.float32]:
        """One of `PARTS` of a block; see `tensor`.

        Raises:
            KeyError: there is no part of that name.
            NotFound: this model does not have that part, or has fewer blocks.
        """
        return self.tensor(f"blk.{block}.{PARTS[part]}")

    def embedding(self) -> NDArray[np.float32]:
        """The token embedding, float32[vocab, hidden]."""
        return self.tensor("token_embd.weight")

    def output_norm(self) -> NDArray[np.float32]:
        """The weight of the last RMS norm, float32[hidden]."""
        return self.tensor("output_norm.weight")

    def output(self) -> NDArray[np.float32]:
        """The output head, float32[vocab, hidden]: the embedding when the two are tied."""
        return self.embedding() if self.config.tied else self.tensor("output.weight")

    def _check(self, name: str) -> None:
        if name not in self._tensors:
            raise NotFound(f"the model has no tensor {name!r}")
        self.check_whole()

    def check_whole(self) -> None:
        """Refuse a file that was cut short: what `stored` gave of it before reads as zeros.

        Raises:
            ModelFileCorrupt: it has become shorter since it was opened.
        """
        with suppress(FileNotFoundError):  # what was deleted stays whole while it is mapped
            size = self.path.stat().st_size
            if size < self._size or (self._guarded is not None and self._guarded.lost):
                raise ModelFileCorrupt(
                    f"{self.path.name} had {self._size} bytes when it was opened, and now has {size}",
                    hint="restore the file, and start again",
                    path=str(self.path),
                )

    def _half_split(self, name: str, rows: NDArray[Scalar]) -> NDArray[Scalar]:
        """Undo llama.cpp's interleaving of q and k: row 2i + j of a head goes back to row j * (head_dim / 2) + i."""
        heads = {"attn_q": self.config.heads, "attn_k": self.config.kv_heads}.get(name.split(".")[-2])
        if self.config.architecture != "llama" or heads is None:
            return rows
        by_pair = rows.reshape(heads, -1, 2, *rows.shape[1:])
        return np.ascontiguousarray(by_pair.swapaxes(1, 2)).reshape(rows.shape)

    def _plain(self, name: str) -> NDArray[np.float32]:
        """The values in the order in which the file has them."""
        tensor = self._tensors[name]
        shape = tensor.shape.tolist()[::-1]
        values = np.empty(tensor.n_elements, dtype=np.float32)
        raw = np.asarray(tensor.data).reshape(-1).view(np.uint8)
        block, size = GGML_QUANT_SIZES[tensor.tensor_type]
        step = DEQUANTISE_BYTES // size
        for start in range(0, tensor.n_elements // block, step):
            piece = raw[start * size : (start + step) * size]
            values[start * block : (start + step) * block] = dequantize(piece, tensor.tensor_type)
        return values.reshape(shape)


def open_model_file(path: Path) -> ModelFile:
    """Open a GGUF file and check all of it but the weights' values.

    Raises:
        NotFound: there is no such file.
        ModelFileCorrupt: it is not GGUF, or truncated, altered or contradictory.
        UnsupportedModel: it describes something that no engine here runs.
    """
    try:
        with path.open("rb") as file:
            head = file.read(8)
    except OSError as error:
        raise NotFound(f"cannot read the model file {path}: {error.strerror}") from error
    try:
        _check_head(head)
        return ModelFile(path, _Reader(path))
    except (ModelFileCorrupt, UnsupportedModel) as error:
        raise type(error)(f"{path.name}: {error.message}", hint=error.hint, path=str(path)) from error
    except (ValueError, KeyError, IndexError, OverflowError, UnicodeDecodeError) as error:
        # What gguf raises for values that are not of their type, and for fields or tensors that occur twice.
        raise ModelFileCorrupt(f"{path.name}: {str(error)[:200]}", path=str(path)) from error


def _check_head(head: bytes) -> None:
    if head[:4] != b"GGUF":
        raise ModelFileCorrupt(
            "this is not a GGUF file: it does not begin with GGUF", hint="download the file again, or check its name"
        )
    version = int.from_bytes(head[4:8], "little")
    if version in VERSIONS:
        return
    if int.from_bytes(head[4:8], "big") in VERSIONS:
        raise UnsupportedModel("big-endian GGUF files are not supported")
    raise UnsupportedModel(f"GGUF version {version} is not supported", hint="supported are versions 2 and 3")


def _value(field: ReaderField) -> object:
    """The Python value of a metadata field: a list for an array."""
    part = field.parts[field.data[0]]
    if field.types[0] == GGUFValueType.ARRAY:
        values: list[object] = part.tolist()
        return values
    if field.types[0] == GGUFValueType.STRING:
        return str(bytes(part), "utf-8")
    value: object = part.tolist()[0]
    return value


def _check_tensors(
    config: ModelConfig, expected: Mapping[str, tuple[int, ...]], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Every tensor the configuration needs is there with its shape, and none is left over."""
    for name, shape in expected.items():
        if name not in shapes:
            raise ModelFileCorrupt(f"the tensor {name} is missing")
        if shapes[name] != shape:
            raise ModelFileCorrupt(f"the tensor {name} must have the shape {shape}, but has {shapes[name]}")
    extra = sorted(shapes.keys() - expected.keys() - {"rope_freqs.weight"})
    if extra:
        raise UnsupportedModel(f"{config.architecture} models have no tensor {extra[0][:60]}, but this file does")


def _expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    parts: dict[str, tuple[int, ...]] = {"attention_norm": (config.hidden,), "ffn_norm": (config.hidden,)}
    parts |= {projection: config.linear_shape(projection) for projection in PROJECTIONS}
    if config.qkv_bias:
        parts |= {f"{which}_bias": config.linear_shape(f"{which}_proj")[:1] for which in "qkv"}
    if config.qk_norm:
        parts |= {"q_norm": (config.head_dim,), "k_norm": (config.head_dim,)}
    shapes: dict[str, tuple[int, ...]] = {
        f"blk.{block}.{PARTS[part]}": shape for block in range(config.blocks) for part, shape in parts.items()
    }
    shapes |= {"token_embd.weight": (config.vocab, config.hidden), "output_norm.weight": (config.hidden,)}
    if not config.tied:
        shapes["output.weight"] = (config.vocab, config.hidden)
    return shapes
