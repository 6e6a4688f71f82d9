"""The benchmark of the server: its clients against a real one, its figures, and a quick run of all of it."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import serving
from benchmarks.neighbours import cpu_seconds
from benchmarks.serving import GREEDY, OURS, PEER, WITHIN, WORKS, Speeds
from benchmarks.serving_clients import Answer, Answers, Clients
from support.live_server import is_ready, running, wait_until
from support.tiny_home import MODEL, TinyHome, build_tiny_home
from synapse.errors import Unavailable

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> TinyHome:
    return build_tiny_home(tmp_path_factory.mktemp("tiny") / "home")


def body(tokens: int, model: str = MODEL) -> dict[str, object]:
    messages = [{"role": "user", "content": "Hi"}]
    options = {"include_usage": True}
    sampling = {"temperature": 0}  # which never ends before its tokens do
    return {
        "model": model,
        "messages": messages,
        "max_tokens": tokens,
        "stream": True,
        "stream_options": options,
    } | sampling


def test_clients_read_every_answer_to_its_end(home: TinyHome, tmp_path: Path) -> None:
    with running(home.copy(tmp_path / "home"), default_model=MODEL, backend="reference") as live, Clients() as clients:
        wait_until(lambda: is_ready(live), 60)
        answers = clients.run(live.port, [[body(12), body(7)], [body(9)]])
        assert sorted(answer.tokens for answer in answers.answers) == [7, 9, 12]
        assert all(0 < answer.first_s <= answer.seconds <= answers.seconds for answer in answers.answers)
        with pytest.raises(Unavailable, match="nobody"):
            clients.run(live.port, [[body(3, "nobody")]])
        assert len(clients.run(live.port, [[body(3)]]).answers) == 1, "the process lives on"


def test_what_is_asked_for_is_compared_with_what_was_reached() -> None:
    def speeds(tokens: int, first_s: float) -> Speeds:
        found = Speeds()
        found.add(Answers(1.0, [Answer(first_s, 1.0, tokens)]))
        return found

    work = replace(WORKS[1], at_least=5, first_at_most=0.25)
    slow = speeds(10, 1.0)
    found = {OURS: speeds(60, 0.5), GREEDY: slow, WITHIN: slow, f"{WITHIN}, greedy": slow, PEER: slow}
    rows = {row["ratio_of"]: row for row in serving.ratios(work, found)}
    assert rows[f"speed, of {PEER}"] | {"ratio": 6.0, "asked": "≥ 5", "met": True} == rows[f"speed, of {PEER}"]
    late = rows[f"time to first token p99, of {PEER}"]
    assert (late["ratio"], late["asked"], late["met"]) == (0.5, "≤ 0.25", False)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="this system does not say what a process takes")
def test_the_time_of_children_counts_while_they_run() -> None:
    spin = "import time\nwhile time.process_time() < 0.3: pass\nprint('done', flush=True)\ninput()"
    nest = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {spin!r}])"
    with subprocess.Popen(
        [sys.executable, "-c", nest], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        parent.stdout.readline()
        assert cpu_seconds(parent.pid) >= 0.3
        parent.communicate("\n")


@pytest.mark.slow
def test_a_quick_run_prints_everything_as_json(home: TinyHome) -> None:
    model = home.path / "models" / MODEL / "tiny.gguf"
    command = [sys.executable, "-m", "benchmarks.serving", "--quick", "--json", "--works", "1"]
    command += ["--model", str(model), "--backend", "reference"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "--llama-server" in done.stderr
    document = json.loads(done.stdout)
    (rows,) = (rows for name, rows in document["rows"].items() if name != "ratios")
    assert [row["contender"] for row in rows] == [OURS, GREEDY, WITHIN, f"{WITHIN}, greedy"]
    assert all(row["tokens_per_second"] > 0 and row["first_token_p99_ms"] > 0 for row in rows)
    assert document["figures"]["idle_share_of_one_core"] >= 0
