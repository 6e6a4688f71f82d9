"""The compiled pattern search, kept between runs, and an index whose answers are known."""

from __future__ import annotations

import os
from functools import cache, partial
from pathlib import Path

import numpy as np
import platformdirs
from numpy.typing import NDArray

from synapse.kernels.cache import KernelBuild, KernelSpec, build_kernel, load_build
from synapse.vectors.kernel import KERNEL, scan_native
from synapse.vectors.scan import Scan, scan_reference


@cache
def kernel_build(spec: KernelSpec = KERNEL) -> KernelBuild:
    """Compiled by the first run that needs it. `SYNAPSE_TEST_HOME` moves it out of the platform's cache folder."""
    home = Path(os.environ.get("SYNAPSE_TEST_HOME") or platformdirs.user_cache_path("synapse-tests"))
    folder = home / "kernels"
    folder.mkdir(parents=True, exist_ok=True)
    return build_kernel(spec, folder)


@cache
def native_scan() -> Scan:
    return partial(scan_native, load_build(KERNEL, kernel_build(), kernel_build().path.parent))


def scan_called(name: str) -> Scan:
    """The scan of a parametrised test: ``reference`` or ``native``."""
    return {"reference": lambda: scan_reference, "native": native_scan}[name]()


def brute_force(
    metric: str, vectors: dict[int, NDArray[np.float32]], query: NDArray[np.float32], k: int
) -> tuple[list[int], NDArray[np.float64]]:
    """The k nearest ids by definition, one vector at a time, and the float64 score of each."""
    scored = []
    for identity, vector in vectors.items():
        q, x = query.astype(np.float64), vector.astype(np.float64)
        if metric == "l2":
            score = -float(((q - x) ** 2).sum())
        elif metric == "cosine":
            lengths = float(np.sqrt((q * q).sum()) * np.sqrt((x * x).sum()))
            score = float((q * x).sum()) / lengths if lengths else 0.0
        else:
            score = float((q * x).sum())
        scored.append((-float(np.float32(score)), identity, score))
    scored.sort()
    return [identity for _, identity, _ in scored[:k]], np.array([score for _, _, score in scored[:k]])
