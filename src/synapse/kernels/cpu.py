"""The processor: what code compiled for it depends on, and whether it has what a library was compiled for."""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")

FEATURES: tuple[tuple[str, ...], ...] = (
    ("avx2", "fma", "f16c"),
    ("avx512f", "avx512bw", "avx512vl", "avx512_vnni"),
    ("asimddp",),
    ("avx512f",),
)
"""By bit of what `<name>_cpu_features` of a library returns: the flags in /proc/cpuinfo that it needs."""


@cache
def cpu() -> str:
    """What code compiled for this CPU depends on: the architecture, and the model and features where Linux tells."""
    kept = _facts()
    names = ("vendor_id", "cpu family", "model", "flags", "CPU implementer", "CPU part", "Features")
    return "\n".join([platform.machine(), *(kept.get(name, "") for name in names)])


def lacking_features(mask: int) -> tuple[str, ...]:
    """What this CPU lacks of the features in a mask, by their names in /proc/cpuinfo; a bit nobody knows is one too.

    Nothing is lacking where the system does not list its features: the self-test has to find out there.
    """
    facts = _facts()
    present = f"{facts.get('flags', '')} {facts.get('Features', '')}".split()
    if not present:
        return ()
    needed = [name for bit, names in enumerate(FEATURES) if mask >> bit & 1 for name in names]
    unknown = [f"feature {bit}" for bit in range(len(FEATURES), mask.bit_length()) if mask >> bit & 1]
    return (*dict.fromkeys(name for name in needed if name not in present), *unknown)


def _facts() -> dict[str, str]:
    """The first processor's lines of /proc/cpuinfo; empty where there is none."""
    lines = CPUINFO.read_text().splitlines() if CPUINFO.exists() else []
    facts = dict(line.split(":", 1) for line in reversed(lines) if ":" in line)
    return {name.strip(): value.strip() for name, value in facts.items()}
