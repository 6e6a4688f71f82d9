"""A worker's memory, and how long it takes to open and to load layers: `python -m benchmarks.engine_memory`.

It is a process of its own, as workers are, so that nothing but the engine is in it. `benchmarks.engine` starts it.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from benchmarks.report import peak_memory
from synapse.engines import Backend, Limits, Request, Sampling
from synapse.engines.opening import open_engine_file

ROOT = Path(__file__).parents[1]
TOKENS = 16
LOADS = 10
STATUS = Path("/proc/self/status")


def resident_memory() -> dict[str, int]:
    """Bytes of memory this process has now: in all, and of these what it shares with others that map the same file.

    Where the system does not say, the most it has had, and no shared part.
    """
    if not STATUS.exists():
        return {"resident_bytes": peak_memory(), "of_files_bytes": 0}
    fields = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
    kilobytes = {name: int(fields[name].split()[0]) for name in ("VmRSS", "RssFile")}
    return {"resident_bytes": 1024 * kilobytes["VmRSS"], "of_files_bytes": 1024 * kilobytes["RssFile"]}


def be_a_worker(model: Path, backend: Backend, threads: int, layers: Sequence[Path]) -> dict[str, float]:
    """Open the model, load the layers, answer one request with each of them, and let go of them."""
    start = time.perf_counter()
    engine = open_engine_file(model, backend, Limits(threads=threads), model.parent.name)
    figures: dict[str, float] = {"open_seconds": time.perf_counter() - start}
    figures |= {f"opened_{name}": value for name, value in resident_memory().items()}
    ids = [engine.load_layer(layer) for layer in layers]
    prompt = tuple(
        engine.tokenizer.encode("The captain looked at the map and said that the next harbour was far away.")
    )
    for layer_id in ids:
        engine.add(Request(prompt, ((layer_id, 1.0),), Sampling(temperature=0), TOKENS, ignore_eos=True))
    while engine.busy:
        engine.step()
    figures |= resident_memory()
    for layer_id in ids:
        engine.unload_layer(layer_id)
    figures["unloaded_resident_bytes"] = resident_memory()["resident_bytes"]

    times = []
    for _ in range(LOADS):
        start = time.perf_counter()
        layer_id = engine.load_layer(layers[0])
        times.append(time.perf_counter() - start)
        figures["layer_bytes"] = engine.layers.sizes()[layer_id]
        engine.unload_layer(layer_id)
    figures["load_layer_seconds"] = statistics.median(times)
    figures["load_layer_slowest_seconds"] = max(times)
    figures["layer_file_bytes"] = sum(file.stat().st_size for file in layers[0].iterdir())
    return figures


def measure(model: Path, backend: Backend, threads: int, layers: Sequence[Path]) -> list[dict[str, Any]]:
    """What two workers, one after the other, were like; the first may have to make what the second only opens."""
    command = [sys.executable, "-m", "benchmarks.engine_memory", str(model), backend, str(threads), *map(str, layers)]
    rows = []
    for start in ("first", "second"):
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
        rows.append({"start": start, **json.loads(done.stdout.splitlines()[-1])})
    return rows


def main() -> None:
    options = argparse.ArgumentParser(description=f"A worker's memory on {platform.system()}, as JSON.")
    options.add_argument("model", type=Path)
    options.add_argument("backend", choices=["auto", "reference", "native"])
    options.add_argument("threads", type=int)
    options.add_argument("layers", type=Path, nargs="+")
    args = options.parse_args()
    print(json.dumps(be_a_worker(args.model, cast(Backend, args.backend), args.threads, args.layers)))


if __name__ == "__main__":
    main()
