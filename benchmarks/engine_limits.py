"""What the machine allows at most: bytes that must be read over its bandwidth, operations over its arithmetic peak."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from threadpoolctl import threadpool_limits

from benchmarks.engine_speed import PREFILL_TOKENS, PROMPT_TOKENS, Work
from benchmarks.report import float_peak, read_bandwidth
from synapse.engines import Engine
from synapse.models.config import PROJECTIONS

DOT_PRODUCTS = ("avx512_vnni", "avx_vnni", "asimddp")
"""What /proc/cpuinfo calls instructions that add up four 8-bit products where others make one float32 product."""


def integer_factor() -> int:
    """8-bit products in the time of one in float32: four, or two where AVX2 takes two multiplications for four."""
    info = Path("/proc/cpuinfo")
    return 4 if not info.exists() or any(name in info.read_text() for name in DOT_PRODUCTS) else 2


@dataclass(frozen=True)
class Machine:
    """Bytes per second read from memory, and float32 operations per second, with so many threads."""

    bandwidth: float
    float_peak: float


def measure_machine(threads: int) -> Machine:
    with threadpool_limits(threads, user_api="blas"):
        return Machine(read_bandwidth(), float_peak())


def is_native(engine: Engine) -> bool:
    """Whether its weights are quantised, as only the native engine's are."""
    config = engine.config
    block = sum(out * width for out, width in map(config.linear_shape, PROJECTIONS))
    return engine.weight_bytes < 2 * (block * config.blocks + config.vocab * config.hidden)


def limits(engine: Engine, machine: Machine, work: Work, *, rank: int, tokens: int, reached: float) -> dict[str, Any]:
    """The limits of one step of this work, and the share of them that `reached` tokens per second are.

    Attention is counted at the length in the middle of the measurement.
    """
    config = engine.config
    block = sum(out * width for out, width in map(config.linear_shape, PROJECTIONS))
    layer = rank * sum(out + width for out, width in map(config.linear_shape, PROJECTIONS))
    head = config.vocab * config.hidden
    native = is_native(engine)
    cached = config.blocks * config.kv_heads * config.head_dim * 2 * (2 if native else 4)
    rows = PREFILL_TOKENS if work.prefill else work.sequences
    length = PREFILL_TOKENS / 2 if work.prefill else PROMPT_TOKENS + tokens / 2
    steps = -(-PREFILL_TOKENS // engine.limits.step_tokens) if work.prefill else 1

    sizes = sorted(engine.layers.sizes().values())[-work.layers :] if work.layers else []
    read = steps * engine.weight_bytes + sum(sizes) + cached * length * work.sequences
    each = block + (layer if work.layers else 0) + 2 * config.heads * config.head_dim * length
    operations = 2 * rows * config.blocks * each + 2 * head * work.sequences
    peak = machine.float_peak * (integer_factor() if native else 1)
    seconds = {"memory": read / machine.bandwidth, "arithmetic": operations / peak}
    bound = max(seconds, key=lambda name: seconds[name])
    return {
        "work": work.name,
        "bytes": round(read),
        "operations": round(operations),
        "bound_by": bound,
        "limit_tokens_per_second": rows / seconds[bound],
        "tokens_per_second": reached,
        "share": reached * seconds[bound] / rows,
    }
