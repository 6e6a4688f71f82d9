"""What an encoder promises, whatever its weights: order, length 1, independence of company, clear refusals."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from benchmarks.texts import sample_texts
from support.small_gguf import write_small_gguf
from support.tiny_encoders import build_tiny_encoder
from synapse.commands import Context
from synapse.config import load_settings
from synapse.encoders import Encoder, open_encoder
from synapse.encoders import transformer as encoder_transformer
from synapse.encoders.encoder import BATCH_TOKENS, batches, open_encoder_folder
from synapse.encoders.transformer import erf, gelu
from synapse.errors import InvalidInput, NotFound, Unavailable
from synapse.models.errors import ModelFileCorrupt, UnsupportedModel
from synapse.models.library import ModelNotFound, open_library


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_encoder(tmp_path_factory.mktemp("encoders") / "tiny").folder


@pytest.fixture(scope="module")
def encoder(folder: Path) -> Encoder:
    return open_encoder_folder(folder)


def test_texts_that_mean_similar_things_are_near(default_encoder: Path) -> None:
    question, *answers = [
        "How do I get my money back?",
        "Refunds are paid within ten days.",
        "The cat is asleep on the sofa.",
    ]
    vectors = open_encoder_folder(default_encoder).encode([question, *answers])
    near, far = vectors[1:] @ vectors[0]
    assert near > far + 0.2


def test_vectors_have_length_one_and_the_order_of_the_texts(encoder: Encoder) -> None:
    texts = [*sample_texts(50), ""]
    vectors = encoder.encode(texts)
    assert vectors.shape == (51, encoder.dimensions)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-6)
    np.testing.assert_allclose(encoder.encode(texts[::-1])[::-1], vectors, atol=1e-6)


def test_a_vector_does_not_depend_on_the_other_texts(encoder: Encoder) -> None:
    texts = sample_texts(20)
    alone = np.concatenate([encoder.encode([text]) for text in texts])
    np.testing.assert_allclose(encoder.encode(texts + texts * 2)[:20], alone, atol=1e-6)


def test_several_threads_may_encode_at_once(encoder: Encoder) -> None:
    texts = sample_texts(30)
    expected = encoder.encode(texts)
    with ThreadPoolExecutor(4) as pool:
        for vectors in pool.map(encoder.encode, [texts] * 8):
            np.testing.assert_allclose(vectors, expected, atol=1e-6)


def test_of_a_text_that_is_too_long_the_beginning_counts(encoder: Encoder) -> None:
    long = "ferry harbour " * 100
    (tokens,) = encoder.tokenize([long])
    assert tokens.truncated
    assert len(tokens.ids) == encoder.max_tokens
    np.testing.assert_array_equal(encoder.encode([long]), encoder.encode([long + "and much more"]))
    assert not encoder.tokenize(["ferry"])[0].truncated


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([], "no text to encode"),
        ("a text", "a list of texts"),
        (["a", None], "number 1 is of the type NoneType"),
        ([b"a"], "number 0 is of the type bytes"),
    ],
)
def test_what_is_no_list_of_texts_is_refused(encoder: Encoder, texts: Any, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        encoder.encode(texts)


def test_characters_that_utf8_cannot_carry_are_read_as_unknown_ones(encoder: Encoder) -> None:
    np.testing.assert_array_equal(encoder.encode(["a \ud800 b"]), encoder.encode(["a \ufffd b"]))


@given(st.lists(st.integers(1, 600), max_size=40))
def test_every_text_is_in_one_batch_and_no_batch_is_too_large(lengths: list[int]) -> None:
    found = list(batches(lengths))
    assert sorted(index for batch in found for index in batch) == list(range(len(lengths)))
    for batch in found:
        assert len(batch) == 1 or sum(lengths[index] for index in batch) <= BATCH_TOKENS


def test_attention_in_pieces_is_the_same(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = sample_texts(8)
    whole = encoder.encode(texts)
    monkeypatch.setattr(encoder_transformer, "MOST_SCORES", 500)
    np.testing.assert_allclose(encoder.encode(texts), whole, atol=1e-6)


def test_erf_is_the_error_function() -> None:
    x = np.concatenate([np.linspace(-5, 5, 20_001), [0.0, -0.0, 1e-30, 1e30, -1e30, np.inf, -np.inf]]).astype(
        np.float32
    )
    np.testing.assert_allclose(erf(x), [math.erf(each) for each in x.tolist()], atol=5e-7)
    assert np.isnan(erf(np.array([np.nan], np.float32))).all()


def test_gelu_is_exact_for_any_layout_of_memory() -> None:
    x = np.random.default_rng(3).normal(0, 2, (40, 24)).astype(np.float32)
    expected = [[v * 0.5 * (1 + math.erf(v / math.sqrt(2))) for v in row] for row in x[:, :20].tolist()]
    np.testing.assert_allclose(gelu(x.copy()[:, :20]), expected, atol=2e-6)
    np.testing.assert_allclose(gelu(x[:, :20].copy()), expected, atol=2e-6)


def test_weights_that_overflow_are_named(folder: Path, tmp_path: Path) -> None:
    build_tiny_encoder(tmp_path / "huge")
    weights = load_file(tmp_path / "huge" / "model.safetensors")
    weights["encoder.layer.0.output.dense.weight"][:] = 3e38
    save_file(weights, tmp_path / "huge" / "model.safetensors")
    with pytest.raises(ModelFileCorrupt, match="not finite"):
        open_encoder_folder(tmp_path / "huge").encode(["a text"])


# Opening


def test_what_is_not_there_yet_can_be_pulled() -> None:
    with pytest.raises(ModelNotFound) as caught:
        open_encoder()
    assert caught.value.hint == "pull it: synapse model pull all-minilm-l6-v2"


async def test_an_encoder_is_opened_by_name_and_a_chat_model_is_not_one(folder: Path, tmp_path: Path) -> None:
    async with Context(load_settings()) as context:
        library = await context.get(open_library)
        await library.pull(str(folder), name="mine")
        await library.pull(str(write_small_gguf(tmp_path / "chat.gguf")), name="chat")
    encoder = open_encoder("mine")
    assert (encoder.name, encoder.dimensions, encoder.max_tokens) == ("mine", 48, 64)
    np.testing.assert_array_equal(open_encoder(str(folder)).encode(["a"]), encoder.encode(["a"]))
    with pytest.raises(UnsupportedModel, match="chat is a chat model"):
        open_encoder("chat")
    with pytest.raises(UnsupportedModel, match="mine is an encoder"):
        library.resolve("mine")


def test_what_cannot_be_chosen_is_refused(folder: Path) -> None:
    with pytest.raises(InvalidInput, match="precision is float32 or int8"):
        open_encoder_folder(folder, precision="int3")  # type: ignore[arg-type]
    with pytest.raises(InvalidInput, match="backend"):
        open_encoder_folder(folder, "gpu")  # type: ignore[arg-type]
    with pytest.raises(Unavailable, match="eight-bit weights only"):
        open_encoder_folder(folder, "native")
    with pytest.raises((NotFound, Unavailable), match=r"not built|turned off"):
        open_encoder_folder(folder, "native", precision="int8")
