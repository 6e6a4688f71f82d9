"""Texts per second of the encoder against sentence-transformers and onnxruntime, on the same texts in one run.

    python -m benchmarks.encoder [--json] [--peer-python PATH] [--texts 200] [--rounds 5] [--threads 2]

All contenders take turns, so a machine that slows down slows all, and the median of the rounds counts. The peers run in
a process of their own, with this interpreter or with `--peer-python`, which then has to have them:

    python -m venv peers && peers/bin/pip install sentence-transformers onnxruntime onnx
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from benchmarks.report import Report, parser, publish
from benchmarks.texts import sample_texts
from synapse.commands import Context
from synapse.config import load_settings
from synapse.encoders import open_encoder
from synapse.encoders.linear import Precision
from synapse.engines.native.kernel import KERNEL
from synapse.kernels.cache import find_build
from synapse.models.library import open_library

PAUSE = 0.2
"""Seconds before each turn. BLAS and OpenMP threads go on spinning for a while, in the way of whoever comes next."""
PRECISIONS: tuple[Precision, ...] = ("float32", "int8")
TRUTH = "sentence-transformers"

Vectors = NDArray[np.float32]


class Peers:
    """The process of `encoder_peers.py`."""

    def __init__(self, python: str) -> None:
        script = Path(__file__).with_name("encoder_peers.py")
        environment = {**os.environ, "TOKENIZERS_PARALLELISM": "true"}
        self._process = subprocess.Popen(
            [python, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def ask(self, **question: Any) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise SystemExit("the process of the peers has ended; what it said stands above")
        return json.loads(answer)

    def vectors(self, peer: str) -> Vectors:
        answer = self.ask(do="vectors", peer=peer)
        return np.frombuffer(base64.b64decode(answer["float32"]), "<f4").reshape(answer["shape"])


async def pulled(name: str) -> Path:
    async with Context(load_settings()) as context:
        return (await (await context.get(open_library)).pull(name)).folder


def take_turns(contenders: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every turn but the first, which warms up, in a new order every round."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    names = list(contenders)
    for turn in range(rounds + 1):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            time.sleep(PAUSE)
            seconds = contenders[name]()
            if turn:
                times[name].append(seconds)
    return times


def least_cosine(a: Vectors, b: Vectors) -> float:
    """Of the pairs of rows, which have length 1."""
    return float(np.einsum("ij,ij->i", a, b, dtype=np.float64).min())


def main() -> None:
    options = parser("Texts per second of the encoder against sentence-transformers and onnxruntime.")
    options.add_argument("--model", default="all-minilm-l6-v2")
    options.add_argument("--peer-python", default=sys.executable, help="an interpreter that has the peers")
    options.add_argument("--texts", type=int, default=200)
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--threads", type=int, default=2)
    args = options.parse_args()

    load_before = os.getloadavg()[0]
    texts = sample_texts(args.texts)
    folder = asyncio.run(pulled(args.model))
    build = find_build(KERNEL, load_settings())
    encoders = {
        f"Synapse {precision}": open_encoder(args.model, precision=precision, threads=args.threads)
        for precision in PRECISIONS
    }

    def turn_of(encode: Callable[[list[str]], Vectors]) -> Callable[[], float]:
        def turn() -> float:
            start = time.perf_counter()
            encode(texts)
            return time.perf_counter() - start

        return turn

    with Peers(args.peer_python) as peers:
        found = peers.ask(do="load", folder=str(folder), texts=texts, threads=args.threads)

        def turn_of_peer(name: str) -> Callable[[], float]:
            return lambda: float(peers.ask(do="encode", peer=name)["seconds"])

        contenders = {name: turn_of(encoder.encode) for name, encoder in encoders.items()}
        contenders |= {name: turn_of_peer(name) for name in found["ready"]}
        vectors = {name: encoder.encode(texts) for name, encoder in encoders.items()}
        vectors |= {name: peers.vectors(name) for name in found["ready"]}
        times = take_turns(contenders, args.rounds)

    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    truth = TRUTH if TRUTH in vectors else "Synapse float32"
    tokens = sum(len(text.ids) for text in encoders["Synapse float32"].tokenize(texts))
    report = Report(
        "encoder",
        settings={
            "model": args.model,
            "kernel": build.build_id[:12] if build else "none: int8 is computed in NumPy",
            "threads": args.threads,
            "texts": len(texts),
            "tokens": tokens,
            "rounds": args.rounds,
            "load before": round(load_before, 2),
            "load after": round(os.getloadavg()[0], 2),
            "peers": found["ready"],
        },
        rows={
            "encoding": [
                {
                    "contender": name,
                    "texts_per_second": len(texts) / seconds,
                    "tokens_per_second": tokens / seconds,
                    f"least_cosine_to_{truth}": round(least_cosine(vectors[name], vectors[truth]), 7),
                }
                for name, seconds in medians.items()
            ]
        },
        figures={
            f"{name}: ratio to {peer}": medians[peer] / medians[name] for name in encoders for peer in found["ready"]
        },
    )
    for name, reason in found["missing"].items():
        report.settings[f"missing: {name}"] = (
            f"{reason}; make an environment with `pip install sentence-transformers onnxruntime onnx` and name its"
            " interpreter with --peer-python"
        )
    publish(report, as_json=args.json)


if __name__ == "__main__":
    main()
