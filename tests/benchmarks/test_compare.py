"""`python -m benchmarks.compare A.json B.json`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.compare import compare, read_run
from synapse.errors import InvalidInput


def run_of(cpu: str, milliseconds: float, **changes: Any) -> dict[str, Any]:
    return {
        "benchmark": "pattern search",
        "machine": {"cpu": cpu, "architecture": "x86_64", "cores": 2, "numpy": "2.4"},
        "settings": {"k": 10},
        "figures": {"ratio": 4.5},
        "rows": {"uniform": [{"contender": "Synapse", "one_query_ms": milliseconds}]},
    } | changes


def test_both_machines_and_every_figure_are_shown() -> None:
    text = compare(run_of("EPYC", 2.0), run_of("Graviton", 3.0, settings={"k": 20}))
    assert "A: EPYC, x86_64, 2 cores" in text
    assert "B: Graviton, x86_64, 2 cores" in text
    assert "k: 10 | 20" in text
    assert "numpy" not in text  # the same in both
    figures = {line.split("  ")[0]: line.split()[-3:] for line in text.splitlines()[6:]}
    assert figures["ratio"] == ["4.5", "4.5", "1"]
    assert figures["uniform: Synapse: one_query_ms"] == ["2", "3", "1.5"]


def test_a_figure_that_only_one_run_has_is_shown_with_a_gap() -> None:
    text = compare(run_of("EPYC", 2.0), run_of("EPYC", 2.0, figures={"recall": 0.9, "zero": 0}))
    assert "recall" in text
    assert "ratio" in text


def test_runs_of_different_benchmarks_are_not_compared() -> None:
    with pytest.raises(InvalidInput, match="different benchmarks"):
        compare(run_of("EPYC", 2.0), run_of("EPYC", 2.0, benchmark="engine"))


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"benchmark": 1}'])
def test_a_file_that_is_no_run_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(InvalidInput):
        read_run(tmp_path / "a.json")
    with pytest.raises(InvalidInput):
        read_run(tmp_path / "nothing.json")


def test_the_program_prints_the_comparison_or_the_error(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(run_of("EPYC", 2.0)))
    command = [sys.executable, "-m", "benchmarks.compare", str(tmp_path / "a.json")]
    root = Path(__file__).parents[2]
    good = subprocess.run([*command, str(tmp_path / "a.json")], capture_output=True, text=True, check=False, cwd=root)
    assert good.returncode == 0
    assert good.stdout.startswith("pattern search\n")
    bad = subprocess.run([*command, str(tmp_path / "b.json")], capture_output=True, text=True, check=False, cwd=root)
    assert bad.returncode == 2
    assert bad.stderr.startswith("error: ")
