"""Packed matrices: the weights as the kernels read them, in blocks of 32 inputs with float16 scales.

A matrix [out, in] is padded with zeros to multiples of 32 and stored in records of 16 outputs by 32 inputs: record
(g, b), of the outputs 16g … 16g + 15 and the inputs 32b … 32b + 31, has the index g * blocks + b. One load of a record
brings the same four (or two) inputs of all 16 outputs, which is what one dot-product instruction takes.

q4, 320 bytes: float16 d[16], m[16]; codes[4][16][4], where byte (j, o, i) has in its low half the code of input 8j + i
of output o, and in its high half that of input 8j + 4 + i. value = d * code + m, codes 0 to 15.

q4_0, 288 bytes: float16 d[16]; codes as of q4. value = d * (code - 8): blocks of Q4_0, a tenth less to read.

q8, 544 bytes: float16 d[16]; int8 codes[16][16][2], where (p, o, i) is the code of input 2p + i of output o.
value = d * code, codes -127 to 127.

Blocks of GGUF that have this form keep their codes and scales. Their layout, and how float32 comes out of them:
ggml-org/ggml, src/ggml-common.h and src/ggml-quants.c; `gguf.quants` says the same in NumPy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal

import numpy as np
from gguf.constants import GGMLQuantizationType
from gguf.quants import Q4_K, dequantize, quantize
from numpy.typing import NDArray

from synapse.engines.native.packed.quantising import BLOCK, HINT, round_q4, round_q8
from synapse.models.errors import ModelFileCorrupt

Kind = Literal["q4", "q4_0", "q8"]
Array = NDArray[np.float32]
Bytes = NDArray[np.uint8]
Records = NDArray[Any]
"""Structured, of the type `RECORD[kind]`, [groups, blocks]."""

GROUP = 16
"""Outputs of a record."""
RECORD = {
    "q4": np.dtype([("d", "<f2", GROUP), ("m", "<f2", GROUP), ("codes", "u1", (4, GROUP, 4))]),
    "q4_0": np.dtype([("d", "<f2", GROUP), ("codes", "u1", (4, GROUP, 4))]),
    "q8": np.dtype([("d", "<f2", GROUP), ("codes", "i1", (16, GROUP, 2))]),
}
FOUR_BIT: dict[str, Kind] = {"Q4_0": "q4_0", "Q4_1": "q4", "Q4_K": "q4"}
"""What the 4-bit types of GGUF become as they are; of Q4_K the products of two scales are rounded to float16."""

_PIECE = 2**16  # weights handled at a time: few calls, and the temporaries stay in the cache


def padded(size: int) -> int:
    """The next multiple of 32, which is what both sides of a matrix are padded to."""
    return -(-size // BLOCK) * BLOCK


def group_bytes(kind: Kind, columns: int) -> int:
    """Bytes of the records of 16 outputs."""
    return padded(columns) // BLOCK * RECORD[kind].itemsize


def packed_bytes(kind: Kind, shape: tuple[int, int]) -> int:
    """Bytes of the records of a matrix [out, in]."""
    return padded(shape[0]) // GROUP * group_bytes(kind, shape[1])


def pack_q4(d: NDArray[Any], m: NDArray[Any], codes: Bytes) -> Records:
    """The records of a matrix from its scales d and offsets m, [out, blocks], and its codes, uint8[out, 32 x blocks].

    Raises:
        ModelFileCorrupt: a scale or an offset is not finite in float16.
    """
    records = _four_bit("q4", d, codes)
    records["m"] = _by_group(_scales(m))
    return records


def pack_q4_0(d: NDArray[Any], codes: Bytes) -> Records:
    """The same of a matrix whose offsets are -8 d."""
    return _four_bit("q4_0", d, codes)


def _four_bit(kind: Kind, d: NDArray[Any], codes: Bytes) -> Records:
    words = np.ascontiguousarray(codes).view("<u4").reshape(*d.shape, 8)  # four neighbouring inputs each
    records = np.empty((padded(len(d)) // GROUP, d.shape[1]), RECORD[kind])
    records["d"] = _by_group(_scales(d))
    records["codes"].view("<u4")[..., 0] = _by_group(words[..., 0::2] | words[..., 1::2] << 4)
    return records


def pack_q8(d: NDArray[Any], codes: NDArray[np.int8]) -> Records:
    """The records of a matrix from its scales d, [out, blocks], and its codes, int8[out, 32 x blocks].

    Raises:
        ModelFileCorrupt: a scale is not finite in float16.
    """
    pairs = np.ascontiguousarray(codes).view("<u2").reshape(*d.shape, 16)
    records = np.empty((padded(len(d)) // GROUP, d.shape[1]), RECORD["q8"])
    records["d"] = _by_group(_scales(d))
    records["codes"].view("<u2")[..., 0] = _by_group(pairs)
    return records


def quantise_q4(values: Array) -> Records:
    """The records of a matrix, float32[out, in], rounded to four bits; see `round_q4`."""
    return pack_q4(*round_q4(values))


def quantise_q4_0(values: Array) -> Records:
    """The records of a matrix, float32[out, in], rounded as gguf rounds to Q4_0."""
    missing = -values.shape[1] % BLOCK
    return pack_rows(
        "q4_0", GGMLQuantizationType.Q4_0, quantize(np.pad(values, ((0, 0), (0, missing))), GGMLQuantizationType.Q4_0)
    )


def quantise_q8(values: Array) -> Records:
    """The records of a matrix, float32[out, in], rounded to eight bits; see `round_q8`."""
    return pack_q8(*round_q8(values))


QUANTISE: dict[Kind, Callable[[Array], Records]] = {"q4": quantise_q4, "q4_0": quantise_q4_0, "q8": quantise_q8}


def pack_rows(kind: Kind, type_: GGMLQuantizationType, raw: Bytes) -> Records:
    """The records of a matrix that a GGUF file holds, without loss where the blocks have the same form.

    Args:
        raw: uint8[out, bytes of a row], as the file has them.

    Raises:
        ModelFileCorrupt: a weight or a scale is not finite, or too large for a float16 scale.
    """
    if kind == "q4_0" and type_.name == "Q4_0":
        blocks = raw.reshape(len(raw), -1, 18)
        return pack_q4_0(_float16(blocks, 0), _halves(blocks[..., 2:]).reshape(len(raw), -1))
    if kind == "q4" and type_.name in FOUR_BIT:
        with np.errstate(invalid="ignore"):  # of scales that are not finite, which are refused next
            d, m, codes = _READ_Q4[type_.name](raw)
        return pack_q4(d, m, codes.reshape(len(raw), -1))
    if kind == "q8" and type_.name == "Q8_0":
        blocks = raw.reshape(len(raw), -1, 34)
        signed = blocks[..., 2:].view(np.int8)
        if signed.min(initial=0) >= -127:  # no quantiser writes -128, and dot products have no room for it
            return pack_q8(_float16(blocks, 0), signed.reshape(len(raw), -1))
    with np.errstate(all="ignore"):  # likewise
        values = np.asarray(dequantize(raw, type_), np.float32)
    return QUANTISE[kind](values)


def pack_matrix(kind: Kind, type_: GGMLQuantizationType, raw: Bytes, columns: int) -> Iterator[Records]:
    """`pack_rows` a few rows at a time, so that a large matrix takes little memory; the pieces follow one another.

    Args:
        columns: inputs, as numbers, not as bytes.
    """
    step = max(_PIECE // columns // BLOCK, 1) * BLOCK
    for first in range(0, len(raw), step):
        yield pack_rows(kind, type_, raw[first : first + step])


def as_records(kind: Kind, packed: NDArray[Any], shape: tuple[int, int]) -> Records:
    """Packed bytes (of any type of array) as records, [groups, blocks]."""
    return packed.reshape(-1).view(np.uint8).view(RECORD[kind]).reshape(-1, padded(shape[1]) // BLOCK)


def unpack(kind: Kind, packed: NDArray[Any], shape: tuple[int, int]) -> Array:
    """The matrix that records stand for, float32[out, in]: each weight is computed as in the formula above."""
    rows, columns = shape
    records = as_records(kind, packed, shape)
    values = np.empty((rows, columns), np.float32)
    step = max(_PIECE // columns // GROUP, 1)
    for first in range(0, -(-rows // GROUP), step):
        piece = values[first * GROUP : (first + step) * GROUP]
        piece[:] = _values(kind, records[first : first + step])[: len(piece), :columns]
    return values


def unpack_rows(kind: Kind, packed: NDArray[Any], shape: tuple[int, int], rows: NDArray[np.intp]) -> Array:
    """Some rows of the matrix that records stand for, float32[len(rows), in]."""
    group, output = np.divmod(rows, GROUP)
    values = _values(kind, as_records(kind, packed, shape)[group]).reshape(len(rows), GROUP, -1)
    return np.ascontiguousarray(values[np.arange(len(rows)), output, : shape[1]])


def _by_group(items: NDArray[Any]) -> NDArray[Any]:
    """[out, blocks, …] -> [groups, blocks, …, 16], the outputs padded with zeros."""
    missing = padded(len(items)) - len(items)
    if missing:
        items = np.concatenate([items, np.zeros((missing, *items.shape[1:]), items.dtype)])
    return np.moveaxis(items.reshape(-1, GROUP, *items.shape[1:]), 1, -1)


def _scales(values: NDArray[Any]) -> NDArray[np.float16]:
    with np.errstate(over="ignore", invalid="ignore"):
        half = values.astype("<f2")
    if not np.isfinite(half).all():
        raise ModelFileCorrupt("has blocks whose scale is not finite in float16; every scale must be", hint=HINT)
    return half


def _values(kind: Kind, records: Records) -> Array:
    """Records [groups, blocks] -> float32[16 x groups, 32 x blocks]."""
    groups, blocks = records.shape
    if kind != "q8":
        # Of each output the words in order; each becomes two words of four codes.
        words = records["codes"].view("<u4")[..., 0].transpose(0, 3, 1, 2)
        codes: NDArray[Any] = np.empty((groups, GROUP, blocks, 4, 2), "<u4")
        codes[..., 0] = words & 0x0F0F0F0F
        codes[..., 1] = words >> 4 & 0x0F0F0F0F
        codes = codes.view(np.uint8)
    else:
        codes = np.ascontiguousarray(records["codes"].view("<u2")[..., 0].transpose(0, 3, 1, 2)).view(np.int8)
    values = codes.reshape(groups, GROUP, blocks, BLOCK).astype(np.float32)
    if kind == "q4_0":
        values -= 8
    values *= records["d"].astype(np.float32).transpose(0, 2, 1)[..., None]
    if kind == "q4":
        values += records["m"].astype(np.float32).transpose(0, 2, 1)[..., None]
    return values.reshape(groups * GROUP, blocks * BLOCK)


def _float16(blocks: Bytes, at: int) -> NDArray[np.float16]:
    """The float16 at a byte of each block: [out, blocks]."""
    return np.ascontiguousarray(blocks[..., at : at + 2]).view("<f2")[..., 0]


def _halves(blocks: Bytes) -> Bytes:
    """[…, n] bytes -> […, 2, n] codes: all low halves, then all high ones."""
    return np.stack([blocks & 15, blocks >> 4], axis=-2)


def _read_q4_0(raw: Bytes) -> tuple[NDArray[Any], NDArray[Any], Bytes]:
    blocks = raw.reshape(len(raw), -1, 18)
    d = _float16(blocks, 0).astype(np.float32)
    return d, -8 * d, _halves(blocks[..., 2:])


def _read_q4_1(raw: Bytes) -> tuple[NDArray[Any], NDArray[Any], Bytes]:
    blocks = raw.reshape(len(raw), -1, 20)
    return _float16(blocks, 0), _float16(blocks, 2), _halves(blocks[..., 4:])


def _read_q4_k(raw: Bytes) -> tuple[NDArray[Any], NDArray[Any], Bytes]:
    blocks = raw.reshape(len(raw), -1, 144)
    scale, offset = Q4_K.get_scale_min(np.ascontiguousarray(blocks[..., 4:16]).reshape(-1, 12))
    d = _float16(blocks, 0).astype(np.float32)[..., None] * scale.reshape(len(raw), -1, 8)
    m = _float16(blocks, 2).astype(np.float32)[..., None] * offset.reshape(len(raw), -1, 8)
    codes = _halves(blocks[..., 16:].reshape(len(raw), -1, 4, 32))
    return d.reshape(len(raw), -1), -m.reshape(len(raw), -1), codes


_READ_Q4: dict[str, Callable[[Bytes], tuple[NDArray[Any], NDArray[Any], Bytes]]] = {
    "Q4_0": _read_q4_0,
    "Q4_1": _read_q4_1,
    "Q4_K": _read_q4_k,
}
