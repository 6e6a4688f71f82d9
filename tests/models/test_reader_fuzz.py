"""What native code is fed from: GGUF and safetensors files that were cut short, altered, or put together to do harm.

Reading one to its last weight gives right shapes or one kind of error; it never crashes, hangs or reads elsewhere.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf.constants import GGML_QUANT_SIZES
from gguf.constants import GGMLQuantizationType as Q
from gguf.quants import dequantize
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from support.peft_layers import BLOCKS, HIDDEN, VOCAB, tiny_config
from support.small_gguf import stored_as, write_small_gguf
from synapse.kernels.fatal_signals import install
from synapse.models.adapters.adapter import Adapter, LayerRefused, check_adapter
from synapse.models.errors import ModelFileCorrupt, UnsupportedModel
from synapse.models.gguf_file import TENSOR_TYPES, open_model_file

many = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

SPLICES = st.lists(
    st.tuples(
        st.sampled_from(["cut", "double", "swap", "noise", "ones", "number"]),
        st.floats(0, 1, exclude_max=True),
        st.floats(0, 1, exclude_max=True),
        st.integers(1, 300),
        st.integers(0, 2**32 - 1),
    ),
    min_size=1,
    max_size=4,
)
NUMBERS = (0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63 - 1, 2**63, 2**64 - 1)


def spliced(data: bytes, splices: list[tuple[str, float, float, int, int]], end: int) -> bytes:
    """`data` with pieces taken out, written twice or over one another; places lie before `end`."""
    altered = bytearray(data)
    for what, first, second, length, seed in splices:
        limit = min(end, len(altered))
        a, b = int(first * limit), int(second * limit)
        piece = bytes(altered[a : a + length])
        match what:
            case "cut":
                del altered[a : a + length]
            case "double":
                altered[b:b] = piece
            case "swap":
                altered[b : b + len(piece)] = piece
            case "noise":
                altered[a : a + length] = np.random.default_rng(seed).bytes(len(piece))
            case "ones":
                altered[a : a + length] = b"\xff" * len(piece)
            case "number":  # what counts, lengths and offsets are
                altered[a : a + 8] = NUMBERS[seed % len(NUMBERS)].to_bytes(8, "little")
    return bytes(altered)


# GGUF


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with matrices of many types."""
    types = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "F16", "BF16", "F32")
    tensors: dict[str, Any] = {}
    for index, name in enumerate(stored_as("F32")):
        tensors[name] = stored_as(types[index % len(types)])[name]
    return write_small_gguf(tmp_path_factory.mktemp("model") / "small.gguf", tensors=tensors)


def read_all(path: Path) -> bool:
    """Whether a file is sound; if so every weight has its shape, both as numbers and as the file has it."""
    started = time.monotonic()
    try:
        file = open_model_file(path)
        for name, shape in file.shapes.items():
            values = file.tensor(name)
            assert values.shape == shape
            assert values.dtype == np.float32
            if len(shape) == 2:
                block, size = GGML_QUANT_SIZES[file.types[name]]
                assert file.stored(name).shape == (shape[0], shape[1] // block * size)
    except (ModelFileCorrupt, UnsupportedModel) as error:
        assert error.message
        return False
    finally:
        assert time.monotonic() - started < 5
    return True


@pytest.mark.filterwarnings("ignore::RuntimeWarning:gguf")
@many
@given(splices=SPLICES, header_only=st.booleans())
def test_a_spliced_gguf_file_is_read_to_the_end_or_refused(
    model: Path, splices: list[tuple[str, float, float, int, int]], header_only: bool
) -> None:
    altered = model.with_name("spliced.gguf")
    data = model.read_bytes()
    altered.write_bytes(spliced(data, splices, 1500 if header_only else len(data)))
    read_all(altered)


@pytest.mark.filterwarnings("ignore::RuntimeWarning:gguf")
@many
@given(changes=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=8))
def test_a_gguf_file_with_altered_bytes_is_read_to_the_end_or_refused(
    model: Path, changes: list[tuple[float, int]]
) -> None:
    data = bytearray(model.read_bytes())
    for place, value in changes:
        data[int(place * len(data))] = value
    altered = model.with_name("altered.gguf")
    altered.write_bytes(data)
    read_all(altered)


def test_a_gguf_file_cut_short_between_any_two_tensors_is_refused(model: Path) -> None:
    data = model.read_bytes()
    assert read_all(model)
    cut = model.with_name("cut.gguf")
    for length in range(0, len(data), 509):
        cut.write_bytes(data[:length])
        assert not read_all(cut)


@pytest.mark.filterwarnings("ignore::RuntimeWarning:gguf")
@pytest.mark.parametrize("type_", TENSOR_TYPES)
@settings(many, max_examples=30)
@given(seed=st.integers(0, 2**32 - 1))
def test_weights_of_random_bytes_are_what_gguf_makes_of_them(type_: str, seed: int, model: Path) -> None:
    block, size = GGML_QUANT_SIZES[Q[type_]]
    hidden = max(block, 32)
    raw = np.random.default_rng(seed).integers(0, 256, (64, hidden // block * size), dtype=np.uint8)
    square = np.zeros((hidden, hidden), np.float32)
    flat = np.zeros((64, hidden), np.float32)
    tensors: dict[str, Any] = {f"blk.0.attn_{part}.weight": square for part in ("q", "k", "v", "output")}
    tensors |= {f"{name}norm.weight": square[0] for name in ("output_", "blk.0.attn_", "blk.0.ffn_")}
    tensors |= {"blk.0.ffn_gate.weight": flat, "blk.0.ffn_up.weight": flat, "blk.0.ffn_down.weight": flat.T.copy()}
    tensors["token_embd.weight"] = (raw, Q[type_])
    metadata = {"llama.embedding_length": hidden, "llama.attention.head_count": 1, "llama.attention.head_count_kv": 1}
    path = write_small_gguf(model.with_name("random.gguf"), metadata=metadata, tensors=tensors)
    file = open_model_file(path)
    expected = np.asarray(dequantize(raw, Q[type_])).reshape(64, hidden)
    np.testing.assert_array_equal(file.embedding(), expected)
    np.testing.assert_array_equal(file.stored("token_embd.weight"), raw)


READ_AFTER = """
import os, sys
from pathlib import Path
from synapse.models.errors import ModelFileCorrupt
from synapse.models.gguf_file import open_model_file
path = Path(sys.argv[1])
file = open_model_file(path)
raw = file.stored("blk.0.ffn_down.weight")
os.truncate(path, 4096)
try:
    file.{call}
except ModelFileCorrupt as error:
    print(error.message)
"""


def after_truncation(call: str, model: Path, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    path = tmp_path / "shrinks.gguf"
    path.write_bytes(model.read_bytes())
    command = [sys.executable, "-c", READ_AFTER.replace("{call}", call), str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("call", ['tensor("output_norm.weight")', "embedding()", 'stored("token_embd.weight")'])
def test_a_file_that_becomes_shorter_while_it_is_open_is_refused(call: str, model: Path, tmp_path: Path) -> None:
    ended = after_truncation(call, model, tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert f"had {model.stat().st_size} bytes when it was opened, and now has 4096" in ended.stdout


@pytest.mark.skipif(not install(), reason="no handler for this machine")
def test_a_view_that_was_handed_out_before_reads_zeros_and_the_file_is_refused(model: Path, tmp_path: Path) -> None:
    ended = after_truncation("path and print(raw.max()) or file.check_whole()", model, tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.startswith("0\n")
    assert "and now has 4096" in ended.stdout


def test_a_file_that_is_deleted_or_replaced_while_it_is_open_stays_as_it_was(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "goes.gguf"
    path.write_bytes(model.read_bytes())
    file = open_model_file(path)
    expected = file.embedding()
    path.unlink()
    np.testing.assert_array_equal(file.embedding(), expected)
    path.write_bytes(bytes(len(model.read_bytes())))
    np.testing.assert_array_equal(file.embedding(), expected)


# Safetensors, as LoRA layers

CONFIG: dict[str, Any] = {
    "peft_type": "LORA",
    "r": 4,
    "lora_alpha": 8,
    "target_modules": ["q_proj", "v_proj"],
    "base_model_name_or_path": None,
}


def sound_layer(dtype: type) -> tuple[bytes, bytes]:
    """The two files of a layer that fits `tiny_config`."""
    config, random = tiny_config(), np.random.default_rng(0)
    tensors: dict[str, Any] = {}
    for block in range(BLOCKS):
        for projection in ("q_proj", "v_proj"):
            out, size = config.linear_shape(projection)
            name = f"base_model.model.model.layers.{block}.self_attn.{projection}.lora_{{}}.weight"
            tensors[name.format("A")] = random.standard_normal((4, size)).astype(dtype)
            tensors[name.format("B")] = random.standard_normal((out, 4)).astype(dtype)
    return json.dumps(CONFIG).encode(), save(tensors)


def taken(config: bytes, weights: bytes) -> Adapter | None:
    """The layer, when it is sound: then all that native code would be given of it is."""
    started = time.monotonic()
    try:
        adapter = check_adapter(config, weights, tiny_config())
    except LayerRefused as error:
        assert error.reason
        assert error.message
        return None
    finally:
        assert time.monotonic() - started < 5
    for (block, projection), factors in adapter.factors.items():
        out, size = tiny_config().linear_shape(projection)
        rank = len(factors.A)
        assert 0 <= block < BLOCKS
        assert 1 <= rank <= 256
        assert (factors.A.shape, factors.B.shape) == ((rank, size), (out, rank))
        assert np.isfinite(factors.A).all()
        assert np.isfinite(factors.B).all()
        assert np.isfinite(factors.scale)
    return adapter


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_layer_cut_short_anywhere_is_refused(dtype: type) -> None:
    config, weights = sound_layer(dtype)
    assert taken(config, weights)
    for length in [*range(0, 1200), *range(1200, len(weights), 97), len(weights) - 1]:
        assert taken(config, weights[:length]) is None
    for length in range(len(config)):
        assert taken(config[:length], weights) is None


@many
@given(splices=SPLICES, header_only=st.booleans(), dtype=st.sampled_from([np.float32, np.float16]))
def test_spliced_weights_of_a_layer_are_sound_or_refused(
    splices: list[tuple[str, float, float, int, int]], header_only: bool, dtype: type
) -> None:
    config, weights = sound_layer(dtype)
    taken(config, spliced(weights, splices, 1200 if header_only else len(weights)))


@many
@given(splices=SPLICES)
def test_a_spliced_config_of_a_layer_is_sound_or_refused(splices: list[tuple[str, float, float, int, int]]) -> None:
    config, weights = sound_layer(np.float32)
    taken(spliced(config, splices, len(config)), weights)


@many
@given(changes=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=8))
def test_altered_bytes_of_a_layer_are_sound_or_refused(changes: list[tuple[float, int]]) -> None:
    config, weights = sound_layer(np.float32)
    altered = bytearray(weights)
    for place, value in changes:
        altered[int(place * len(altered))] = value
    taken(config, bytes(altered))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@many
@given(field=st.sampled_from(["r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern"]), value=JSON)
def test_any_value_in_the_config_of_a_layer_is_sound_or_refused(field: str, value: object) -> None:
    _, weights = sound_layer(np.float32)
    taken(json.dumps(CONFIG | {field: value}).encode(), weights)


@many
@given(
    place=st.integers(0, 2 * BLOCKS * 2 - 1),
    key=st.sampled_from(["dtype", "shape", "data_offsets"]),
    value=JSON | st.lists(st.sampled_from([0, 1, 4, HIDDEN, VOCAB, -1, 2**31, 2**62, 2**63]), max_size=3),
)
def test_any_value_in_the_header_of_a_layer_is_sound_or_refused(place: int, key: str, value: object) -> None:
    config, weights = sound_layer(np.float32)
    length = int.from_bytes(weights[:8], "little")
    header = json.loads(weights[8 : 8 + length])
    header[sorted(header)[place]][key] = value
    encoded = json.dumps(header).encode()
    taken(config, len(encoded).to_bytes(8, "little") + encoded + weights[8 + length :])
