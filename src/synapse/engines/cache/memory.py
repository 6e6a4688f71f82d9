"""The memory of this machine: how much there is, how much of it the KV cache may take, and giving it back."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

SHARE = 8
"""The part of the machine's memory that one engine's KV cache may take at most, and its layers: an eighth each."""
BATCHES = 4
"""No more than this many batches of sequences of the longest length are ever kept."""
CGROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def default_cache_tokens(token_bytes: int, max_bytes: int, *, context: int, max_batch: int) -> int:
    """Tokens that a KV cache holds within `max_bytes` and an eighth of the memory here, at least one `context`."""
    within = min(max_bytes, machine_memory() // SHARE) // token_bytes
    return max(context, min(within, BATCHES * max_batch * context))


def machine_memory() -> int:
    """Bytes of memory of this machine, or of the container that this process may not leave."""
    limits = [int(text) for path in CGROUP_LIMITS if path.exists() and (text := path.read_text().strip()).isdigit()]
    if hasattr(os, "sysconf"):
        limits.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return min(limits, default=4 * 2**30)


def give_back() -> None:
    """Return freed memory to the system. glibc keeps most of what a model had, once larger pieces have been freed."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
