"""The HTTP server as its users meet it, beside llama.cpp's with the same adapters, models, clients and questions.

    python -m benchmarks.serving --llama-server PATH --json [--quick] [--model NAME]

Every client streams chat completions of its own persona, one after the other; each persona has a system prompt and a
layer of its own. The same requests are given to the engine within this process, so that what the way to the client
costs is seen. Contenders take turns, the median of the rounds counts. See docs/guide/benchmarks.md.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import structlog

from benchmarks.engine import model_path, say
from benchmarks.layers import random_adapter
from benchmarks.lora_gguf import write_lora_gguf
from benchmarks.neighbours import Neighbours
from benchmarks.report import Report, parser, publish
from benchmarks.serving_clients import Answer, Answers, Clients
from benchmarks.serving_servers import ServerProcess, llama_server, quantised, synapse_up
from synapse.commands import Context
from synapse.config import Settings, load_settings
from synapse.engines import Engine, Finished, Request, Sampling
from synapse.engines.host import limits_from
from synapse.engines.opening import open_engine_file
from synapse.errors import SynapseError
from synapse.genome.opening import open_layers
from synapse.models.chat_template import Message, encode_chat
from synapse.models.config import ModelConfig
from synapse.models.gguf_file import open_model_file
from synapse.models.library import open_library
from synapse.personas.entities import Persona
from synapse.personas.layers import make_genome
from synapse.personas.sampling import SamplingDefaults
from synapse.store import open_store

MODEL = "model"
THREADS = 2
RANK = 16
CONTEXT = 512
"""Tokens of each of llama-server's slots."""
TOKENS = 48
DEFAULT = SamplingDefaults()
PAUSE = 0.3
IDLE_SECONDS = 10.0
OURS, GREEDY, WITHIN, PEER = "Synapse", "Synapse, greedy", "the engine within the process", "llama-server"
AT_ONCE = 8
"""Sequences that llama-server has room for; more requests wait."""
FLAGS = ("", "--flash-attn off", "--poll 0", "--ubatch-size 128", "--cache-reuse 16")
"""Ways to start llama-server, tried one after the other: the fastest takes part."""


@dataclass(frozen=True)
class Work:
    """So many clients, each with a persona and a layer of its own, and how many requests each sends in a turn.

    Attributes:
        at_least: llama-server's speed as a multiple of which ours must be.
        of_engine: the share of the engine's own speed that must arrive.
        first_at_most: the share of llama-server's p99 time to the first token that ours may take.
    """

    clients: int
    requests: int
    at_least: float
    of_engine: float | None = None
    first_at_most: float | None = None

    @property
    def name(self) -> str:
        return f"{self.clients} client{'s' if self.clients > 1 else ''}, each with a layer"


WORKS = (
    Work(8, 3, at_least=5.0, of_engine=0.85),
    Work(32, 1, at_least=5.0, first_at_most=0.25),
    Work(1, 4, at_least=1.7),
)
LAYERS = max(work.clients for work in WORKS)
SERVED: dict[str, Any] = {"max_batch": LAYERS, "max_layers": LAYERS, "threads": THREADS}
"""Settings of the server and of the engine that differ from the defaults."""
TRADES = ("captain", "baker", "gardener", "librarian", "clockmaker", "astronomer", "weaver", "ferryman")
THINGS = ("a lost key", "the last winter", "an old bridge", "two brothers", "a strange letter", "the long night")


def persona_name(i: int) -> str:
    return f"persona-{i}"


def system_prompt(i: int) -> str:
    trade = TRADES[i % len(TRADES)]
    return (
        f"You are the {trade} of town number {i}. You speak as a {trade} speaks, you know everybody in the town by "
        "name, and you never say that you are a machine. You like to tell stories, and you take your time."
    )


def question(salt: int) -> str:
    return f"Tell me a very long story about {THINGS[salt % len(THINGS)]}, the one with the number {salt}."


@dataclass
class Speeds:
    """Of one contender: tokens per second of each round, and the seconds to the first token of all answers."""

    rounds: list[float] = field(default_factory=list)
    first_s: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)

    def add(self, answers: Answers) -> float:
        self.rounds.append(answers.tokens_per_second)
        self.first_s += [answer.first_s for answer in answers.answers]
        self.tokens += [answer.tokens for answer in answers.answers]
        return self.rounds[-1]

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)

    def first(self, share: float) -> float:
        return float(np.quantile(self.first_s, share))


Turn = Callable[[Work], Answers]
"""Does the work once."""


HOW_TO_GET = """llama-server is not here, so only Synapse is measured. To compare, build llama.cpp from its sources with
`cmake -B build && cmake --build build --target llama-server llama-quantize`; --llama-server names the program."""


def take_built(source: Path, home: Path) -> None:
    """Take over the kernels that another home has built, so that the server need not build them again."""
    for name in ("kernels",):
        if (source / name).is_dir():
            shutil.copytree(source / name, home / name)


async def fill_home(settings: Settings, model: Path, layers: Sequence[Path]) -> None:
    """Give a home the model, the layers, and a persona for each of them."""
    async with Context(settings) as context:
        await (await context.get(open_library)).pull(str(model), name=MODEL)
        store, registry = await context.get(open_store), await context.get(open_layers)
        for i, layer in enumerate(layers):
            kept = await registry.add(str(layer), name=f"layer-{i}")
            persona = Persona(name=persona_name(i), system_prompt=system_prompt(i), base_model=MODEL)
            await store.create(persona)
            genome = await make_genome(context, persona, [(kept.name, 1.0)])
            await store.update(Persona, persona.id, {"genome_id": genome.id})


def our_body(client: int, salt: int, *, greedy: bool) -> dict[str, Any]:
    """A request as one of our users writes it: the persona has everything else."""
    body = {
        "model": persona_name(client),
        "messages": [{"role": "user", "content": question(salt)}],
        "max_tokens": TOKENS,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    return body | ({"temperature": 0} if greedy else {})


def their_body(client: int, salt: int) -> dict[str, Any]:
    """The same for llama-server, with the sampling of the persona.

    `top_k` is its own default: without it, it sorts the whole vocabulary for every token, which would be unfair.
    """
    return {
        "messages": [
            {"role": "system", "content": system_prompt(client)},
            {"role": "user", "content": question(salt)},
        ],
        "lora": [{"id": client, "scale": 1.0}],
        "temperature": DEFAULT.temperature,
        "top_p": DEFAULT.top_p,
        "max_tokens": TOKENS,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def run_served(
    clients: Clients, port: int, body: Callable[[int, int], dict[str, Any]], salts: Iterator[int], work: Work
) -> Answers:
    """The work by way of a server."""
    return clients.run(port, [[body(i, next(salts)) for _ in range(work.requests)] for i in range(work.clients)])


def run_within(engine: Engine, layers: Sequence[str], sampling: Sampling, salts: Iterator[int], work: Work) -> Answers:
    """The same without a server: whose answer ends has its next request added before the next step."""
    left = [work.requests] * work.clients
    clients: dict[str, int] = {}
    answers: dict[str, Answer] = {}
    start = time.perf_counter()

    def add(client: int) -> None:
        left[client] -= 1
        said = [Message("system", system_prompt(client)), Message("user", question(next(salts)))]
        prompt = tuple(encode_chat(engine.tokenizer, engine.chat_template, said))
        id_ = engine.add(Request(prompt, ((layers[client], 1.0),), sampling, TOKENS))
        clients[id_], answers[id_] = client, Answer(0.0, -time.perf_counter(), 0)

    for client in range(work.clients):
        add(client)
    while engine.busy:
        for event in engine.step():
            now, answer = time.perf_counter(), answers[event.request_id]
            if isinstance(event, Finished):
                answer.seconds += now
                answer.tokens = event.completion_tokens
                if left[clients[event.request_id]]:
                    add(clients[event.request_id])
            else:
                answer.first_s = answer.first_s or answer.seconds + now
    return Answers(time.perf_counter() - start, list(answers.values()))


@dataclass(frozen=True)
class Llama:
    """llama-server with all adapters."""

    binary: Path
    model: Path
    adapters: Sequence[Path]
    log: Path

    def start(self, more: Sequence[str]) -> ServerProcess:
        room = ("--parallel", str(AT_ONCE), "--ctx-size", str(AT_ONCE * CONTEXT))
        flags = ("--threads", str(THREADS), *room, *more)
        return llama_server(self.binary, self.model, self.adapters, flags=flags, log=self.log)

    def fastest(self, clients: Clients, neighbours: Neighbours, tried: Sequence[Sequence[str]]) -> list[dict[str, Any]]:
        """How fast it is with each of these flags, where all its slots are taken; the fastest first."""
        rows = []
        for more in tried:
            with self.start(more) as server:
                neighbours.ours = [clients.process, server.process]
                turn = partial(run_served, clients, server.port, their_body, count(10**6), Work(AT_ONCE, 1, 0))
                turn()
                speed = neighbours.measure(lambda turn=turn: turn().tokens_per_second, PAUSE)
            rows.append({"flags": " ".join(more), "tokens_per_second": speed})
            say(f"{PEER} {rows[-1]['flags']}: {speed:.1f} tokens per second")
        return sorted(rows, key=lambda row: -row["tokens_per_second"])


def make_llama(
    binary: Path, model: Path, layers: Sequence[Path], config: ModelConfig, *, folder: Path, format_: str
) -> Llama:
    """The same model and layers as llama.cpp reads them."""
    theirs = quantised(binary, model, folder / "theirs.gguf", format_, THREADS)
    adapters = [write_lora_gguf(layer, folder / f"{i}.lora.gguf", config, np.float16) for i, layer in enumerate(layers)]
    return Llama(binary, theirs, adapters, folder / "llama-server.log")


def take_turns(turns: Mapping[str, Turn], work: Work, rounds: int, neighbours: Neighbours) -> dict[str, Speeds]:
    """What each contender reached in the rounds, the first of which warms up. Another one begins every round."""
    speeds = {name: Speeds() for name in turns}
    for turn in turns.values():
        turn(work)
    names = list(turns)
    for round_ in range(rounds):
        for name in names[round_ % len(names) :] + names[: round_ % len(names)]:
            kept: list[Answers] = []

            def measured(turn: Turn = turns[name], kept: list[Answers] = kept) -> float:
                kept.append(turn(work))
                return kept[-1].tokens_per_second

            neighbours.measure(measured, PAUSE)
            speeds[name].add(kept[-1])
    return speeds


def table(speeds: Mapping[str, Speeds]) -> list[dict[str, Any]]:
    """One row per contender."""
    return [
        {
            "contender": name,
            "tokens_per_second": found.median,
            "slowest": min(found.rounds),
            "fastest": max(found.rounds),
            "tokens_of_an_answer": statistics.mean(found.tokens),
            "first_token_p50_ms": 1000 * found.first(0.5),
            "first_token_p99_ms": 1000 * found.first(0.99),
        }
        for name, found in speeds.items()
    ]


def ratios(work: Work, speeds: Mapping[str, Speeds]) -> list[dict[str, Any]]:
    """What is asked for, and what was reached: `at_least` or, for times, `at_most`."""
    ours = speeds[OURS]
    rows = [
        _ratio(work, f"speed, of {WITHIN}", ours.median / speeds[WITHIN].median, at_least=work.of_engine),
        _ratio(work, f"speed, greedy, of {WITHIN}", speeds[GREEDY].median / speeds[f"{WITHIN}, greedy"].median),
    ]
    if PEER in speeds:
        peer = speeds[PEER]
        rows += [
            _ratio(work, f"speed, of {PEER}", ours.median / peer.median, at_least=work.at_least),
            _ratio(work, f"time to first token p50, of {PEER}", ours.first(0.5) / peer.first(0.5)),
            _ratio(
                work,
                f"time to first token p99, of {PEER}",
                ours.first(0.99) / peer.first(0.99),
                at_most=work.first_at_most,
            ),
        ]
    return rows


def _ratio(
    work: Work, what: str, ratio: float, *, at_least: float | None = None, at_most: float | None = None
) -> dict[str, Any]:
    asked = f"≥ {at_least:g}" if at_least is not None else f"≤ {at_most:g}" if at_most is not None else ""
    met = (at_least is None or ratio >= at_least) and (at_most is None or ratio <= at_most)
    return {"work": work.name, "ratio_of": what, "ratio": ratio, "asked": asked, "met": met if asked else ""}


def read_options() -> argparse.Namespace:
    options = parser("The HTTP server beside llama.cpp's.")
    options.add_argument("--model", default="smollm2-135m", help="of the library, or a GGUF file")
    options.add_argument("--backend", default="auto", choices=["auto", "reference", "native"])
    options.add_argument("--llama-server", type=Path, help="the program; llama-quantize lies beside it")
    options.add_argument("--format", default="Q4_0", help="of the model for llama-server: its fastest")
    options.add_argument("--flags", nargs="*", default=FLAGS, help="ways to start llama-server; the fastest takes part")
    options.add_argument("--rounds", type=int, default=3, help="counted, after one that warms up")
    options.add_argument("--patience", type=float, default=300, help="seconds to wait for other programs to rest")
    options.add_argument("--works", nargs="*", type=int, help="only those with so many clients")
    options.add_argument("--quick", action="store_true", help="one short round of everything, for a look")
    args = options.parse_args()
    if args.quick:
        args.rounds, args.patience, args.flags = 1, 0, args.flags[:1]
    return args


def measure(report: Report, turns: Mapping[str, Turn], works: Sequence[Work], neighbours: Neighbours) -> None:
    report.rows["ratios"] = []
    for work in works:
        say(work.name)
        speeds = take_turns(turns, work, report.settings["rounds"], neighbours)
        report.rows[work.name] = table(speeds)
        report.rows["ratios"] += ratios(work, speeds)
    report.figures["largest_cpu_share_of_others"] = neighbours.worst


def our_turns(
    clients: Clients, port: int, engine: Engine, layers: Sequence[Path], salts: Iterator[int]
) -> dict[str, Turn]:
    ids = [engine.load_layer(layer) for layer in layers]
    sampling = DEFAULT.to_sampling()
    return {
        OURS: partial(run_served, clients, port, partial(our_body, greedy=False), salts),
        GREEDY: partial(run_served, clients, port, partial(our_body, greedy=True), salts),
        WITHIN: partial(run_within, engine, ids, sampling, salts),
        f"{WITHIN}, greedy": partial(run_within, engine, ids, replace(sampling, temperature=0), salts),
    }


def main() -> None:
    args = read_options()
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    works = [work for work in WORKS if not args.works or work.clients in args.works]
    if args.quick:
        works = [replace(work, requests=1) for work in works]
    model = model_path(args.model)
    report = Report("serving", settings={"model": model.name, "threads": THREADS, "rank": RANK})
    report.settings |= {"tokens_of_an_answer": TOKENS, "rounds": args.rounds, "load before": os.getloadavg()[0]}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        config = open_model_file(model).config
        layers = [
            random_adapter(folder / str(i), config, rank=RANK, seed=i, dtype=np.float16)
            for i in range(max(work.clients for work in works))
        ]
        say("a home with personas")
        take_built(load_settings().home, folder / "home")
        chosen = SERVED | {"home": folder / "home", "default_model": MODEL, "backend": args.backend}
        settings = Settings(**chosen)
        os.environ["SYNAPSE_HOME"] = str(settings.home)  # nothing of this run shall be left in another home
        asyncio.run(fill_home(settings, model, layers))
        clients = stack.enter_context(Clients())
        neighbours = Neighbours([clients.process], args.patience)
        llama = None
        if args.llama_server is None:
            say(HOW_TO_GET)
        else:
            llama = make_llama(args.llama_server, model, layers, config, folder=folder, format_=args.format)
            flags = [more.split() for more in args.flags]
            report.rows[f"{PEER} with {AT_ONCE} clients"] = llama.fastest(clients, neighbours, flags)

        ours = stack.enter_context(synapse_up(chosen, folder / "synapse.log"))
        say("idle")
        report.figures["idle_share_of_one_core"] = ours.idle_share(IDLE_SECONDS if not args.quick else 1.0)
        engine = open_engine_file(settings.folder("models") / MODEL / model.name, args.backend, limits_from(settings))
        stack.callback(engine.close)
        neighbours.ours = [clients.process, ours.process]
        salts = count()
        turns = our_turns(clients, ours.port, engine, layers, salts)
        if llama is not None:
            best = report.rows[f"{PEER} with {AT_ONCE} clients"][0]["flags"]
            report.settings[PEER] = f"{args.format} {best}"
            peer = stack.enter_context(llama.start(best.split()))
            neighbours.ours = [*neighbours.ours, peer.process]
            turns[PEER] = partial(run_served, clients, peer.port, their_body, salts)
        measure(report, turns, works, neighbours)
    report.settings["load after"] = os.getloadavg()[0]
    publish(report, as_json=args.json)


if __name__ == "__main__":
    try:
        main()
    except SynapseError as error:
        sys.exit(f"error: {error.message}" + (f"\nhint: {error.hint}" if error.hint else ""))
