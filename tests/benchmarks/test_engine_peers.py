"""llama.cpp as the benchmark runs it: the same model, the same layers, the same answers.

Needs the Python of an environment with llama-cpp-python in SYNAPSE_PEER_PYTHON.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from benchmarks.engine_peers import LlamaCpp, Peer, open_peers
from benchmarks.engine_quality import Comparison
from benchmarks.layers import random_adapter
from support.tiny_models import build_tiny_model
from synapse.engines import Engine, Limits
from synapse.engines.opening import open_engine_file
from synapse.errors import Unavailable

PYTHON = os.environ.get("SYNAPSE_PEER_PYTHON", "")
TOKENS = list(range(3, 203))

pytestmark = [pytest.mark.peer, pytest.mark.skipif(not PYTHON, reason="SYNAPSE_PEER_PYTHON names no Python")]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("model") / "tiny.gguf", context=1024).path


@pytest.fixture(scope="module")
def engine(model: Path) -> Iterator[Engine]:
    engine = open_engine_file(model, "reference", Limits(threads=1))
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def layers(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("layers")
    return [random_adapter(folder / str(i), engine.config, rank=4, seed=i, strength=50) for i in range(3)]


@pytest.fixture(scope="module")
def peers(
    model: Path, engine: Engine, layers: list[Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Peer]]:
    folder = tmp_path_factory.mktemp("llama")
    with LlamaCpp(PYTHON) as worker:
        found = open_peers(worker, model, layers, engine.config, folder=folder, formats=["Q8_0"])
        yield {peer.format: peer for peer in found}


def divergence(truth: NDArray[np.float32], logits: NDArray[np.float32]) -> float:
    comparison = Comparison()
    comparison.add(truth, logits)
    return comparison.divergence / comparison.positions


def test_logits_are_ours_with_and_without_a_layer(engine: Engine, layers: list[Path], peers: dict[str, Peer]) -> None:
    peer = peers["as shipped"]
    plain = engine.logits(TOKENS)
    assert divergence(plain, peer.logits(TOKENS, None)) < 1e-4
    for i in (2, 0):
        layered = engine.logits(TOKENS, ((engine.load_layer(layers[i]), 1.0),))
        assert divergence(layered, peer.logits(TOKENS, i)) < 1e-4
        assert divergence(layered, plain) > 1e-2
    assert divergence(plain, peer.logits(TOKENS, None)) < 1e-4


def test_other_formats_are_made_and_differ(engine: Engine, peers: dict[str, Peer]) -> None:
    assert 1e-6 < divergence(peers["as shipped"].logits(TOKENS, None), peers["Q8_0"].logits(TOKENS, None)) < 0.1


def test_every_kind_of_work_takes_time(peers: dict[str, Peer]) -> None:
    prompts = [TOKENS[i : i + 64] for i in range(3)]
    for peer in peers.values():
        assert peer.decode(prompts, 4) > 0
        assert peer.decode_apart(prompts, 4, lanes=1) > 0
        assert peer.decode_apart(prompts, 4, lanes=2) > 0
        assert peer.prefill(TOKENS) > 0


def test_what_goes_wrong_there_is_told(peers: dict[str, Peer], tmp_path: Path) -> None:
    worker = peers["Q8_0"].worker
    with pytest.raises(Unavailable, match=r"failed to open.*cannot open"):
        worker.ask("open", name="none", path=str(tmp_path / "none.gguf"), adapters=[])
    with pytest.raises(Unavailable, match="there is no request"):
        worker.ask("dance")
    assert worker.ask("version")["version"] == worker.version
