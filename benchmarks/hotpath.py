"""What a hot path's adapter adds to a call: `python -m benchmarks.hotpath`.

The kernel and the reference do nothing, so all of the time is the call itself. Beside it stand a plain call of the same
function, and a call through a wrapper that only passes its arguments on: the least that any adapter in Python costs.
"""

from __future__ import annotations

import mmap
import timeit
from collections.abc import Callable
from typing import Any

from benchmarks.report import Report, parser, publish
from synapse.errors import Unavailable
from synapse.hotpath import HotPath, NativeSide
from synapse.hotpath.metrics.lanes import SLOTS
from synapse.hotpath.rollout.decision import BUCKETS, Decision, reference_only

CALLS = 100_000
BUDGET_NANOSECONDS = 2000


def nothing(number: int) -> int:
    """Both the kernel and the reference."""
    return number


def passing_on(*args: Any, **kwargs: Any) -> Any:
    """An adapter that adapts nothing."""
    return nothing(*args, **kwargs)


def no_build() -> Any:
    raise Unavailable("the decisions here are made by hand")


def path_with(decision: Decision, key: Callable[[int], str] | None = None) -> Callable[[int], int]:
    """What callers of a hot path call, with a decision in force."""
    native = NativeSide(no_build, lambda library: nothing)
    path: HotPath[[int], int] = HotPath("nothing", nothing, native, lambda one, other: one == other, key=key)
    path.decide(decision)
    return path.call


def nanoseconds(call: Callable[[int], int], repeats: int) -> float:
    """Of one call, in the fastest of several runs."""
    return min(timeit.repeat("call(1)", globals={"call": call}, number=CALLS, repeat=repeats)) / CALLS * 1e9


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument("--repeats", type=int, default=7, help="runs of each, of which the fastest counts")
    arguments = options.parse_args()
    slots = memoryview(mmap.mmap(-1, 8 * SLOTS)).cast("Q")

    def decision(share: float, compare: float) -> Decision:
        return Decision(nothing, round(share * BUCKETS), compare, slots, 1, None, "benchmark")

    calls = {
        "plain call": nothing,
        "wrapper that passes on": passing_on,
        "forced Python": path_with(reference_only("benchmark")),
        "full, 1 % compared": path_with(decision(1.0, 0.01)),
        "half, 5 % compared": path_with(decision(0.5, 0.05)),
        "half, 5 % compared, by key": path_with(decision(0.5, 0.05), key=lambda number: "user-1"),
        "canary, all compared (10 % of calls)": path_with(decision(0.1, 1.0)),
        "validate, 10 % compared": path_with(decision(0.0, 0.1)),
    }
    taken = {name: nanoseconds(call, arguments.repeats) for name, call in calls.items()}
    plain = taken["plain call"]
    rows = [{"call": name, "ns": round(ns), "overhead_ns": round(ns - plain)} for name, ns in taken.items()]
    report = Report("hotpath", {"calls": CALLS, "repeats": arguments.repeats}, {}, {"overhead": rows})
    report.figures["largest_overhead_ns"] = max(taken.values()) - plain
    report.figures["budget_ns"] = BUDGET_NANOSECONDS
    publish(report, as_json=arguments.json)


if __name__ == "__main__":
    main()
