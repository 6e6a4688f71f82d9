"""`open_engine` from Python: the kernel answers, and neither a database is opened nor a process started."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from support.tiny_models import build_tiny_model
from synapse.config import Settings
from synapse.engines import Delta, Engine, Limits, Request, Sampling, open_engine
from synapse.engines.opening import open_engine_file
from synapse.errors import Unavailable

LIMITS = Limits(max_context=64, threads=1)
WATCHED = """
import sys
seen = []
def watch(event, args):
    if event.startswith(("subprocess.", "os.fork", "os.posix_spawn", "os.exec", "sqlite3.")):
        seen.append((event, args))
sys.addaudithook(watch)
from synapse.engines import Limits, Request, open_engine
engine = open_engine(sys.argv[1], "native", limits=Limits(max_context=64, threads=1))
engine.add(Request((5, 6, 7), max_tokens=3, ignore_eos=True))
while engine.busy:
    engine.step()
assert engine.answering().backend == "native"
import threading
print(seen, [thread.name for thread in threading.enumerate() if "hotpath" in thread.name])
"""


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return build_tiny_model(tmp_path / "tiny.gguf", "llama", storage="Q8_0").path


def answer(engine: Engine) -> list[int]:
    engine.add(Request((5, 6, 7), sampling=Sampling(temperature=0), max_tokens=8, ignore_eos=True))
    tokens: list[int] = []
    while engine.busy:
        tokens += [token for event in engine.step() if isinstance(event, Delta) for token in event.tokens]
    engine.close()
    return tokens


def test_the_kernel_answers_without_a_database_or_a_process(at_home: Path, tiny: Path) -> None:
    done = subprocess.run([sys.executable, "-c", WATCHED, str(tiny)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("[] []"), done.stdout


def test_it_says_what_an_engine_says_that_is_watched(at_home: Path, tiny: Path) -> None:
    assert answer(open_engine(str(tiny), "native", limits=LIMITS)) == answer(open_engine_file(tiny, "native", LIMITS))


def test_settings_that_are_given_hold_and_those_of_the_environment_do_not(
    at_home: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "given"
    shutil.copytree(at_home / "kernels", home / "kernels")
    monkeypatch.setenv("SYNAPSE_HOME", str(tmp_path / "environment"))
    monkeypatch.setenv("SYNAPSE_MAX_CONTEXT", "nonsense")
    engine = open_engine(str(tiny), "native", settings=Settings(home=home, max_context=40, threads=1))
    assert engine.context == 40
    assert len(answer(engine)) == 8
    assert list((home / "packed").glob("*.pack"))
    assert not (tmp_path / "environment").exists()


def test_a_kernel_that_has_not_passed_its_checks_is_not_used(at_home: Path, tiny: Path, tmp_path: Path) -> None:
    settings = Settings(home=tmp_path / "home", threads=1)
    for kernels, reason in ((False, "is not built"), (True, "has not passed its checks")):
        if kernels:
            shutil.copytree(at_home / "kernels", settings.home / "kernels", ignore=shutil.ignore_patterns("passed"))
        with pytest.raises(Unavailable, match=reason) as refused:
            open_engine(str(tiny), "native", settings=settings)
        assert refused.value.hint == "synapse kernels build engine"
        engine = open_engine(str(tiny), settings=settings)
        assert engine.answering().backend == "reference"
        assert reason in engine.answering().reason
        engine.close()
