"""`/metrics`: how the hot paths and the engines of this process do, for Prometheus."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

from fastapi import APIRouter, Request
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.responses import Response

from synapse.daemon.host import open_models
from synapse.engines import EngineStats
from synapse.hotpath.metrics.prometheus import CONTENT_TYPE, prometheus_text
from synapse.server.http.routing import ServerState, guarded

GAUGES = (
    ("running", "Sequences that share the current steps"),
    ("waiting", "Sequences that wait for a place"),
)
COUNTERS = (
    ("requests", "Sequences that were asked for"),
    ("prompt_tokens", "Tokens of prompts that have started"),
    ("cached_tokens", "Those of them that were found in the KV cache"),
    ("decode_tokens", "Tokens of answers"),
    ("slow_readers", "Answers that were given up because nobody read them"),
    ("grammar_failures", "Answers that failed under their grammar"),
)

router = APIRouter(tags=["health"], route_class=guarded("read"))


class EngineCollector(Collector):
    """What the engines have counted, by the name of their model."""

    def __init__(self, stats: dict[str, EngineStats]) -> None:
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        """All metrics of all engines."""
        for field, text in GAUGES:
            gauge = GaugeMetricFamily(f"synapse_engine_{field}", text, labels=["model"])
            for model, stats in self._stats.items():
                gauge.add_metric([model], getattr(stats, field))
            yield gauge
        for field, text in COUNTERS:
            counter = CounterMetricFamily(f"synapse_engine_{field}", text, labels=["model"])
            for model, stats in self._stats.items():
                counter.add_metric([model], getattr(stats.counters, field))
            yield counter


@router.get("/metrics", response_class=Response)
async def metrics(request: Request) -> Response:
    """Say how often each hot path answered, how fast and what went wrong, and what the engines have done."""
    state: ServerState = request.app.state.server
    host = await state.context.get(open_models)
    stats = {client.front.name: await client.stats() for client in host.clients()}
    return Response(await asyncio.to_thread(prometheus_text, EngineCollector(stats)), media_type=CONTENT_TYPE)
