"""What every benchmark prints: the machine it ran on, the settings, and rows of figures, as a table or as JSON."""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np


@dataclass
class Report:
    """One run. `figures` are named numbers; `rows` are tables by name."""

    benchmark: str
    settings: dict[str, Any] = field(default_factory=dict)
    figures: dict[str, float] = field(default_factory=dict)
    rows: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    def as_json(self) -> str:
        document = {
            "benchmark": self.benchmark,
            "machine": machine(),
            "settings": self.settings,
            "figures": self.figures,
            "rows": self.rows,
        }
        return json.dumps(document, indent=2)

    def as_text(self) -> str:
        lines = [f"{self.benchmark} on {machine()['cpu']}, {machine()['cores']} cores"]
        lines += [f"  {name}: {value}" for name, value in self.settings.items()]
        for title, rows in self.rows.items():
            lines += ["", title]
            widths = {key: max(len(key), *(len(_show(row[key])) for row in rows)) for key in rows[0]}
            lines.append("  " + "  ".join(key.ljust(width) for key, width in widths.items()))
            lines += ["  " + "  ".join(_show(row[k]).ljust(w) for k, w in widths.items()) for row in rows]
        lines += ["", *(f"{name}: {_show(value)}" for name, value in self.figures.items())]
        return "\n".join(lines)


def _show(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def machine() -> dict[str, Any]:
    """The CPU and the versions that matter, without the machine's name."""
    return {
        "cpu": _cpu_name(),
        "architecture": platform.machine(),
        "cores": os.cpu_count(),
        "system": platform.system(),
        "python": platform.python_version(),
        "numpy": version("numpy"),
        "synapse": version("synapse"),
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"


def peak_memory() -> int:
    """The most resident memory this process has had, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024


def read_bandwidth() -> float:
    """Bytes per second that a BLAS matrix-vector product reads from memory: the limit of decoding one sequence."""
    matrix = np.ones((16384, 4096), np.float32)
    vector = np.ones(4096, np.float32)
    return matrix.nbytes / best_time(lambda: matrix @ vector, repeats=5)


def float_peak() -> float:
    """Float32 operations per second of a large BLAS matrix product: the limit of prefill."""
    matrix = np.ones((1024, 1024), np.float32)
    return 2 * 1024**3 / best_time(lambda: matrix @ matrix, repeats=5)


def best_time(work: Callable[[], object], *, repeats: int) -> float:
    """Seconds of the fastest of several runs."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def parser(description: str) -> argparse.ArgumentParser:
    """The options that all benchmarks share."""
    options = argparse.ArgumentParser(description=description)
    options.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return options


def publish(report: Report, *, as_json: bool) -> None:
    print(report.as_json() if as_json else report.as_text())
