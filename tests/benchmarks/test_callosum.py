"""The benchmark of the callosum says what each part was measured against."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_part_names_its_peer_and_has_figures() -> None:
    options = ["--json", "--no-durable", "--rounds", "1", "--events", "300", "--waits", "5"]
    program = [sys.executable, "-m", "benchmarks.callosum", *options]
    environment = {**os.environ, "SYNAPSE_FORCE_PYTHON": "1"}
    done = subprocess.run(program, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    report = json.loads(done.stdout)
    assert report["settings"]["kernel"] == "none, the reference answers: Python is forced"
    assert set(report["settings"]["peers"]) == set(report["rows"]) and len(report["rows"]) == 3
    assert set(report["settings"]["peers"].values()) == {"asyncio.PriorityQueue"}
    assert all(figure > 0 for figure in report["figures"].values())
    assert {"put and get, one by one: least ratio to the peer", "idle routing: p99, microseconds"} <= set(
        report["figures"]
    )
