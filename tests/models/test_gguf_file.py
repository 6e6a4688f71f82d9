"""Reading GGUF files: right values for sound ones, one kind of error for all others."""

from __future__ import annotations

import struct
import time
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf.quants import dequantize, quantize
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from support.small_gguf import HEADS, HIDDEN, KV_HEADS, small_tensors, write_small_gguf
from synapse.errors import NotFound
from synapse.models.errors import ModelFileCorrupt, UnsupportedModel
from synapse.models.gguf_file import TENSOR_TYPES, open_model_file

Q = gguf.GGMLQuantizationType
CAN_QUANTISE = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return write_small_gguf(tmp_path / "small.gguf")


def test_a_small_model_is_described_by_its_metadata_and_tensors(small: Path) -> None:
    config = open_model_file(small).config
    assert (config.architecture, config.blocks, config.hidden, config.vocab) == ("llama", 1, HIDDEN, 8)
    assert (config.heads, config.kv_heads, config.head_dim, config.context) == (HEADS, KV_HEADS, HIDDEN // HEADS, 64)
    assert config.tied
    assert not config.qkv_bias
    assert not config.qk_norm
    assert config.linear_shape("k_proj") == (KV_HEADS * config.head_dim, HIDDEN)


@pytest.mark.parametrize("type_", TENSOR_TYPES)
def test_weights_of_every_type_come_out_as_gguf_dequantises_them(type_: str, tmp_path: Path) -> None:
    # One row of 256 values, the block of the K types; random bytes make a block of any type.
    kind, rows, columns = Q[type_], 300, 512
    if type_ in CAN_QUANTISE:
        values = np.random.default_rng(1).standard_normal((rows, columns)).astype(np.float32)
        stored = quantize(values, kind)
    else:
        block, size = gguf.GGML_QUANT_SIZES[kind]
        stored = np.random.default_rng(1).integers(0, 60, (rows, columns // block * size), dtype=np.uint8)
    metadata = {"llama.embedding_length": columns, "llama.attention.head_count": 1, "llama.attention.head_count_kv": 1}
    tensors: dict[str, object] = dict.fromkeys(small_tensors())
    tensors |= {name: np.ones(columns, np.float32) for name in tensors if "norm" in name}
    square = np.zeros((columns, columns), np.float32)
    tensors |= {f"blk.0.attn_{part}.weight": square for part in ("q", "k", "v", "output")}
    tensors |= {f"blk.0.ffn_{part}.weight": np.zeros((64, columns), np.float32) for part in ("gate", "up")}
    tensors |= {"blk.0.ffn_down.weight": np.zeros((columns, 64), np.float32), "token_embd.weight": (stored, kind)}
    path = write_small_gguf(tmp_path / "typed.gguf", metadata=metadata, tensors=tensors)
    read = open_model_file(path).embedding()
    assert read.shape == (rows, columns)
    assert read.dtype == np.float32
    assert read.flags.c_contiguous
    assert read.flags.writeable
    np.testing.assert_array_equal(read, dequantize(stored, kind).reshape(rows, columns))


@pytest.mark.parametrize(("part", "heads"), [("q", HEADS), ("k", KV_HEADS)])
def test_rows_of_q_and_k_of_llama_come_back_in_half_split_order(part: str, heads: int, tmp_path: Path) -> None:
    width = HIDDEN // HEADS
    wanted = np.arange(heads * width * HIDDEN, dtype=np.float32).reshape(heads * width, HIDDEN)
    stored = np.empty_like(wanted)
    for head in range(heads):
        for i in range(width // 2):
            stored[head * width + 2 * i] = wanted[head * width + i]
            stored[head * width + 2 * i + 1] = wanted[head * width + width // 2 + i]
    name = f"blk.0.attn_{part}.weight"
    llama = write_small_gguf(tmp_path / "llama.gguf", tensors={name: stored})
    qwen = write_small_gguf(
        tmp_path / "qwen.gguf",
        architecture="qwen3",
        tensors={
            name: wanted,
            "blk.0.attn_q_norm.weight": np.ones(width, np.float32),
            "blk.0.attn_k_norm.weight": np.ones(width, np.float32),
        },
    )
    np.testing.assert_array_equal(open_model_file(llama).weight(0, f"{part}_proj"), wanted)
    np.testing.assert_array_equal(open_model_file(qwen).weight(0, f"{part}_proj"), wanted)


def test_the_output_head_is_the_embedding_when_the_two_are_tied(small: Path, tmp_path: Path) -> None:
    file = open_model_file(small)
    np.testing.assert_array_equal(file.output(), file.embedding())
    head = np.full((8, HIDDEN), 0.5, np.float32)
    untied = open_model_file(write_small_gguf(tmp_path / "untied.gguf", tensors={"output.weight": head}))
    assert not untied.config.tied
    np.testing.assert_array_equal(untied.output(), head)


def test_a_tensor_that_is_not_there_is_not_found(small: Path) -> None:
    with pytest.raises(NotFound, match=r"blk\.7\.attn_q\.weight"):
        open_model_file(small).weight(7, "q_proj")


def test_a_file_that_is_not_there_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="missing"):
        open_model_file(tmp_path / "missing.gguf")


@pytest.mark.parametrize("content", [b"", b"GG", b"PK\x03\x04 a zip archive", b"GGUF", b"GGUF\x03\0\0\0\x01"])
def test_what_is_no_gguf_file_is_corrupt(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "other.gguf"
    path.write_bytes(content)
    with pytest.raises((ModelFileCorrupt, UnsupportedModel)):
        open_model_file(path)


@pytest.mark.parametrize("version", [1, 4, 3 << 24])
def test_other_versions_and_byte_orders_are_refused_by_name(version: int, small: Path) -> None:
    data = bytearray(small.read_bytes())
    data[4:8] = struct.pack("<I", version)
    small.write_bytes(data)
    with pytest.raises(UnsupportedModel, match=r"version|big-endian"):
        open_model_file(small)


def test_truncated_anywhere_is_corrupt(small: Path, tmp_path: Path) -> None:
    data = small.read_bytes()
    cut = tmp_path / "cut.gguf"
    for length in [*range(8, 1200, 7), len(data) // 2, len(data) - 33, len(data) - 1]:
        cut.write_bytes(data[:length])
        with pytest.raises(ModelFileCorrupt):
            open_model_file(cut)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.lists(st.tuples(st.integers(4, 1400), st.integers(0, 255)), min_size=1, max_size=4))
def test_altered_headers_open_or_are_refused_and_nothing_else(small: Path, changes: list[tuple[int, int]]) -> None:
    data = bytearray(small.read_bytes())
    for position, value in changes:
        data[position] = value
    altered = small.with_name("altered.gguf")
    altered.write_bytes(data)
    started = time.monotonic()
    try:
        open_model_file(altered)
    except (ModelFileCorrupt, UnsupportedModel) as error:
        assert error.message
    assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    ("offset", "name"),
    [(8, "tensors"), (16, "metadata fields")],
)
def test_counts_larger_than_the_file_are_refused_before_anything_is_read(offset: int, name: str, small: Path) -> None:
    data = bytearray(small.read_bytes())
    data[offset : offset + 8] = struct.pack("<Q", 2**62)
    small.write_bytes(data)
    with pytest.raises(ModelFileCorrupt, match=name):
        open_model_file(small)


def _value(key: str, kind: int, payload: bytes) -> bytes:
    return struct.pack("<Q", len(key)) + key.encode() + struct.pack("<I", kind) + payload


@pytest.mark.parametrize(
    "value",
    [
        pytest.param(_value("a", 9, struct.pack("<IQ", 8, 2**60)), id="2^60 strings"),
        pytest.param(_value("a", 9, struct.pack("<IQ", 4, 2**61)), id="2^61 integers"),
        pytest.param(_value("a", 9, struct.pack("<IQ", 9, 1)), id="array of arrays"),
        pytest.param(_value("a", 9, struct.pack("<IQ", 77, 1)), id="array of an unknown type"),
        pytest.param(_value("a", 9, struct.pack("<IQQ", 8, 1, 2**63)), id="a string of 2^63 bytes in an array"),
        pytest.param(_value("a", 8, struct.pack("<Q", 2**63)), id="a string of 2^63 bytes"),
        pytest.param(_value("a", 77, b"\0" * 8), id="unknown type"),
        pytest.param(_value("a", 8, struct.pack("<Q", 2) + b"\xff\xfe"), id="not UTF-8"),
        pytest.param(_value("general.alignment", 4, struct.pack("<I", 2**31)), id="huge alignment"),
        pytest.param(_value("general.alignment", 4, struct.pack("<I", 24)), id="alignment not a power of two"),
        pytest.param(_value("GGUF.version", 4, struct.pack("<I", 3)), id="a key twice"),
    ],
)
def test_metadata_that_lies_is_corrupt(value: bytes, tmp_path: Path) -> None:
    path = tmp_path / "lies.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + value + b"\0" * 64)
    with pytest.raises(ModelFileCorrupt):
        open_model_file(path)


def _tensor(name: bytes, shape: tuple[int, ...], kind: int, offset: int) -> bytes:
    dimensions = struct.pack("<I", len(shape)) + b"".join(struct.pack("<Q", size) for size in shape)
    return struct.pack("<Q", len(name)) + name + dimensions + struct.pack("<IQ", kind, offset)


@pytest.mark.parametrize(
    "tensors",
    [
        pytest.param([_tensor(b"a", (2**40, 2**40), 0, 0)], id="larger than the file"),
        pytest.param([_tensor(b"a", (2**32, 2**32), 0, 0)], id="a product that overflows to zero"),
        pytest.param([_tensor(b"a", (4,), 0, 2**63)], id="an offset behind the end"),
        pytest.param([_tensor(b"a", (0,), 0, 0)], id="empty"),
        pytest.param([_tensor(b"a", (33,), 8, 0)], id="not a multiple of the block"),
        pytest.param([_tensor(b"a", (4,), 99, 0)], id="unknown type"),
        pytest.param([_tensor(b"a", (1,) * 9, 0, 0)], id="nine dimensions"),
        pytest.param([_tensor(b"a", (), 0, 0)], id="no dimensions"),
        pytest.param([_tensor(b"a", (4,), 0, 0), _tensor(b"a", (4,), 0, 0)], id="the same name twice"),
        pytest.param([_tensor(b"\xff", (4,), 0, 0)], id="a name that is not UTF-8"),
    ],
)
def test_tensor_tables_that_lie_are_corrupt(tensors: list[bytes], tmp_path: Path) -> None:
    path = tmp_path / "lies.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, len(tensors), 0) + b"".join(tensors) + b"\0" * 256)
    with pytest.raises(ModelFileCorrupt):
        open_model_file(path)


def test_a_tensor_type_that_is_not_supported_is_named(tmp_path: Path) -> None:
    path = tmp_path / "iq.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + _tensor(b"a", (256,), int(Q.IQ2_XXS), 0) + b"\0" * 512)
    with pytest.raises(UnsupportedModel, match="IQ2_XXS") as caught:
        open_model_file(path)
    assert "Q4_K" in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"blk.0.attn_v.weight": None}, r"blk\.0\.attn_v\.weight is missing"),
        ({"blk.0.ffn_up.weight": np.zeros((4, 4), np.float32)}, r"must have the shape \(64, 32\), but has \(4, 4\)"),
        ({"token_embd.weight": None}, "no token embedding"),
        ({"rope_freqs.weight": np.ones(3, np.float32)}, "4 positive factors"),
        ({"rope_freqs.weight": np.zeros(4, np.float32)}, "4 positive factors"),
    ],
)
def test_tensors_that_contradict_the_metadata_are_corrupt(
    tensors: dict[str, np.ndarray | None], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ModelFileCorrupt, match=message):
        open_model_file(write_small_gguf(tmp_path / "bad.gguf", tensors=tensors))


def test_a_tensor_that_nothing_would_use_is_refused_and_named(tmp_path: Path) -> None:
    path = write_small_gguf(tmp_path / "extra.gguf", tensors={"blk.0.attn_output.bias": np.ones(HIDDEN, np.float32)})
    with pytest.raises(UnsupportedModel, match=r"blk\.0\.attn_output\.bias"):
        open_model_file(path)


@pytest.mark.slow
def test_the_default_model_opens_and_dequantises_quickly(default_model: Path) -> None:
    started = time.process_time()
    file = open_model_file(default_model)
    opened = time.process_time() - started
    values = file.embedding().size + sum(file.weight(b, "gate_proj").size for b in range(file.config.blocks))
    read = time.process_time() - started - opened
    assert (file.config.hidden, file.config.blocks, file.config.vocab) == (576, 30, 49152)
    assert values == 49152 * 576 + 30 * 1536 * 576
    assert opened < 1.5  # about 0.15 s on an idle machine
    assert read < 3
