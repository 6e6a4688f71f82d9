"""The commands of the groups `engine` and `ai-daemon`."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Mapping
from typing import Annotated, cast

from pydantic import BaseModel, Field

from synapse import __version__
from synapse.commands import Argument, Call, Context, command
from synapse.daemon.host import open_models
from synapse.daemon.process import WorkerProcess
from synapse.daemon.supervisor import Supervisor
from synapse.engines.client import EngineClient
from synapse.engines.host import OpenModel
from synapse.engines.residency import open_residency
from synapse.errors import NotFound, Unavailable


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
    slow_readers: int = Field(description="answers that were given up because nobody read them")
    grammar_failures: int = Field(description="answers that failed under their grammar")
    weight_bytes: int = Field(description="memory of the weights")
    layers: dict[str, int] = Field(description="LoRA layers in memory by sha256, and their bytes")


class EngineList(BaseModel):
    """The engines that are open, in the order in which they were opened."""

    items: list[EngineState]


@command("engine/stats", permission="read", of_server=True)
async def engine_stats(params: GetEngineStats, context: Context) -> EngineList:
    """Say which engines are open, which of them is native, and how busy they are.

    These are the engines of the server of this home. Without one that runs, a terminal's own process has none open.
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
        slow_readers=stats.counters.slow_readers,
        grammar_failures=stats.counters.grammar_failures,
        weight_bytes=stats.weight_bytes,
        layers=stats.layers,
    )


class Nothing(BaseModel):
    """Nothing to choose."""


class DaemonState(BaseModel):
    """How the server is."""

    version: str
    process: int = Field(description="its process id")
    pool: str = Field(description="where models run: process (workers of their own) or here (in the server)")
    models: int = Field(description="models that are open")
    workers: int = Field(description="worker processes")
    active: int = Field(description="answers being generated or waited for")
    memory_bytes: int = Field(description="memory that the open models may come to take")
    limit_bytes: int = Field(description="memory that all models may take together")


class ModelRow(BaseModel):
    """One model that is open."""

    model: str
    backend: str = Field(description="which engine answers: native or reference")
    workers: int = Field(description="worker processes; 0 when it runs in the server")
    active: int = Field(description="answers being generated or waited for")
    running: int = Field(description="sequences that share the current steps")
    resumed: int = Field(description="how often an answer went on in another worker, because its own had ended")
    layers: int = Field(description="LoRA layers in memory")
    memory_bytes: int = Field(description="memory that it may come to take")
    unloads_in: float | None = Field(description="seconds until it leaves memory if nobody asks; null when in use")


class ModelRows(BaseModel):
    """The models that are open, in the order in which they were opened."""

    items: list[ModelRow]


class WorkerRow(BaseModel):
    """One worker process."""

    worker: int = Field(description="its number")
    model: str
    state: str = Field(description="starting, ready, draining or ended")
    process: int | None = Field(description="its process id")
    active: int = Field(description="answers that it is at")
    steps: int = Field(description="steps that it has computed")
    layers: int = Field(description="LoRA layers that it knows")
    memory_bytes: int = Field(description="memory that is its alone; weights are shared and not counted")
    seconds: float = Field(description="since it was started")


class WorkerRows(BaseModel):
    """All worker processes."""

    items: list[WorkerRow]


class OneWorker(BaseModel):
    """Which worker."""

    worker: Annotated[int, Argument()] = Field(description="its number; `synapse daemon workers` lists them")


class OneModel(BaseModel):
    """Which model."""

    model: Annotated[str, Argument()] = Field(description="a model that is open")


@command("ai-daemon/status", permission="read", of_server=True)
async def daemon_status(params: Nothing, context: Context, call: Call) -> DaemonState:
    """Show how the server is: its models, workers, requests and memory."""
    models = await _models(context, call)
    residency = await context.get(open_residency)
    return DaemonState(
        version=__version__,
        process=os.getpid(),
        pool=context.settings.daemon.pool,
        models=len(models),
        workers=sum(len(one.workers) for one in _supervisors(models)),
        active=sum([(await model.runner.stats()).active for model in models.values()]),
        memory_bytes=residency.bytes,
        limit_bytes=residency.limit,
    )


@command("ai-daemon/models", permission="read", of_server=True)
async def daemon_models(params: Nothing, context: Context, call: Call) -> ModelRows:
    """List the models that are open: who uses them, and what memory they may take."""
    residency, rows = await context.get(open_residency), []
    for sha256, model in (await _models(context, call)).items():
        stats = await model.runner.stats()
        rows.append(
            ModelRow(
                model=model.front.name,
                backend=stats.answering.backend,
                workers=len(model.runner.workers) if isinstance(model.runner, Supervisor) else 0,
                active=stats.active,
                running=stats.running,
                resumed=model.runner.resumed if isinstance(model.runner, Supervisor) else 0,
                layers=len(stats.layers),
                memory_bytes=residency.bytes_of(sha256),
                unloads_in=residency.seconds_left(sha256),
            )
        )
    return ModelRows(items=rows)


@command("ai-daemon/workers", permission="read", of_server=True)
async def daemon_workers(params: Nothing, context: Context, call: Call) -> WorkerRows:
    """List the worker processes."""
    rows = []
    for model in (await _models(context, call)).values():
        if isinstance(model.runner, Supervisor):
            rows += [await _row(model, model.runner, worker) for worker in model.runner.workers]
    return WorkerRows(items=rows)


@command("ai-daemon/spawn", permission="manage", of_server=True)
async def spawn_worker(params: OneModel, context: Context, call: Call) -> WorkerRows:
    """Start one more worker process of a model that is open."""
    models = await _models(context, call)
    for model in models.values():
        if model.front.name == params.model and isinstance(model.runner, Supervisor):
            model.runner.spawn()
            await asyncio.sleep(0)  # it is there, and starts
            return WorkerRows(items=[await _row(model, model.runner, worker) for worker in model.runner.workers])
    known = ", ".join(model.front.name for model in models.values()) or "none"
    raise NotFound(
        f"no model {params.model!r:.60} is open in workers", hint=f"open are: {known}; a model opens when it is asked"
    )


@command("ai-daemon/kill", permission="manage", of_server=True)
async def kill_worker(params: OneWorker, context: Context, call: Call) -> WorkerRow:
    """End a worker process at once. Its answers go on in another, which takes its place."""
    model, supervisor, worker = await _worker(context, call, params.worker)
    worker.kill("it was told to end at once")
    await asyncio.shield(worker.ended)
    return await _row(model, supervisor, worker)


@command("ai-daemon/drain", permission="manage", of_server=True)
async def drain_worker(params: OneWorker, context: Context, call: Call) -> WorkerRow:
    """Let a worker process finish its answers and end; another takes its place."""
    model, supervisor, worker = await _worker(context, call, params.worker)
    await supervisor.drain(worker)
    return await _row(model, supervisor, worker)


async def _models(context: Context, call: Call) -> dict[str, OpenModel]:
    if call.surface == "terminal" and context.settings.daemon.pool == "auto":  # this process is no server
        raise Unavailable("no server of this home is running", hint="`synapse up --detach` starts one")
    return (await context.get(open_models)).models()


def _supervisors(models: Mapping[str, OpenModel]) -> list[Supervisor]:
    return [model.runner for model in models.values() if isinstance(model.runner, Supervisor)]


async def _worker(context: Context, call: Call, number: int) -> tuple[OpenModel, Supervisor, WorkerProcess]:
    for model in (await _models(context, call)).values():
        for worker in model.runner.workers if isinstance(model.runner, Supervisor) else ():
            if worker.number == number:
                return model, cast(Supervisor, model.runner), worker
    raise NotFound(f"there is no worker {number}", hint="`synapse daemon workers` lists them; `synapse up` starts some")


async def _row(model: OpenModel, supervisor: Supervisor, worker: WorkerProcess) -> WorkerRow:
    stats = await worker.refresh()
    return WorkerRow(
        worker=worker.number,
        model=model.front.name,
        state=worker.state,
        process=worker.pid,
        active=supervisor.active(worker),
        steps=stats.counters.steps if stats else 0,
        layers=len(worker.loaded),
        memory_bytes=worker.memory(),
        seconds=round(time.monotonic() - worker.started, 1),
    )
