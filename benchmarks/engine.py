"""The engine beside llama.cpp, its own NumPy reference and the limits of the machine, in one run.

    python -m benchmarks.engine --peers --json [--quick] [--model NAME] [--backend auto]

Speed: decoding with and without layers, and prefill; contenders take turns, the median of the rounds counts. Quality:
divergence of the logits from those of float32, and perplexity. Memory: that of one worker, and how fast it opens and
loads layers. All with two threads. See docs/guide/benchmarks.md.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import structlog

from benchmarks import engine_limits, engine_memory, engine_quality, engine_speed
from benchmarks.engine_peers import HOW_TO_GET, QUANTISED, LlamaCpp, Peer, open_peers
from benchmarks.engine_speed import OURS, PEER, SHAPE_WORKS, WORKS, Contenders, Work
from benchmarks.layers import random_adapter
from benchmarks.neighbours import Neighbours
from benchmarks.report import Report, parser, publish
from benchmarks.shapes import SHAPES, write_shape
from synapse.commands import Context
from synapse.config import load_settings
from synapse.engines import Engine, Limits
from synapse.engines.native.packed.file import Quantisation
from synapse.engines.opening import open_engine_file
from synapse.errors import SynapseError, Unavailable
from synapse.models.gguf_file import open_model_file
from synapse.models.library import open_library

THREADS = 2
LAYERS = max(work.layers for work in WORKS)
STRENGTH = 4.0
"""Of the layer with which quality is measured: it changes the answers more than quantisation does."""
WORKER_LAYERS = 20
COMPARED = 4
"""Windows of the text whose logits are compared: 2,048 positions."""
LIMITS = Limits(
    threads=THREADS,
    max_batch=LAYERS,
    kv_cache_tokens=512 * LAYERS,
    max_layers=LAYERS + 1,
    max_layer_bytes=2**31,
    prompt_lookup=False,
)
QUANTISATIONS: dict[str, Quantisation] = {"int8": "int8", "4-bit": "4bit"}


def model_path(name: str) -> Path:
    """The GGUF file of a model of the library, pulled if need be, or the file itself."""
    file = Path(name)
    return file.resolve() if file.is_file() else asyncio.run(pull(name))


async def pull(name: str) -> Path:
    async with Context(load_settings()) as context:
        library = await context.get(open_library)
        await library.pull(name)
        return library.resolve(name)


def say(text: str) -> None:
    """Progress, where it is not in the way of the result."""
    print(text, file=sys.stderr, flush=True)


def find_peer(args: argparse.Namespace, stack: ExitStack) -> LlamaCpp | None:
    if not args.peers:
        return None
    if not args.peer_python:
        say(HOW_TO_GET)
        return None
    try:
        return stack.enter_context(LlamaCpp(args.peer_python))
    except Unavailable as error:
        say(f"{error.message}\n{error.hint}")
        return None


def measure_memory(report: Report, model: Path, backend: Any, layers: Sequence[Path]) -> None:
    rows = engine_memory.measure(model, backend, THREADS, layers[:WORKER_LAYERS])
    report.rows[f"worker with {WORKER_LAYERS} layers"] = rows
    second = rows[-1]
    report.figures |= {
        "worker_resident_bytes": second["resident_bytes"],
        "worker_second_open_seconds": second["open_seconds"],
        "load_layer_seconds": second["load_layer_seconds"],
        "bytes_freed_by_unloading": second["resident_bytes"] - second["unloaded_resident_bytes"],
    }


def measure_speed(report: Report, everybody: Contenders, neighbours: Neighbours, args: argparse.Namespace) -> None:
    report.rows["ratios"], report.rows["limits"] = [], []
    before = engine_limits.measure_machine(THREADS)
    reached: dict[Work, float] = {}
    best: dict[str, str | None] = {}
    for work in SHAPE_WORKS if args.shape else WORKS:
        say(work.name)
        turns = engine_speed.turns(work, everybody, args.tokens)
        if work.like in best:
            turns = {name: turn for name, turn in turns.items() if not name.startswith(PEER) or name == best[work.like]}
        speeds = engine_speed.take_turns(turns, args.rounds, neighbours)
        best[work.name] = engine_speed.fastest(PEER, speeds)
        report.rows[f"tokens per second: {work.name}"] = engine_speed.table(speeds)
        report.rows["ratios"] += engine_speed.ratios(work, speeds)
        reached[work] = statistics.median(speeds[OURS])
    after = engine_limits.measure_machine(THREADS)  # again, since other programs may be in the way
    machine = engine_limits.Machine(max(before.bandwidth, after.bandwidth), max(before.float_peak, after.float_peak))
    report.figures["largest_cpu_share_of_others"] = neighbours.worst
    report.figures["memory_bandwidth_bytes_per_second"] = machine.bandwidth
    report.figures["float_operations_per_second"] = machine.float_peak
    for work, speed in reached.items():
        report.rows["limits"].append(
            engine_limits.limits(everybody.engine, machine, work, rank=args.rank, tokens=args.tokens, reached=speed)
        )
    if not report.rows["ratios"]:
        del report.rows["ratios"]


def logits_of(engine: Engine, layer: Path) -> engine_quality.Model:
    layer_id = engine.load_layer(layer)
    return lambda tokens, on: engine.logits(tokens, ((layer_id, 1.0),) if on else ())


def peer_logits(peer: Peer) -> engine_quality.Model:
    return lambda tokens, on: peer.logits(tokens, LAYERS if on else None)


def measure_quality(
    report: Report, everybody: Contenders, quantised: dict[str, Engine], layer: Path, args: argparse.Namespace
) -> None:
    truth = everybody.reference or everybody.engine
    quality = engine_quality.measure(
        logits_of(truth, layer),
        {name: logits_of(engine, layer) for name, engine in quantised.items()},
        {peer.name: peer_logits(peer) for peer in everybody.peers},
        engine_quality.windows(truth.tokenizer, args.perplexity_tokens),
        compared=COMPARED,
        say=say,
    )
    if quality.comparisons:
        report.rows["divergence from float32"] = quality.divergence_rows()
    report.rows["perplexity"] = quality.perplexity_rows()


def open_quantised(model: Path, engine: Engine, stack: ExitStack) -> dict[str, Engine]:
    """The engine as it is, and with everything in 8 and in 4 bits; nothing if it is the reference."""
    if not engine_limits.is_native(engine):
        return {}
    engines = {f"{OURS} as shipped": engine}
    for name, quantisation in QUANTISATIONS.items():
        limits = replace(LIMITS, quantisation=quantisation)
        engines[f"{OURS} {name}"] = open_engine_file(model, "native", limits, model.parent.name)
        stack.callback(engines[f"{OURS} {name}"].close)
    return engines


def read_options() -> argparse.Namespace:
    options = parser("The engine beside llama.cpp, its NumPy reference and the limits of the machine.")
    options.add_argument("--model", default="smollm2-135m", help="of the library, or a GGUF file")
    options.add_argument(
        "--shape", choices=SHAPES, help="random weights in this shape, with --model's tokenizer: speed only"
    )
    options.add_argument("--backend", default="auto", choices=["auto", "reference", "native"])
    options.add_argument("--rank", type=int, default=16, help="of the layers, which are on all linear maps")
    options.add_argument("--tokens", type=int, default=32, help="decoded per sequence and turn")
    options.add_argument("--rounds", type=int, default=5, help="counted, after one that warms up")
    options.add_argument(
        "--patience", type=float, default=300, help="seconds to wait, in all, for other programs to rest"
    )
    options.add_argument("--peers", action="store_true", help="llama.cpp too, and quality")
    options.add_argument("--peer-python", default=os.environ.get("SYNAPSE_PEER_PYTHON"), help="has llama-cpp-python")
    options.add_argument("--formats", nargs="*", choices=QUANTISED, default=["Q4_0", "Q8_0", "BF16", "F16"])
    options.add_argument("--quality", action="store_true", help="divergence and perplexity without peers as well")
    options.add_argument("--perplexity-tokens", type=int, default=50_000)
    options.add_argument("--quick", action="store_true", help="one short round of everything, for a look")
    args = options.parse_args()
    if args.quick:
        args.tokens, args.rounds, args.patience = min(args.tokens, 4), 1, 0
        args.perplexity_tokens, args.formats = 2 * engine_quality.WINDOW, args.formats[:1]
    if args.shape:
        args.formats = []  # it is Q4_0 as it is: the fastest of llama.cpp's
    return args


def main() -> None:
    args = read_options()
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    model = model_path(args.model)
    report = Report(
        "engine",
        settings={
            "model": model.name,
            "threads": THREADS,
            "rank": args.rank,
            "prompt_tokens": engine_speed.PROMPT_TOKENS,
            "decoded_tokens": args.tokens,
            "rounds": args.rounds,
            "load before": round(os.getloadavg()[0], 2),
        },
    )
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if args.shape:
            report.settings["model"] = f"random Q4_0 weights in the shape {args.shape}"
            model = write_shape(folder / f"{args.shape}.gguf", model, SHAPES[args.shape])
        config = open_model_file(model).config
        layers = [
            random_adapter(folder / str(i), config, rank=args.rank, seed=i, dtype=np.float16)
            for i in range(8 if args.shape else LAYERS)
        ]
        strong = random_adapter(
            folder / "strong", config, rank=args.rank, seed=LAYERS, dtype=np.float16, strength=STRENGTH
        )
        if not args.shape:
            say("memory of a worker")
            measure_memory(report, model, args.backend, layers)
        engine = open_engine_file(model, args.backend, LIMITS, model.parent.name)
        native = engine_limits.is_native(engine)
        reference = (
            open_engine_file(model, "reference", LIMITS, model.parent.name) if native and not args.shape else None
        )
        report.settings["backend"] = "native" if native else "reference"
        ids = [engine.load_layer(layer) for layer in layers]
        for layer in layers[:8]:
            if reference is not None:
                reference.load_layer(layer)
        peers: list[Peer] = []
        worker = find_peer(args, stack)
        if worker is not None:
            say(f"llama.cpp: {', '.join(args.formats)}")
            report.settings |= {"llama-cpp-python": worker.version, "llama.cpp": worker.system.strip()}
            peers = open_peers(worker, model, [*layers, strong], config, folder=folder, formats=args.formats)
        with_lookup = replace(LIMITS, prompt_lookup=True)
        guessing = open_engine_file(model, "native", with_lookup, model.parent.name) if native else None
        everybody = Contenders(engine, guessing, reference, ids, peers)
        neighbours = Neighbours([worker.process] if worker is not None else [], args.patience)
        measure_speed(report, everybody, neighbours, args)
        if (args.peers or args.quality) and not args.shape:
            measure_quality(report, everybody, open_quantised(model, engine, stack), strong, args)
    report.settings["load after"] = round(os.getloadavg()[0], 2)
    publish(report, as_json=args.json)


if __name__ == "__main__":
    try:
        main()
    except SynapseError as error:
        sys.exit(f"error: {error.message}" + (f"\nhint: {error.hint}" if error.hint else ""))
