"""This process' hot paths in Prometheus' text format."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from synapse.hotpath.call import HotPath
from synapse.hotpath.metrics.histogram import STEPS, Counts, lowest, total
from synapse.hotpath.metrics.window import Tally
from synapse.hotpath.paths import PATHS
from synapse.hotpath.rollout.decision import BUCKETS
from synapse.hotpath.rollout.supervisor import Standing
from synapse.hotpath.rollout.watch import watch

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
BOUNDS = tuple(STEPS * octave for octave in range(6, 31, 2))
"""Buckets of ours that begin a bucket of Prometheus': every second octave, from 1 microsecond to 17 seconds."""
COUNTERS = (
    ("wrong", "Native answers that did not agree with the reference"),
    ("fallbacks", "Calls of the kernel that the reference answered"),
    ("compared", "Calls that both runtimes ran"),
)


class HotPathCollector(Collector):
    """Reads the counters when Prometheus asks; nothing is kept twice."""

    def __init__(self, paths: Mapping[str, HotPath[..., Any]], standings: Mapping[str, Standing]) -> None:
        self._paths = paths
        self._standings = standings

    def collect(self) -> Iterator[Metric]:
        """All metrics of all paths."""
        tallies = {name: path.counters.read() for name, path in self._paths.items()}
        labels = ["path", "runtime"]
        answers = CounterMetricFamily("synapse_hotpath_answers", "Answers that callers were given", labels=labels)
        errors = CounterMetricFamily("synapse_hotpath_errors", "Runs that raised", labels=labels)
        latency = HistogramMetricFamily("synapse_hotpath_latency_seconds", "Latency of the runs", labels=labels)
        for name, tally in tallies.items():
            for runtime, given, raised, latencies in _by_runtime(tally):
                answers.add_metric([name, runtime], given)
                errors.add_metric([name, runtime], raised)
                latency.add_metric([name, runtime], _cumulative(latencies), total(latencies))
        yield from (answers, errors, latency)
        for field, text in COUNTERS:
            counter = CounterMetricFamily(f"synapse_hotpath_{field}", text, labels=["path"])
            for name, tally in tallies.items():
                counter.add_metric([name], getattr(tally, field))
            yield counter
        share = GaugeMetricFamily("synapse_hotpath_share", "Of the keys, the kernel's share", labels=["path"])
        alert = GaugeMetricFamily("synapse_hotpath_alert", "1 while the alert is raised", labels=["path", "alert"])
        for name, path in self._paths.items():
            share.add_metric([name], path.decision.below / BUCKETS if path.decision.native is not None else 0.0)
            raised_now = {found.name for found in self._standings[name].alerts} if name in self._standings else set()
            for kind in ("fallback", "error", "latency"):
                alert.add_metric([name, kind], float(kind in raised_now))
        yield from (share, alert)


def prometheus_text(*others: Collector) -> bytes:
    """What a server answers to `GET /metrics`, with `CONTENT_TYPE`: the hot paths, and what others have counted."""
    registry = CollectorRegistry(auto_describe=False)
    for other in others:
        registry.register(other)
    running = watch()
    registry.register(HotPathCollector(PATHS, running.supervisor.standings if running is not None else {}))
    return generate_latest(registry)


def _by_runtime(tally: Tally) -> Iterable[tuple[str, int, int, Counts]]:
    yield "native", tally.native_answers, tally.errors, tally.native
    yield "reference", tally.reference_answers, tally.reference_errors, tally.reference


def _cumulative(counts: Counts) -> list[tuple[str, float]]:
    """Prometheus' buckets: how many runs took at most this many seconds."""
    bounds: list[tuple[str, float]] = [
        (repr(lowest(bound) / 1e9), float(sum(n for bucket, n in counts.items() if bucket < bound))) for bound in BOUNDS
    ]
    return [*bounds, ("+Inf", float(sum(counts.values())))]
