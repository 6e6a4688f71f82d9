"""`/metrics`: how the hot paths of this process do, for Prometheus."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter
from starlette.responses import Response

from synapse.hotpath.metrics.prometheus import CONTENT_TYPE, prometheus_text
from synapse.server.http.routing import guarded

router = APIRouter(tags=["health"], route_class=guarded("read"))


@router.get("/metrics", response_class=Response)
async def metrics() -> Response:
    """Say how often each hot path answered, by kernel and by reference, how fast, and what went wrong."""
    return Response(await asyncio.to_thread(prometheus_text), media_type=CONTENT_TYPE)
