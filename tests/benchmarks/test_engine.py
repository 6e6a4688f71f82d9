"""`python -m benchmarks.engine`: what it measures, and what it counts."""

from __future__ import annotations

import json
import math
import mmap
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from benchmarks import engine_limits, engine_quality, engine_speed
from benchmarks.engine_memory import resident_memory
from benchmarks.engine_peers import LlamaCpp
from benchmarks.engine_quality import WINDOW, Comparison, Surprise
from benchmarks.engine_speed import OURS, WORKS, Work
from benchmarks.layers import random_adapter
from benchmarks.lora_gguf import interleaved, write_lora_gguf
from benchmarks.neighbours import Neighbours
from support.tiny_models import build_tiny_model
from synapse.engines import Engine, Limits
from synapse.engines.opening import open_engine_file
from synapse.errors import InvalidInput, Unavailable
from synapse.models.adapters.adapter import read_adapter
from synapse.models.gguf_file import open_model_file

ROOT = Path(__file__).parents[2]
CONTEXT = 1024


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("model") / "tiny.gguf", context=CONTEXT).path


@pytest.fixture
def engine(tiny_model: Path) -> Iterator[Engine]:
    engine = open_engine_file(tiny_model, "reference", Limits(threads=1, kv_cache_tokens=4096))
    yield engine
    engine.close()


def test_the_text_is_cut_into_whole_windows_and_is_the_same_each_time(engine: Engine) -> None:
    windows = engine_quality.windows(engine.tokenizer, WINDOW + 1)
    assert [len(window) for window in windows] == [WINDOW, WINDOW]
    assert windows == engine_quality.windows(engine.tokenizer, 2 * WINDOW)
    with pytest.raises(InvalidInput, match="the text has"):
        engine_quality.windows(engine.tokenizer, 10**8)


def test_divergence_is_that_of_the_distributions() -> None:
    truth = np.log(np.array([[0.5, 0.25, 0.25]], np.float32)) + 3
    other = np.log(np.array([[0.25, 0.5, 0.25]], np.float32)) - 7
    same, different = Comparison(), Comparison()
    same.add(truth, truth - 1)
    different.add(truth, other)
    assert same.divergence == pytest.approx(0, abs=1e-6)
    assert (same.agreed, same.positions) == (1, 1)
    assert different.divergence == pytest.approx(0.5 * math.log(2) - 0.25 * math.log(2), rel=1e-5)
    assert different.agreed == 0


def test_the_perplexity_of_knowing_nothing_is_the_size_of_the_vocabulary() -> None:
    surprise = Surprise()
    surprise.add(range(130), np.zeros((130, 300), np.float32))
    assert surprise.tokens == 129
    assert surprise.perplexity == pytest.approx(300)


def test_perplexity_is_about_the_token_that_follows() -> None:
    logits = np.zeros((3, 4), np.float32)
    logits[0, 2] = logits[1, 3] = 50  # sure, and right; what follows the last token is not known
    surprise = Surprise()
    surprise.add([1, 2, 3], logits)
    assert surprise.perplexity == pytest.approx(1)


def test_a_model_is_compared_on_some_windows_and_measured_on_all(engine: Engine) -> None:
    windows = engine_quality.windows(engine.tokenizer, 2 * WINDOW)

    def truth(tokens: engine_quality.Tokens, layer: bool) -> Any:
        return engine.logits(tokens) * (2 if layer else 1)

    def peer(tokens: engine_quality.Tokens, layer: bool) -> Any:
        return engine.logits(tokens)

    quality = engine_quality.measure(truth, {"ours": truth}, {"peer": peer}, windows, compared=1, say=print)
    rows = {(row["contender"], row["layer"]): row for row in quality.divergence_rows()}
    assert len(rows) == 4
    assert all(row["positions"] == WINDOW for row in rows.values())
    assert rows["ours", "none"]["mean_divergence"] == rows["peer", "none"]["mean_divergence"] == 0
    with_layer = {name: row["mean_divergence"] for (name, layer), row in rows.items() if layer != "none"}
    assert with_layer["ours"] == 0
    assert with_layer["peer"] > 0.01
    perplexity = {row["contender"]: row for row in quality.perplexity_rows()}
    assert perplexity.keys() == {"float32", "ours"}
    assert perplexity["ours"]["tokens"] == 2 * (WINDOW - 1)
    assert perplexity["ours"]["to_float32"] == 1


def test_contenders_take_turns_and_the_first_round_is_not_counted() -> None:
    turns: list[str] = []

    def contender(name: str) -> engine_speed.Turn:
        def turn() -> float:
            turns.append(name)
            return float(len(turns))

        return turn

    speeds = engine_speed.take_turns({name: contender(name) for name in "ab"}, rounds=2, neighbours=Neighbours())
    assert turns == ["a", "b", "b", "a", "a", "b"]
    assert speeds == {"a": [4.0, 5.0], "b": [3.0, 6.0]}


def test_a_format_far_from_the_fastest_drops_out_after_the_first_round_and_nobody_else_does() -> None:
    contenders = {OURS: 1.0, "llama.cpp Q4_0": 50.0, "llama.cpp Q8_0": 26.0, "llama.cpp BF16": 24.0}
    turns = {name: lambda speed=speed: speed for name, speed in contenders.items()}
    speeds = engine_speed.take_turns(turns, rounds=2, neighbours=Neighbours())
    assert speeds == {OURS: [1.0] * 2, "llama.cpp Q4_0": [50.0] * 2, "llama.cpp Q8_0": [26.0] * 2}


def test_the_ratio_is_against_the_fastest_format() -> None:
    work = Work("some", at_least={"llama.cpp": 2.0})
    speeds = {OURS: [30.0, 10.0, 20.0], "llama.cpp Q4_0": [4.0, 5.0, 6.0], "llama.cpp Q8_0": [3.0, 3.0, 9.0]}
    assert engine_speed.ratios(work, speeds) == [
        {"work": "some", "against": "llama.cpp Q4_0", "ratio": 4.0, "at_least": 2.0}
    ]
    assert engine_speed.ratios(work, {OURS: [1.0]}) == []


@pytest.mark.parametrize("work", WORKS[2:], ids=lambda work: work.name)
def test_work_leaves_the_engine_empty(engine: Engine, work: Work) -> None:
    contenders = engine_speed.Contenders(engine, None, None, (), ())
    turns = engine_speed.turns(work, contenders, tokens=3)
    assert OURS in turns
    assert all(name.startswith(OURS) for name in turns)
    for turn in [*turns.values(), turns[OURS]]:
        assert turn() > 0
    assert not engine.busy
    rows = engine_speed.PREFILL_TOKENS if work.prefill else work.sequences * engine_speed.PROMPT_TOKENS
    assert engine.counters.prefill_tokens >= rows * (2 if work.prefill else 1)


def test_prompts_have_the_length_and_no_common_beginning(engine: Engine) -> None:
    one, other = (engine_speed.prompt(engine, 70, salt) for salt in (1, 2))
    assert len(one) == len(other) == 70
    assert one[0] != other[0]


def test_the_limit_of_one_sequence_is_its_bytes_over_the_bandwidth(engine: Engine) -> None:
    machine = engine_limits.Machine(bandwidth=1e6, float_peak=1e15)
    alone = next(work for work in WORKS if work.sequences == 1 and not work.prefill)
    row = engine_limits.limits(engine, machine, alone, rank=16, tokens=2, reached=0.5)
    cache = 2 * 2 * 16 * 2 * 4 * 65  # blocks, heads of keys and values, their dimensions, bytes, tokens
    assert row["bytes"] == engine.weight_bytes + cache
    assert row["bound_by"] == "memory"
    assert row["share"] == pytest.approx(0.5 * row["bytes"] / 1e6)
    slow = engine_limits.Machine(bandwidth=1e15, float_peak=1e6)
    assert engine_limits.limits(engine, slow, alone, rank=16, tokens=2, reached=1)["bound_by"] == "arithmetic"


def test_resident_memory_grows_with_what_is_touched() -> None:
    before = resident_memory()["resident_bytes"]
    held = np.frombuffer(mmap.mmap(-1, 64 * 2**20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), np.uint8)
    held[:] = 1  # memory that nobody of this process has had before
    assert resident_memory()["resident_bytes"] - before > held.nbytes // 2


def test_an_adapter_says_the_same_as_gguf(tiny_model: Path, tmp_path: Path) -> None:
    config = open_model_file(tiny_model).config
    folder = random_adapter(tmp_path / "layer", config, rank=4, seed=1, strength=3)
    written = gguf.GGUFReader(write_lora_gguf(folder, tmp_path / "layer.gguf", config, np.float32))
    fields = {name: field.contents() for name, field in written.fields.items()}
    assert (fields["general.type"], fields["adapter.type"]) == ("adapter", "lora")
    tensors = {tensor.name: tensor.data for tensor in written.tensors}
    factors = read_adapter(folder, config).factors
    assert len(tensors) == 2 * len(factors)
    scale = fields["adapter.lora.alpha"] / 4
    for (block, projection), name in (((1, "v_proj"), "attn_v"), ((0, "down_proj"), "ffn_down")):
        a, b = (tensors[f"blk.{block}.{name}.weight.lora_{factor}"] for factor in "ab")
        expected = factors[block, projection]
        np.testing.assert_allclose(scale * b @ a, expected.scale * expected.B @ expected.A, rtol=1e-5)
    queries = factors[0, "q_proj"]
    rows = interleaved(queries.B, config.heads)
    np.testing.assert_array_equal(tensors["blk.0.attn_q.weight.lora_b"], rows)
    assert not np.array_equal(rows, queries.B)


def test_rows_are_interleaved_as_llama_files_have_them() -> None:
    rows = np.arange(12, dtype=np.float32)[:, None]  # two heads of six: halves 0 1 2 | 3 4 5
    assert interleaved(rows, heads=2)[:, 0].tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]


def test_without_a_peer_the_reason_says_how_to_get_one() -> None:
    with pytest.raises(Unavailable) as failure:
        LlamaCpp(sys.executable)
    assert "pip install llama-cpp-python" in str(failure.value.hint)
    with pytest.raises(Unavailable, match="cannot be run"):
        LlamaCpp("/no/such/python")


@pytest.mark.slow
def test_a_quick_run_prints_everything_as_json(tiny_model: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.engine", "--quick", "--quality", "--peers", "--json"]
    command += ["--model", str(tiny_model), "--backend", "reference"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    document = json.loads(done.stdout)
    assert "pip install llama-cpp-python" in done.stderr
    assert document["settings"]["backend"] == "reference"
    ratios = {row["against"] for row in document["rows"]["ratios"]}
    assert ratios == {engine_speed.OURS_ONE_LAYER, engine_speed.OURS_GREEDY}
    for work in WORKS:
        rows = document["rows"][f"tokens per second: {work.name}"]
        assert all(row["tokens_per_second"] > 0 for row in rows)
    assert [row["work"] for row in document["rows"]["limits"]] == [work.name for work in WORKS]
    assert [row["start"] for row in document["rows"]["worker with 20 layers"]] == ["first", "second"]
    assert document["rows"]["perplexity"][0]["tokens"] == 2 * (WINDOW - 1)
    assert document["figures"]["worker_resident_bytes"] > 2**20
