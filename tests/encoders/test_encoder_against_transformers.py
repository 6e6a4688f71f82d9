"""The reference encoder against transformers: random encoders of true architectures, and the real default one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import AutoTokenizer, BertModel

from benchmarks.texts import sample_texts
from support.tiny_encoders import TinyEncoder, build_tiny_encoder, reference_vectors
from synapse.encoders.encoder import open_encoder_folder

pytestmark = pytest.mark.peer

ODD_TEXTS = ["", " ", "\n\t", "[SEP] <pad> <mask> [MASK]", "a\u0000b", "日本語 ☕ naïve", "x" * 200, "word " * 500]


def least_cosine(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    """Of rows of length 1."""
    assert a.shape == b.shape
    return float(np.einsum("ij,ij->i", a, b, dtype=np.float64).min())


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("architecture", ["bert", "xlm-roberta"])
def test_vectors_equal_those_of_transformers(tmp_path: Path, architecture: str, pooling: str) -> None:
    tiny = build_tiny_encoder(tmp_path / "tiny", architecture, pooling=pooling)
    texts = sample_texts(40) + ODD_TEXTS
    vectors = open_encoder_folder(tiny.folder).encode(texts)
    np.testing.assert_allclose(vectors, reference_vectors(tiny, texts), atol=3e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_may_be_stored_in_sixteen_bits(tmp_path: Path, dtype: torch.dtype) -> None:
    tiny = build_tiny_encoder(tmp_path / "tiny", dtype=dtype)
    tiny.reference.to(dtype).save_pretrained(tiny.folder)
    tiny.reference.float()
    texts = sample_texts(10)
    vectors = open_encoder_folder(tiny.folder).encode(texts)
    np.testing.assert_allclose(vectors, reference_vectors(tiny, texts), atol=3e-6)


BGE_SMALL = {"blocks": 3, "hidden": 384, "heads": 12, "intermediate": 1536, "max_tokens": 512}
BGE_BASE = {"blocks": 2, "hidden": 768, "heads": 12, "intermediate": 3072, "max_tokens": 512}
BGE_M3 = {"blocks": 2, "hidden": 1024, "heads": 16, "intermediate": 4096, "max_tokens": 8192}
"""With a few of their 12, 12 and 24 blocks, which are all alike."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "shape"),
    [
        pytest.param("bert", BGE_SMALL, id="BGE small"),
        pytest.param("bert", BGE_BASE, id="BGE base"),
        pytest.param("xlm-roberta", BGE_M3, id="BGE-M3"),
    ],
)
def test_the_shapes_of_real_encoders_work(tmp_path: Path, architecture: str, shape: dict[str, Any]) -> None:
    tiny = build_tiny_encoder(tmp_path / "shaped", architecture, pooling="cls", **shape)
    texts = [*sample_texts(6), "one of a thousand words " * 120]
    vectors = open_encoder_folder(tiny.folder).encode(texts)
    assert least_cosine(vectors, reference_vectors(tiny, texts)) > 0.99999


@pytest.fixture(scope="module")
def default_texts(default_encoder: Path) -> tuple[list[str], NDArray[np.float32]]:
    """Texts, and their vectors as sentence-transformers makes them: the mean over the tokens, of length 1."""
    texts = sample_texts(60)
    tiny = TinyEncoder(
        default_encoder,
        BertModel.from_pretrained(default_encoder, add_pooling_layer=False).eval(),
        AutoTokenizer.from_pretrained(default_encoder),
        "mean",
        256,
    )
    return texts, reference_vectors(tiny, texts)


def test_the_default_encoder_gives_the_vectors_of_transformers(
    default_encoder: Path, default_texts: tuple[list[str], NDArray[np.float32]]
) -> None:
    texts, expected = default_texts
    assert least_cosine(open_encoder_folder(default_encoder).encode(texts), expected) > 0.99999


def test_with_eight_bits_the_vectors_are_nearly_the_same(
    default_encoder: Path, default_texts: tuple[list[str], NDArray[np.float32]]
) -> None:
    texts, expected = default_texts
    cosine = least_cosine(open_encoder_folder(default_encoder, precision="int8").encode(texts), expected)
    assert 0.999 < cosine < 0.99999  # not so near that nothing was rounded
