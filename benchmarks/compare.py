"""Two runs of one benchmark, side by side with the machines they ran on.

python -m benchmarks.pattern_search --json > A.json     # on one machine
python -m benchmarks.pattern_search --json > B.json     # on another, or after a change
python -m benchmarks.compare A.json B.json
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from synapse.errors import InvalidInput, SynapseError


def read_run(path: Path) -> dict[str, Any]:
    """A run that a benchmark printed with --json.

    Raises:
        InvalidInput: the file cannot be read, or is no such run.
    """
    try:
        document = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InvalidInput(f"{path} cannot be read: {error}") from error
    parts = {"benchmark": str, "machine": dict, "settings": dict, "figures": dict, "rows": dict}
    if not isinstance(document, dict) or not all(isinstance(document.get(k), kind) for k, kind in parts.items()):
        raise InvalidInput(f"{path} is not what a benchmark prints with --json")
    return document


def compare(a: dict[str, Any], b: dict[str, Any]) -> str:
    """The two as text: what differs in machine and settings, then every figure of both, with B as a multiple of A.

    Raises:
        InvalidInput: they are runs of different benchmarks.
    """
    if a["benchmark"] != b["benchmark"]:
        raise InvalidInput(f"the runs are of different benchmarks: {a['benchmark']} and {b['benchmark']}")
    lines = [a["benchmark"], ""]
    for label, run in (("A", a), ("B", b)):
        machine = run["machine"]
        lines.append(f"{label}: {machine.get('cpu')}, {machine.get('architecture')}, {machine.get('cores')} cores")
    named = {run: {**documents["machine"], **documents["settings"]} for run, documents in (("A", a), ("B", b))}
    shown = ("cpu", "architecture", "cores")
    for name in sorted(set(named["A"]) | set(named["B"])):
        one, other = named["A"].get(name), named["B"].get(name)
        if one != other and name not in shown:
            lines.append(f"  {name}: {one} | {other}")
    lines += ["", *_table([("", "A", "B", "B/A"), *_figures(a, b)])]
    return "\n".join(lines)


def _figures(a: dict[str, Any], b: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    one, other = _flat(a), _flat(b)
    rows = []
    for name in [*one, *(name for name in other if name not in one)]:
        x, y = one.get(name), other.get(name)
        ratio = f"{y / x:.3g}" if x and y is not None else ""
        rows.append((name, _show(x), _show(y), ratio))
    return rows


def _flat(run: dict[str, Any]) -> dict[str, float]:
    """Every number by a name of its own: a row of a table is named by the texts in it."""
    numbers = {name: value for name, value in run["figures"].items() if isinstance(value, int | float)}
    for title, rows in run["rows"].items():
        for row in rows:
            label = ", ".join(str(value) for value in row.values() if isinstance(value, str))
            for column, value in row.items():
                if isinstance(value, int | float):
                    numbers[f"{title}: {label}: {column}"] = value
    return numbers


def _show(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _table(rows: list[tuple[str, str, str, str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return [
        "  ".join([row[0].ljust(widths[0]), *(row[i].rjust(widths[i]) for i in (1, 2, 3))]).rstrip() for row in rows
    ]


def main() -> int:
    options = argparse.ArgumentParser(description="Print two runs of a benchmark side by side.")
    options.add_argument("a", type=Path)
    options.add_argument("b", type=Path)
    args = options.parse_args()
    try:
        print(compare(read_run(args.a), read_run(args.b)))
    except SynapseError as error:
        print(f"error: {error.message}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
