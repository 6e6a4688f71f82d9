"""How fast the engine prefills and decodes: alone, in a batch, with one layer for all and with a layer each.

    python -m benchmarks.engine [--json] [--model NAME] [--backend reference] [--rank 16] [--tokens 48] [--peers]

Beside every figure stand the two limits of the machine, measured in the same run: the bytes that a step must read over
the memory bandwidth, and its operations over the arithmetic peak.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.layers import random_adapter
from benchmarks.report import Report, float_peak, parser, peak_memory, publish, read_bandwidth
from synapse.commands import Context
from synapse.config import load_settings
from synapse.engines import Delta, Engine, Request, Sampling, open_engine
from synapse.models.library import open_library

BATCHES = (1, 4, 8)
PROMPT_TOKENS = 64
PREFILL_TOKENS = 512
GREEDY = Sampling(temperature=0)


def prompt(engine: Engine, tokens: int, salt: int) -> tuple[int, ...]:
    """A prompt of exactly so many tokens that shares no prefix with one of another salt."""
    text = f"{salt}. The captain looked at the map and said that the next harbour was far away. " * tokens
    return tuple(engine.tokenizer.encode(text)[:tokens])


def prefill_speed(engine: Engine, salt: int) -> float:
    """Prompt tokens per second of one long prompt."""
    engine.add(Request(prompt(engine, PREFILL_TOKENS, salt), sampling=GREEDY, max_tokens=1))
    start = time.perf_counter()
    while engine.busy:
        engine.step()
    return PREFILL_TOKENS / (time.perf_counter() - start)


def decode_speed(engine: Engine, batch: int, layers: list[str], tokens: int) -> float:
    """Tokens per second, over all sequences, once every prompt is in the cache. Sequence i uses layers[i % len]."""
    for i in range(batch):
        stack = ((layers[i % len(layers)], 1.0),) if layers else ()
        request = Request(prompt(engine, PROMPT_TOKENS, i), stack, GREEDY, tokens, ignore_eos=True)
        engine.add(request)
    started: set[str] = set()
    while len(started) < batch:
        started |= {event.request_id for event in engine.step() if isinstance(event, Delta)}
    count, start = 0, time.perf_counter()
    while engine.running == batch:
        count += sum(isinstance(event, Delta) for event in engine.step())
    speed = count / (time.perf_counter() - start)
    while engine.busy:
        engine.step()
    return speed


def transformers_speed(path: Path, engine: Engine, tokens: int) -> float:
    """Decode tokens per second of transformers on the same dequantised weights, float32, one sequence."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    ids = torch.tensor([prompt(engine, PROMPT_TOKENS, 0)])
    settings = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with torch.inference_mode():
        model.generate(ids, max_new_tokens=2, **settings)
        start = time.perf_counter()
        model.generate(ids, max_new_tokens=2, **settings)
        first = time.perf_counter() - start
        start = time.perf_counter()
        model.generate(ids, max_new_tokens=2 + tokens, **settings)
    return tokens / (time.perf_counter() - start - first)


async def model_path(name: str) -> Path:
    async with Context(load_settings()) as context:
        library = await context.get(open_library)
        await library.pull(name)
        return library.resolve(name)


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument("--model", default="smollm2-135m")
    options.add_argument("--backend", default="auto", choices=["auto", "reference", "native"])
    options.add_argument("--rank", type=int, default=16)
    options.add_argument("--tokens", type=int, default=48, help="tokens decoded per sequence")
    options.add_argument("--peers", action="store_true", help="also run transformers on the same weights")
    args = options.parse_args()

    path = asyncio.run(model_path(args.model))
    start = time.perf_counter()
    engine = open_engine(args.model, args.backend)
    opened = time.perf_counter() - start

    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        paths = [random_adapter(Path(folder) / str(i), engine.config, rank=args.rank, seed=i) for i in range(8)]
        layers = [engine.load_layer(path) for path in paths]
        prefill_speed(engine, salt=1)
        prefill = prefill_speed(engine, salt=2)
        for batch in BATCHES:
            for kind, used in (("none", []), ("same", layers[:1]), ("different", layers)):
                speed = decode_speed(engine, batch, used, args.tokens)
                rows.append({"batch": batch, "layers": kind, "tokens_per_second": speed})
    memory = peak_memory()

    alone = next(row["tokens_per_second"] for row in rows if row["batch"] == 1 and row["layers"] == "none")
    bandwidth, peak = read_bandwidth(), float_peak()
    report = Report(
        "engine",
        settings={"model": args.model, "backend": args.backend, "rank": args.rank, "prompt_tokens": PROMPT_TOKENS},
        figures={
            "open_seconds": opened,
            "prefill_tokens_per_second": prefill,
            "decode_tokens_per_second": alone,
            "peak_memory_bytes": memory,
            "weight_bytes": engine.weight_bytes,
            "memory_bandwidth_bytes_per_second": bandwidth,
            "float_operations_per_second": peak,
            "decode_limit_tokens_per_second": bandwidth / engine.weight_bytes,
            "decode_share_of_limit": alone * engine.weight_bytes / bandwidth,
            "prefill_limit_tokens_per_second": peak / (2 * engine.weight_bytes / 4),
            "prefill_share_of_limit": prefill * 2 * engine.weight_bytes / 4 / peak,
        },
        rows={"decode": rows},
    )
    if args.peers:
        peer = transformers_speed(path, engine, args.tokens)
        report.figures["transformers_decode_tokens_per_second"] = peer
        report.figures["decode_ratio_to_transformers"] = alone / peer
    publish(report, as_json=args.json)


if __name__ == "__main__":
    main()
