"""The default model on real text: how far its answers are from those in float32."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from benchmarks.texts import SENTENCES
from support.default_model import put_packed
from support.engine_runs import run
from support.native_engine import (
    Logits,
    distances,
    divergences,
    living_in,
    log_softmax,
    tiny_adapter,
    write_adapter,
)
from synapse.engines import Engine, Limits, Request, Sampling
from synapse.engines.native.kernel import TOLERANCE
from synapse.engines.native.packed.file import Quantisation
from synapse.engines.native.transformer import NativeTransformer
from synapse.engines.opening import open_engine_file
from synapse.engines.reference.transformer import Chunk
from synapse.models.chat_template import Message, encode_chat

LIMITS = Limits(max_context=512, threads=2, layer_precision="float16")
BOUND: dict[Quantisation, float] = {"auto": 0.01, "int8": 0.004, "4bit": 0.01}
"""Mean divergence from the model's own float32 answers, in nats a token."""
LOSS: dict[Quantisation, float] = {"auto": 0.05, "int8": 0.005, "4bit": 0.05}
"""Difference of the mean loss, in nats a token."""


@pytest.fixture(scope="module")
def exact(default_model: Path) -> Engine:
    return open_engine_file(default_model, "reference", LIMITS)


@pytest.fixture(scope="module", params=get_args(Quantisation))
def engine(request: pytest.FixtureRequest, default_model: Path, native_home: Path) -> Iterator[Engine]:
    put_packed(native_home, request.param)
    with living_in(native_home):
        opened = open_engine_file(default_model, "native", replace(LIMITS, quantisation=request.param))
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def text(exact: Engine) -> list[int]:
    """Sentences of many kinds and languages, 400 tokens of them."""
    return exact.tokenizer.encode(" ".join(SENTENCES), special=False)[:400]


@pytest.fixture(scope="module")
def expected(exact: Engine, text: list[int]) -> Logits:
    return exact.logits(text)


@pytest.fixture(scope="module")
def layer_folder(exact: Engine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A layer that matters."""
    adapter = tiny_adapter(exact.config, rank=16, size=0.4)
    return write_adapter(tmp_path_factory.mktemp("layers") / "layer", adapter, "BF16")


@pytest.fixture(scope="module")
def with_layer(exact: Engine, text: list[int], expected: Logits, layer_folder: Path) -> Logits:
    """What the layer makes of half of the text."""
    logits = exact.logits(text[:200], ((exact.load_layer(layer_folder), 1.0),))
    assert divergences(expected[:200], logits).mean() > 0.05
    return logits


@pytest.fixture(scope="module")
def question(exact: Engine) -> list[int]:
    return encode_chat(exact.tokenizer, exact.chat_template, [Message("user", "What is the capital of France?")])


@pytest.fixture(scope="module")
def likely(exact: Engine, question: list[int]) -> list[int]:
    """The three tokens that are the likeliest beginnings of its answer."""
    return np.argsort(-exact.logits(question)[-1])[:3].tolist()


@pytest.mark.usefixtures("at_home")
def test_real_text_is_as_likely_as_in_float32(engine: Engine, text: list[int], expected: Logits) -> None:
    quantisation = engine.limits.quantisation
    found = engine.logits(text)
    assert divergences(found, expected).mean() < BOUND[quantisation]
    next_tokens = np.arange(len(text) - 1), text[1:]
    mine, theirs = (-log_softmax(logits[:-1])[next_tokens].mean() for logits in (found, expected))
    assert abs(mine - theirs) < LOSS[quantisation]


@pytest.mark.usefixtures("at_home")
def test_real_text_keeps_well_inside_what_counts_as_agreement(engine: Engine, text: list[int]) -> None:
    """A step that is compared and found too far off takes the kernel out of service."""
    native = engine._transformer
    assert isinstance(native, NativeTransformer)
    assert native._model is not None
    chunk = Chunk(np.asarray(text[:200]), 0, np.arange(7), (), 200)
    same_weights = native._model.reference.forward([chunk], native.new_cache(7)).values
    assert distances(engine.logits(text[:200]), same_weights).max() < TOLERANCE / 2


@pytest.mark.usefixtures("at_home")
def test_a_layer_changes_real_answers_as_it_does_in_float32(
    engine: Engine, text: list[int], layer_folder: Path, with_layer: Logits
) -> None:
    found = engine.logits(text[:200], ((engine.load_layer(layer_folder), 1.0),))
    assert divergences(found, with_layer).mean() < 3 * BOUND[engine.limits.quantisation]


@pytest.mark.usefixtures("at_home")
def test_an_answer_begins_with_what_float32_thinks_likely(
    engine: Engine, question: list[int], likely: list[int]
) -> None:
    """In float32 two beginnings of this answer are nearly as likely, and rounding decides between them."""
    (answer,) = run(engine, Request(tuple(question), sampling=Sampling(temperature=0), max_tokens=30))
    assert answer.tokens[0] in likely
