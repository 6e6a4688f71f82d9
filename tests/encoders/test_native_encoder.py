"""An encoder whose linear maps the kernel computes gives the vectors of the one whose maps NumPy computes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from benchmarks.texts import sample_texts
from support.native_engine import engine_library
from support.tiny_encoders import build_tiny_encoder
from synapse.encoders.encoder import Encoder, open_encoder_folder
from synapse.encoders.linear import Linear
from synapse.encoders.transformer import ReferenceEncoder
from synapse.encoders.weights import load_encoder_weights
from synapse.engines.native.linear import Int8Map, Mapper
from synapse.models.encoder.file import open_encoder_file

Array = NDArray[np.float32]


def native_encoder(folder: Path, mapper: Mapper) -> Encoder:
    """The encoder of a folder, each of its maps computed by the kernel without a hot path."""

    def linear(weight: Array, bias: Array) -> Linear:
        rounded = Int8Map(weight, bias)
        return lambda x: mapper.apply(rounded, x)

    file = open_encoder_file(folder)
    return Encoder("native", file.config, file.tokenizer, ReferenceEncoder(load_encoder_weights(file, linear)))


@pytest.fixture(scope="module")
def mapper() -> Mapper:
    return Mapper(engine_library(), 2)


@pytest.mark.parametrize("architecture", ["bert", "xlm-roberta"])
def test_vectors_agree_with_the_reference(tmp_path: Path, mapper: Mapper, architecture: str) -> None:
    folder = build_tiny_encoder(tmp_path / "tiny", architecture).folder  # no width of it is a multiple of 32
    texts = [*sample_texts(30), ""]
    expected = open_encoder_folder(folder, "reference", precision="int8").encode(texts)
    np.testing.assert_allclose(native_encoder(folder, mapper).encode(texts), expected, atol=2e-4)


def test_vectors_of_the_default_encoder_stay_near_those_of_float32(default_encoder: Path, mapper: Mapper) -> None:
    texts = sample_texts(40)
    expected = open_encoder_folder(default_encoder).encode(texts)
    found = native_encoder(default_encoder, mapper).encode(texts)
    assert np.einsum("ij,ij->i", found, expected).min() > 0.999
