"""Packed models and model files that were cut short, altered or forged: made anew or refused, never believed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf.constants import GGML_QUANT_SIZES
from gguf.constants import GGMLQuantizationType as Q
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from support.small_gguf import small_tensors, stored_as, write_small_gguf
from synapse.engines.native.packed.file import open_packed
from synapse.engines.native.packed.model import PackedModel
from synapse.errors import Unavailable
from synapse.models.errors import ModelFileCorrupt, UnsupportedModel
from synapse.models.gguf_file import TENSOR_TYPES, ModelFile, open_model_file
from synapse.models.pulling.transfer import sha256_of

Header = dict[str, Any]
many = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


class Packed:
    """A sound packed model, and the bytes of its file, to be damaged."""

    def __init__(self, folder: Path) -> None:
        tensors: dict[str, Any] = stored_as("Q4_1") | {"token_embd.weight": stored_as("Q8_0")["token_embd.weight"]}
        self.path = write_small_gguf(folder / "small.gguf", tensors=tensors)
        self.file: ModelFile = open_model_file(self.path)
        self.sha256 = sha256_of(self.path)
        self.folder = folder / "packed"
        self.open()
        (self.pack,) = self.folder.glob("*.pack")
        self.sound = self.pack.read_bytes()

    def open(self) -> PackedModel:
        return open_packed(self.file, self.sha256, self.folder)

    def replace(self, data: bytes) -> None:
        self.pack.unlink()  # what is mapped must not be written in place
        self.pack.write_bytes(data)

    @property
    def header(self) -> Header:
        length = int.from_bytes(self.sound[8:16], "little")
        header: Header = json.loads(self.sound[16 : 16 + length])
        return header

    @property
    def payload(self) -> bytes:
        return self.sound[-self.header["payload_bytes"] :]

    def assert_made_anew(self) -> None:
        """The damaged file is noticed, said so in the log, and replaced by the sound one."""
        with capture_logs() as logs:
            model = self.open()
        assert [(entry["event"], entry["log_level"]) for entry in logs] == [("a packed model is made anew", "warning")]
        assert logs[0]["file"] == str(self.pack)
        assert self.pack.read_bytes() == self.sound
        name = "blk.0.ffn_down.weight"
        np.testing.assert_array_equal(model.matrix(name), self.file.tensor(name))


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Packed:
    return Packed(tmp_path_factory.mktemp("packed"))


def test_a_sound_file_is_opened_without_a_word(packed: Packed) -> None:
    packed.replace(packed.sound)
    with capture_logs() as logs:
        packed.open()
    assert logs == []


@many
@given(length=st.integers(0, 30_000))
def test_a_file_cut_short_anywhere_is_made_anew(packed: Packed, length: int) -> None:
    packed.replace(packed.sound[: min(length, len(packed.sound) - 1)])
    packed.assert_made_anew()


@pytest.mark.parametrize("more", [b"\0", b"\0" * 64, b"more" * 2000])
def test_a_file_with_more_in_it_is_made_anew(packed: Packed, more: bytes) -> None:
    packed.replace(packed.sound + more)
    packed.assert_made_anew()


@many
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_one_bit_that_flipped_anywhere_is_noticed(packed: Packed, place: float, bit: int) -> None:
    data = bytearray(packed.sound)
    data[int(place * len(data))] ^= 1 << bit
    packed.replace(bytes(data))
    packed.assert_made_anew()


@many
@given(place=st.integers(0, 4095), bit=st.integers(0, 7))
def test_one_bit_that_flipped_in_the_header_is_noticed(packed: Packed, place: int, bit: int) -> None:
    data = bytearray(packed.sound)
    data[place] ^= 1 << bit
    packed.replace(bytes(data))
    packed.assert_made_anew()


def set_header(**changes: object) -> Callable[[Header], None]:
    return lambda header: header.update(changes)


def set_slot(name: str, **changes: object) -> Callable[[Header], None]:
    return lambda header: header["tensors"][name].update(changes)


def rename(header: Header) -> None:
    header["tensors"]["blk.0.attn_x.weight"] = header["tensors"].pop("blk.0.attn_q.weight")


Q_WEIGHT, EMBEDDING = "blk.0.attn_q.weight", "token_embd.weight"


@pytest.mark.parametrize(
    "lie",
    [
        pytest.param(set_header(version=1), id="version"),
        pytest.param(set_header(source="0" * 64), id="source"),
        pytest.param(set_header(quantisation="int8"), id="quantisation"),
        pytest.param(set_header(payload_sha256="0" * 64), id="sha256"),
        pytest.param(set_header(payload_bytes=2**62), id="huge payload"),
        pytest.param(set_header(payload_bytes=-1), id="negative payload"),
        pytest.param(set_header(tensors={}), id="no tensors"),
        pytest.param(set_header(tensors=[]), id="a list of tensors"),
        pytest.param(set_header(more=1), id="a field more"),
        pytest.param(rename, id="an unknown tensor"),
        pytest.param(lambda header: header["tensors"].pop(Q_WEIGHT), id="a missing tensor"),
        pytest.param(set_slot(Q_WEIGHT, offset=2**62), id="offset behind the end"),
        pytest.param(set_slot(Q_WEIGHT, offset=-64), id="offset before the payload"),
        pytest.param(set_slot(Q_WEIGHT, offset=1), id="offset not aligned"),
        pytest.param(set_slot(Q_WEIGHT, offset=0), id="overlap"),
        pytest.param(set_slot(Q_WEIGHT, bytes=2**62), id="bytes"),
        pytest.param(set_slot(Q_WEIGHT, bytes=0), id="no bytes"),
        pytest.param(set_slot(Q_WEIGHT, kind="q8"), id="kind"),
        pytest.param(set_slot(Q_WEIGHT, kind=None), id="no kind"),
        pytest.param(set_slot(Q_WEIGHT, shape=[2**31, 2**31]), id="shape"),
        pytest.param(set_slot(EMBEDDING, shape=[9, 32]), id="shape within the padding"),
    ],
)
def test_a_header_that_lies_about_a_sound_payload_is_not_believed(packed: Packed, lie: Callable[[Header], Any]) -> None:
    header = packed.header
    lie(header)
    encoded = json.dumps(header).encode()
    front = b"SYNPACK1" + len(encoded).to_bytes(8, "little") + encoded
    packed.replace(front + bytes(-len(front) % 4096) + packed.payload)
    packed.assert_made_anew()


@pytest.mark.parametrize(
    "front",
    [
        b"SYNPACK2",
        b"SYNPACK1" + (2**63).to_bytes(8, "little"),
        b"SYNPACK1" + (2**64 - 1).to_bytes(8, "little") + b"{",
        b"SYNPACK1" + (10**5).to_bytes(8, "little") + b"[" * 10**5,
        b"SYNPACK1" + (2).to_bytes(8, "little") + b"\xff\xfe",
    ],
)
def test_bytes_that_are_no_header_are_not_believed(packed: Packed, front: bytes) -> None:
    packed.replace((front + packed.sound[len(front) :])[: len(packed.sound)])
    packed.assert_made_anew()


def test_the_packed_form_of_another_model_is_not_believed(packed: Packed, tmp_path: Path) -> None:
    tensors: dict[str, Any] = {name: (raw ^ 1, type_) for name, (raw, type_) in stored_as("Q4_1").items()}
    tensors["token_embd.weight"] = stored_as("Q8_0")["token_embd.weight"]
    other = write_small_gguf(tmp_path / "other.gguf", tensors=tensors)
    open_packed(open_model_file(other), sha256_of(other), tmp_path)
    (theirs,) = tmp_path.glob("*.pack")
    packed.replace(theirs.read_bytes())
    packed.assert_made_anew()


def test_what_a_killed_process_left_is_written_over(packed: Packed) -> None:
    left = packed.pack.with_suffix(".partial")
    left.write_bytes(b"half" * 10_000)
    packed.pack.unlink()
    packed.open()
    assert packed.pack.read_bytes() == packed.sound
    assert not left.exists()


def test_a_folder_in_the_place_of_the_file_is_an_error(packed: Packed) -> None:
    packed.pack.unlink()
    packed.pack.mkdir()
    try:
        with pytest.raises(Unavailable, match="cannot be written"):
            packed.open()
    finally:
        packed.pack.rmdir()
    packed.open()


def test_a_map_outlives_the_file_it_is_of(packed: Packed) -> None:
    model = packed.open()
    before = model.matrix(EMBEDDING)
    packed.pack.unlink()
    packed.pack.write_bytes(b"")
    np.testing.assert_array_equal(model.matrix(EMBEDDING), before)
    packed.assert_made_anew()


# Hostile model files


def pack_or_refuse(path: Path, folder: Path) -> None:
    """Whatever is in a file: it is refused, or every weight that native code is given is finite."""
    try:
        file = open_model_file(path)
        model = open_packed(file, sha256_of(path), folder)
    except (ModelFileCorrupt, UnsupportedModel) as error:
        assert error.message
        assert not list(folder.glob("*.partial"))
        return
    for name, shape in file.shapes.items():
        values = model.array(name) if model.kind(name) == "f32" else model.matrix(name)
        assert values.shape == shape
        assert np.isfinite(values).all()


@many
@given(data=st.data())
def test_altered_model_files_are_packed_or_refused(
    data: st.DataObject, packed: Packed, tmp_path_factory: pytest.TempPathFactory
) -> None:
    content = bytearray(packed.path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    folder = tmp_path_factory.mktemp("altered")
    path = folder / "altered.gguf"
    path.write_bytes(content)
    pack_or_refuse(path, folder)


@pytest.mark.filterwarnings("ignore::RuntimeWarning:gguf")
@pytest.mark.parametrize("type_", TENSOR_TYPES)
@settings(many, max_examples=20)
@given(seed=st.integers(0, 2**32 - 1), share=st.sampled_from([0.0, 0.001, 1.0]))
def test_weights_of_random_bytes_are_packed_or_refused(
    type_: str, seed: int, share: float, tmp_path_factory: pytest.TempPathFactory
) -> None:
    # `share` of the bytes are random; all of them make a scale that is not finite all but certain.
    block, size = GGML_QUANT_SIZES[Q[type_]]
    random = np.random.default_rng(seed)
    hidden = max(block, 32)
    raw = random.integers(1, 40, (8, hidden // block * size), dtype=np.uint8)
    noise = random.integers(0, 256, raw.shape, dtype=np.uint8)
    raw = np.where(random.random(raw.shape) < share, noise, raw)
    tensors = {name: np.ones((64, hidden) if "up" in name or "gate" in name else hidden, np.float32)
               for name in small_tensors()}  # fmt: skip
    tensors["blk.0.ffn_down.weight"] = np.ones((hidden, 64), np.float32)
    for part in ("q", "k", "v", "output"):
        tensors[f"blk.0.attn_{part}.weight"] = np.ones((hidden, hidden), np.float32)
    folder = tmp_path_factory.mktemp("random")
    metadata = {"llama.embedding_length": hidden, "llama.attention.head_count": 1, "llama.attention.head_count_kv": 1}
    hostile: dict[str, Any] = tensors | {"token_embd.weight": (raw, Q[type_])}
    pack_or_refuse(write_small_gguf(folder / "random.gguf", metadata=metadata, tensors=hostile), folder)
