"""What an engine keeps between steps: shared prefixes, and LoRA layers that come and go.

    python -m benchmarks.caches --json [--quick] [--model NAME] [--backend auto]

Prefixes: 64 conversations of several turns over 8 system prompts, with the pool of the default settings, one of a
single context and one without limit. Choices: 8 of one prompt. Layers: 40 that are active over a cache of 20, and what
that does to the gaps between the tokens of a stream; and what the opening of a second model does to them. See
docs/guide/benchmarks.md.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import structlog

from benchmarks.engine import model_path, say
from benchmarks.engine_limits import is_native
from benchmarks.layers import random_adapter
from benchmarks.report import Report, parser, publish
from benchmarks.second_model import second_model_rows
from synapse.engines import Backend, Delta, Engine, Limits, Request, Sampling
from synapse.engines.opening import open_engine_file
from synapse.models.gguf_file import open_model_file

GREEDY = Sampling(temperature=0)
SYSTEM_PROMPTS = 8
UNLIMITED = 2**19
"""Tokens: more than all conversations have."""
CHOICES = 8
LAYERS_ACTIVE, LAYERS_KEPT = 40, 20
LOADS = 10


class Conversations:
    """Conversations whose turns come in a random order, some of them at once."""

    def __init__(self, vocab: int, *, count: int, turns: int, system: int, question: int, answer: int) -> None:
        self._random = random.Random(1)  # noqa: S311
        self._vocab = vocab
        self._question, self._answer = question, answer
        systems = [self._tokens(system) for _ in range(SYSTEM_PROMPTS)]
        self._texts = [list(systems[n % SYSTEM_PROMPTS]) for n in range(count)]
        self.order = [n for _ in range(turns) for n in self._random.sample(range(count), count)]

    def _tokens(self, count: int) -> tuple[int, ...]:
        return tuple(self._random.randrange(3, self._vocab) for _ in range(count))

    def ask(self, number: int) -> Request:
        self._texts[number] += self._tokens(self._question)
        return Request(tuple(self._texts[number]), sampling=GREEDY, max_tokens=self._answer, ignore_eos=True)

    def note(self, number: int, answer: Sequence[int]) -> None:
        self._texts[number] += answer


def hold(engine: Engine, conversations: Conversations, at_once: int) -> dict[str, Any]:
    """Hold all conversations, so many at once, and say what came of the prefixes."""
    start = time.perf_counter()
    order = list(reversed(conversations.order))
    active: dict[str, int] = {}
    answers: dict[int, list[int]] = {}
    while order or active:
        while order and len(active) < at_once and order[-1] not in active.values():
            number = order.pop()
            active[engine.add(conversations.ask(number))] = number
        for event in engine.step():
            if isinstance(event, Delta):
                answers.setdefault(active[event.request_id], []).extend(event.tokens)
            else:
                number = active.pop(event.request_id)
                conversations.note(number, answers.pop(number))
    counters = engine.counters
    return {
        "pool_tokens": engine.kv_tokens,
        "prompt_tokens": counters.prompt_tokens,
        "cached_tokens": counters.cached_tokens,
        "hit_rate": counters.hit_rate,
        "evicted_blocks": counters.evicted_blocks,
        "seconds": time.perf_counter() - start,
    }


def prefix_rows(
    model: Path, backend: Backend, pools: dict[str, Limits], at_once: int, **shape: int
) -> list[dict[str, Any]]:
    """The same conversations with each pool; the last one is what the others are compared with."""
    rows = []
    for name, limits in pools.items():
        say(f"conversations: {name}")
        engine = open_engine_file(model, backend, limits)
        rows.append({"pool": name, **hold(engine, Conversations(engine.config.vocab, **shape), at_once)})
        engine.close()
    return [{**row, "of_unlimited": row["hit_rate"] / (rows[-1]["hit_rate"] or 1.0)} for row in rows]


def choices_row(engine: Engine, tokens: int) -> dict[str, Any]:
    """Several choices of one new prompt."""
    before = replace(engine.counters)
    rng = np.random.default_rng(2)
    prompt = tuple(rng.integers(3, engine.config.vocab, tokens).tolist())
    for n in range(CHOICES):
        engine.add(Request(prompt, sampling=Sampling(seed=n), max_tokens=4, ignore_eos=True))
    while engine.busy:
        engine.step()
    computed = engine.counters.prefill_tokens - before.prefill_tokens
    return {"choices": CHOICES, "prompt_tokens": tokens, "computed_tokens": computed}


def stream(engine: Engine, layers: Sequence[str], streams: int, turns: int, tokens: int) -> dict[str, Any]:
    """Answers with one layer after another, so many at once; the gaps between their tokens, in steps and in time."""
    rng = np.random.default_rng(3)
    left = [layers[n % len(layers)] for n in range(turns)]
    told: dict[str, list[tuple[int, float]]] = {}
    durations = []
    step = active = 0
    reads = engine.layers.reads
    start = time.perf_counter()
    while left or active:
        while left and active < streams:
            prompt = tuple(rng.integers(3, engine.config.vocab, 32).tolist())
            stack = ((left.pop(), 1.0),)
            engine.add(Request(prompt, stack, GREEDY, max_tokens=int(tokens * rng.uniform(0.5, 1.5)), ignore_eos=True))
            active += 1
        began = time.perf_counter()
        for event in engine.step():
            if isinstance(event, Delta):
                told.setdefault(event.request_id, []).append((step, time.perf_counter()))
            else:
                active -= 1
        durations.append(time.perf_counter() - began)
        step += 1
    seconds = time.perf_counter() - start
    gaps = [(b[0] - a[0], b[1] - a[1]) for times in told.values() for a, b in pairwise(times)]
    times = sorted(gap for _, gap in gaps)
    step_seconds = statistics.median(durations)
    return {
        "active_layers": len(layers),
        "loads": engine.layers.reads - reads,
        "tokens_per_second": sum(map(len, told.values())) / seconds,
        "widest_gap_steps": max(steps for steps, _ in gaps),
        "median_step_ms": 1000 * step_seconds,
        "gap_p99_ms": 1000 * times[int(0.99 * len(times))],
        "widest_gap_ms": 1000 * times[-1],
        "widest_gap_in_median_steps": times[-1] / step_seconds,
    }


def load_seconds(engine: Engine, layer: Path) -> tuple[float, float]:
    """Reading, checking and packing a layer whose file is in the page cache: for the first time, and once evicted."""
    first, again = [], []
    for _ in range(LOADS):
        start = time.perf_counter()
        layer_id = engine.load_layer(layer)
        first.append(time.perf_counter() - start)
        start = time.perf_counter()
        engine.layers.load(layer).result()
        again.append(time.perf_counter() - start)
        engine.unload_layer(layer_id)
    return statistics.median(first), statistics.median(again)


def read_options() -> argparse.Namespace:
    options = parser("Shared prefixes, and LoRA layers that come and go.")
    options.add_argument("--model", default="smollm2-135m", help="of the library, or a GGUF file")
    options.add_argument("--backend", default="auto", choices=["auto", "reference", "native"])
    options.add_argument("--conversations", type=int, default=64)
    options.add_argument("--turns", type=int, default=3, help="of each conversation")
    options.add_argument("--rank", type=int, default=16, help="of the layers, which are on all linear maps")
    options.add_argument("--streams", type=int, default=8, help="answers at once while layers come and go")
    options.add_argument("--openings", type=int, default=3, help="of a second model, each packed and not")
    options.add_argument("--quick", action="store_true", help="less of everything, for a look")
    args = options.parse_args()
    if args.quick:
        args.conversations, args.turns = min(args.conversations, 16), 1
        args.openings = 1
    return args


def main() -> None:
    args = read_options()
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    model = model_path(args.model)
    default = Limits()
    shape = {"count": args.conversations, "turns": args.turns, "system": 200, "question": 30, "answer": 16}
    report = Report("caches", settings={"model": model.name, "rank": args.rank, "streams": args.streams, **shape})
    pools = {
        "default": default,
        "one context": replace(default, kv_cache_tokens=default.max_context),
        "unlimited": replace(default, kv_cache_tokens=UNLIMITED),
    }
    rows = prefix_rows(model, args.backend, pools, 8, **shape)
    report.rows[f"{args.conversations} conversations over {SYSTEM_PROMPTS} system prompts"] = rows
    report.figures["hit_rate_of_unlimited"] = rows[0]["of_unlimited"]
    with tempfile.TemporaryDirectory() as folder:
        config = open_model_file(model).config
        say("layers")
        folders = [
            random_adapter(Path(folder) / str(n), config, rank=args.rank, seed=n, dtype=np.float16)
            for n in range(LAYERS_ACTIVE)
        ]
        time.sleep(3)  # so that the files count as settled, as they are in use
        engine = open_engine_file(model, args.backend, replace(default, max_layers=LAYERS_KEPT), model.parent.name)
        report.settings["backend"] = "native" if is_native(engine) else "reference"
        report.rows["several choices"] = [choices_row(engine, 300)]
        first, again = load_seconds(engine, folders[0])
        report.figures |= {
            "load_layer_seconds": first,
            "load_evicted_layer_seconds": again,
            "layer_file_bytes": sum(file.stat().st_size for file in folders[0].iterdir()),
        }
        layers = [engine.load_layer(each) for each in folders]
        turns = LAYERS_ACTIVE if args.quick else 3 * LAYERS_ACTIVE
        stream(engine, layers[-LAYERS_KEPT // 2 :], args.streams, args.streams, 16)  # warms up
        report.rows["layers that come and go"] = [
            stream(engine, active, args.streams, turns, 32) for active in (layers[-LAYERS_KEPT // 2 :], layers)
        ]
        engine.close()
        say("a second model")
        second = asyncio.run(second_model_rows(model, Path(folder), args.openings, backend=args.backend))
        report.rows["a second model is opened"] = second
        report.figures["second_model_p99_of_idle"] = max(row["p99_of_idle"] for row in second)
    publish(report, as_json=args.json)


if __name__ == "__main__":
    main()
