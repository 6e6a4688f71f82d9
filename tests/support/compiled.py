"""The compiler, remembered between runs: what it made of the same sources with the same flags is what it would make."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

import platformdirs

from synapse.kernels.compiler import compile_source, compiler_version
from synapse.kernels.cpu import cpu

_HOME = Path(os.environ.get("SYNAPSE_TEST_HOME") or platformdirs.user_cache_path("synapse-tests"))


def compile_remembered(compiler: Path, source: Path, target: Path, *flags: str) -> None:
    """As `compile_source`; only a source that was refused is always compiled again."""
    digest = hashlib.sha256(f"{compiler_version(compiler)} {cpu()} {source.name} {flags}".encode())
    for file in sorted(source.parent.glob("*.mojo")):  # any of them may be imported
        content = file.read_bytes()
        digest.update(f"{file.name} {len(content)} ".encode() + content)
    kept = _HOME / "compiled" / digest.hexdigest()
    if not kept.exists():
        compile_source(compiler, source, target, *flags)
        kept.parent.mkdir(parents=True, exist_ok=True)
        unfinished = kept.with_suffix(f".{os.getpid()}")
        shutil.copy2(target, unfinished)
        unfinished.replace(kept)
    shutil.copy2(kept, target)
