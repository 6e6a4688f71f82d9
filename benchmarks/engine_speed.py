"""The engine's speed beside that of its peers: every contender does the same work, and they take turns in rounds."""

from __future__ import annotations

import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from benchmarks.engine_peers import Peer
from benchmarks.neighbours import Neighbours
from benchmarks.texts import SENTENCES
from synapse.engines import Delta, Engine, Grammar, Request, Sampling

PROMPT_TOKENS = 64
PREFILL_TOKENS = 512
PAUSE = 0.2
"""Seconds before each turn. BLAS and OpenMP threads go on spinning for a while, in the way of whoever comes next."""
GREEDY = Sampling(temperature=0)
PEER = "llama.cpp"
HOPELESS = 0.5
"""Share of the fastest format's speed below which a format drops out: one without instructions here takes minutes."""
OURS, OURS_ONE_LAYER, REFERENCE = "Synapse", "Synapse, one layer for all", "Synapse's NumPy reference"
OURS_GREEDY, OURS_GUESSING = "Synapse, greedily", "Synapse with lookup"
SCHEMA = Grammar(
    "json_schema",
    json.dumps(
        {
            "type": "object",
            "properties": {
                "captain": {"type": "string", "maxLength": 40},
                "harbours": {"type": "array", "items": {"type": "string", "maxLength": 20}, "minItems": 20},
            },
            "required": ["captain", "harbours"],
            "additionalProperties": False,
        }
    ),
)
QUOTED = SENTENCES[:8]
"""What a prompt asks to be said again."""

Prompt = tuple[int, ...]
Turn = Callable[[], float]
"""Does the work once and returns tokens per second."""


@dataclass(frozen=True, eq=False)
class Work:
    """What is measured. With layers, sequence i uses layer i.

    Attributes:
        prefill: a prompt of `PREFILL_TOKENS` tokens; otherwise decoding after prompts of `PROMPT_TOKENS`.
        sampling, grammar: how tokens are chosen.
        quotes: whether the answers repeat their prompts.
        like: work of which this is more; of llama.cpp only what was fastest there takes part.
        at_least: the ratio that is asked for, by contender; `PEER` stands for the fastest of its formats.
    """

    name: str
    sequences: int = 1
    layers: int = 0
    prefill: bool = False
    sampling: Sampling = GREEDY
    grammar: Grammar | None = None
    quotes: bool = False
    like: str = ""
    at_least: Mapping[str, float] = field(default_factory=dict)


WORKS = (
    Work("8 sequences, 8 layers", 8, 8, at_least={PEER: 5.0, REFERENCE: 10.0}),
    Work(
        "32 sequences, 32 layers",
        32,
        32,
        like="8 sequences, 8 layers",
        at_least={PEER: 6.0, OURS_ONE_LAYER: 0.8},
    ),
    Work("8 sequences, no layers", 8, at_least={PEER: 1.5}),
    Work("1 sequence, no layer", at_least={PEER: 1.1}),
    Work(f"prefill of {PREFILL_TOKENS} tokens", prefill=True, at_least={PEER: 1.3}),
    Work(
        "8 sequences, a persona's sampling",
        8,
        sampling=Sampling(temperature=0.7, top_p=0.95, seed=1),
        at_least={OURS_GREEDY: 0.95},
    ),
    Work("8 sequences, min_p", 8, sampling=Sampling(min_p=0.05, seed=1), at_least={OURS_GREEDY: 0.95}),
    Work("8 sequences, temperature 1", 8, sampling=Sampling(seed=1), at_least={OURS_GREEDY: 0.95}),
    Work("8 sequences, a JSON schema", 8, grammar=SCHEMA, at_least={OURS_GREEDY: 0.7}),
    Work("1 sequence that quotes its prompt", quotes=True, at_least={OURS_GUESSING: 1.5}),
    Work("1 sequence that does not", sampling=Sampling(seed=1), at_least={OURS_GUESSING: 0.97}),
)
"""Lookup is off but where it is what is measured: its contender's ratio is turned round, since it is the faster one."""
SHAPE_WORKS = (
    Work("1 sequence, no layer", at_least={PEER: 1.6}),
    Work("8 sequences, no layers", 8, at_least={PEER: 2.8}),
    Work(f"prefill of {PREFILL_TOKENS} tokens", prefill=True, at_least={PEER: 2.3}),
    Work("8 sequences, 8 layers", 8, 8, at_least={PEER: 4.0}),
)
"""In the shape of a larger model; all of our other contenders would take minutes a turn."""


@dataclass(frozen=True)
class Contenders:
    """Who takes part. `layers` are the ids of the same layers in the engine and in the reference, if there is one;
    `guessing` is an engine that guesses tokens by lookup, which the others do not.
    """

    engine: Engine
    guessing: Engine | None
    reference: Engine | None
    layers: Sequence[str]
    peers: Sequence[Peer]


def prompt(engine: Engine, tokens: int, salt: int) -> Prompt:
    """A prompt of exactly so many tokens that shares no prefix with one of another salt."""
    text = f"{salt}. The captain looked at the map and said that the next harbour was far away. "
    one = len(engine.tokenizer.encode(text))
    return tuple(engine.tokenizer.encode(text * (tokens // one + 2))[:tokens])


def prefill(engine: Engine, salts: Iterator[int]) -> float:
    """Prompt tokens per second of one long prompt, which the engine has not seen before."""
    tokens = prompt(engine, PREFILL_TOKENS, next(salts))
    start = time.perf_counter()
    engine.add(Request(tokens, sampling=GREEDY, max_tokens=1))
    while engine.busy:
        engine.step()
    return PREFILL_TOKENS / (time.perf_counter() - start)


def quoting_prompt(engine: Engine, salt: int) -> Prompt:
    """A prompt that asks for its own text, and begins to say it again."""
    text = "\n".join((*QUOTED[salt % len(QUOTED) :], *QUOTED[: salt % len(QUOTED)]))
    return tuple(engine.tokenizer.encode(f"The text:\n{text}\n\nThe same text again, word for word:\n{text[:40]}"))


def decode(engine: Engine, prompts: Sequence[Prompt], layers: Sequence[str], tokens: int, work: Work) -> float:
    """Tokens per second, over all sequences, of so many tokens of each once every prompt is in the cache."""
    ids = [
        engine.add(
            Request(
                prompt,
                ((layer, 1.0),) if layer else (),
                work.sampling,
                engine.context - len(prompt),
                grammar=work.grammar,
                ignore_eos=True,
            )
        )
        for prompt, layer in itertools.zip_longest(prompts, layers)
    ]
    started: set[str] = set()
    while len(started) < len(prompts):
        started |= {event.request_id for event in engine.step() if isinstance(event, Delta)}
    count, goal, start = 0, tokens * len(prompts), time.perf_counter()
    while count < goal and engine.busy:
        count += sum(len(event.tokens) for event in engine.step() if isinstance(event, Delta))
    seconds = time.perf_counter() - start
    for request_id in ids:
        engine.cancel(request_id)
    while engine.busy:
        engine.step()
    return count / seconds


def turns(work: Work, all_: Contenders, tokens: int) -> dict[str, Turn]:
    """Who does this work, and how."""
    engine, reference = all_.engine, all_.reference
    found: dict[str, Turn] = {}
    if work.prefill:
        long = prompt(engine, PREFILL_TOKENS, 0)
        found[OURS] = partial(prefill, engine, itertools.count(1))
        for peer in all_.peers:
            found[peer.name] = partial(peer.prefill, long)
        return found
    if work.quotes:
        prompts = [quoting_prompt(engine, i) for i in range(work.sequences)]
    else:
        prompts = [prompt(engine, PROMPT_TOKENS, i) for i in range(work.sequences)]
    layers = all_.layers[: work.layers]
    found[OURS] = partial(decode, engine, prompts, layers, tokens, work)
    if OURS_GREEDY in work.at_least:
        found[OURS_GREEDY] = partial(
            decode, engine, prompts, layers, tokens, replace(work, sampling=GREEDY, grammar=None)
        )
    if OURS_GUESSING in work.at_least and all_.guessing is not None:
        found[OURS_GUESSING] = partial(decode, all_.guessing, prompts, layers, tokens, work)
    if work.sampling != GREEDY or work.grammar or work.quotes:
        return found
    if OURS_ONE_LAYER in work.at_least:
        found[OURS_ONE_LAYER] = partial(decode, engine, prompts, [layers[0]] * work.sequences, tokens, work)
    if REFERENCE in work.at_least and reference is not None:
        found[REFERENCE] = partial(decode, reference, prompts, layers, max(1, tokens // 4), work)
    for peer in all_.peers:
        if work.layers:
            found[peer.name] = partial(peer.decode_apart, prompts, tokens, lanes=1)
            found[f"{peer.name}, two at a time"] = partial(peer.decode_apart, prompts, tokens, lanes=2)
        else:
            found[peer.name] = partial(peer.decode, prompts, tokens)
    return found


def fastest(who: str, speeds: Mapping[str, Sequence[float]]) -> str | None:
    """Of the contenders whose names begin so, the one with the highest median."""
    beside = [name for name in speeds if name.startswith(who)]
    return max(beside, key=lambda name: statistics.median(speeds[name]), default=None)


def take_turns(contenders: Mapping[str, Turn], rounds: int, neighbours: Neighbours) -> dict[str, list[float]]:
    """The speeds of all rounds but the first, which warms up. Another contender begins every round.

    Of the formats of llama.cpp, those far from its fastest in the first round drop out: only the fastest counts.
    """
    warm = {name: turn() for name, turn in contenders.items()}
    enough = HOPELESS * max((speed for name, speed in warm.items() if name.startswith(PEER)), default=0.0)
    names = [name for name, speed in warm.items() if not name.startswith(PEER) or speed >= enough]
    speeds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(1, rounds + 1):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            speeds[name].append(neighbours.measure(contenders[name], PAUSE))
    return speeds


def table(speeds: Mapping[str, Sequence[float]]) -> list[dict[str, Any]]:
    """One row per contender; the ratio is ours to theirs."""
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    return [
        {
            "contender": name,
            "tokens_per_second": medians[name],
            "slowest": min(values),
            "fastest": max(values),
            "ratio": medians[OURS] / medians[name],
        }
        for name, values in speeds.items()
    ]


def ratios(work: Work, speeds: Mapping[str, Sequence[float]]) -> list[dict[str, Any]]:
    """Our speed as a multiple of each contender's that something is asked for, llama.cpp being as fast as it can."""
    rows = []
    for who, at_least in work.at_least.items():
        against = fastest(who, speeds)
        if against is not None:
            ratio = statistics.median(speeds[OURS]) / statistics.median(speeds[against])
            ratio = 1 / ratio if who == OURS_GUESSING else ratio
            rows.append({"work": work.name, "against": against, "ratio": ratio, "at_least": at_least})
    return rows
