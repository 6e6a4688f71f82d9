"""The commands of the group `engine`."""

from __future__ import annotations

from pydantic import BaseModel, Field

from synapse.commands import Context, command
from synapse.daemon.host import open_models
from synapse.engines.client import EngineClient


class GetEngineStats(BaseModel):
    """Nothing to choose."""


class EngineState(BaseModel):
    """One engine that is open."""

    model: str
    backend: str = Field(description="which engine answers: native or reference")
    reason: str = Field(description="why it is not the native one; empty when it is")
    hint: str = Field(description="what to do about that")
    running: int = Field(description="sequences that share the current steps")
    max_batch: int = Field(description="sequences that can")
    waiting: int = Field(description="sequences that wait for a place")
    kv_tokens: int = Field(description="tokens the KV cache has room for")
    kv_tokens_held: int = Field(description="those that sequences hold")
    kv_tokens_cached: int = Field(description="those kept for prompts that begin alike")
    prefix_hit_rate: float = Field(description="part of the prompts' tokens that were found in the cache, 0 to 1")
    weight_bytes: int = Field(description="memory of the weights")
    layers: dict[str, int] = Field(description="LoRA layers in memory by sha256, and their bytes")


class EngineList(BaseModel):
    """The engines that are open in this process, in the order in which they were opened."""

    items: list[EngineState]


@command("engine/stats", permission="read")
async def engine_stats(params: GetEngineStats, context: Context) -> EngineList:
    """Say which engines are open, which of them is native, and how busy they are.

    Over HTTP these are the engines of the server. A terminal's own process has none open.
    """
    host = await context.get(open_models)
    return EngineList(items=[await engine_state(client) for client in host.clients()])


async def engine_state(client: EngineClient) -> EngineState:
    """How an engine is, for people."""
    stats = await client.stats()
    return EngineState(
        model=client.front.name,
        backend=stats.answering.backend,
        reason=stats.answering.reason,
        hint=stats.answering.hint,
        running=stats.running,
        max_batch=stats.max_batch,
        waiting=stats.waiting,
        kv_tokens=stats.kv_tokens,
        kv_tokens_held=stats.kv_tokens_held,
        kv_tokens_cached=stats.kv_tokens_cached,
        prefix_hit_rate=round(stats.counters.hit_rate, 4),
        weight_bytes=stats.weight_bytes,
        layers=stats.layers,
    )
