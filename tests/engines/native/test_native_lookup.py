"""Prompt lookup on the native engine: a row's logits do not depend on those beside it, so the text stays the same."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from engines.test_lookup import QUOTED, SETTINGS
from support.engine_runs import run
from support.native_engine import living_in, tiny_adapter, write_adapter
from synapse.engines import Engine, Limits, Request
from synapse.engines.opening import open_engine_file
from synapse.engines.reference.transformer import Chunk

Pair = tuple[Engine, Engine]


@pytest.fixture(scope="module")
def pair(default_model: Path, native_home: Path) -> Iterator[Pair]:
    """An engine that guesses and one that does not."""
    with living_in(native_home):
        engines = tuple(
            open_engine_file(default_model, "native", Limits(max_context=512, prompt_lookup=on)) for on in (True, False)
        )
    yield engines  # type: ignore[misc]
    for engine in engines:
        engine.close()


@pytest.fixture(scope="module")
def layer(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = write_adapter(tmp_path_factory.mktemp("layers") / "loud", tiny_adapter(pair[0].config, size=0.1))
    (layer,) = {engine.load_layer(folder) for engine in pair}
    return layer


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("layered", [False, True])
def test_the_text_is_the_same_as_without(pair: Pair, layer: str, name: str, layered: bool) -> None:
    request = Request(
        tuple(pair[0].tokenizer.encode(QUOTED)),
        layers=((layer, 1.0),) if layered else (),
        sampling=SETTINGS[name],
        max_tokens=48,
    )
    with_guesses, without = (run(engine, request)[0] for engine in pair)
    assert with_guesses.tokens == without.tokens
    if name == "greedy" and not layered:
        assert pair[0].counters.right_guesses > 0


@pytest.mark.parametrize("rows", [2, 3, 4, 5, 8])
def test_logits_of_a_row_are_the_same_bits_whatever_rows_share_the_step(pair: Pair, layer: str, rows: int) -> None:
    engine = pair[0]
    tokens = np.asarray(engine.tokenizer.encode(QUOTED), np.intp)
    transformer = engine._transformer
    stack = ((engine.layers.get(layer), 1.0),)
    before = len(tokens) - rows
    alone, together = [], np.empty(0)
    for step in (1, rows):
        cache = transformer.new_cache(4)
        table = np.arange(4)
        transformer.forward([Chunk(tokens[:before], 0, table, stack, 1)], cache)
        for start in range(before, len(tokens), step):
            found = transformer.forward([Chunk(tokens[start : start + step], start, table, stack, step)], cache).values
            if step == 1:
                alone.append(found[0].copy())
            else:
                together = found.copy()
    np.testing.assert_array_equal(together, np.stack(alone))
