"""The Mojo compiler: where it is, which one it is, and running it."""

from __future__ import annotations

import shutil
import subprocess
import sysconfig
from functools import cache
from pathlib import Path

from synapse.errors import InternalError, Unavailable

OPTIONS = ("-O3", "-D", "ASSERT=none")
"""How every kernel is compiled. An assertion of Mojo's library would print with Mojo's runtime, and so need it."""
FLAGS = ("--emit", "shared-lib", *OPTIONS)
"""What every library is compiled with."""
COMPILE_SECONDS = 300


class CompilerMissing(Unavailable):
    """There is nothing to compile Mojo with."""

    code = "compiler_missing"


class BuildFailed(InternalError):
    """The compiler did not accept a kernel's source."""

    code = "kernel_build_failed"


def find_compiler() -> Path:
    """The `mojo` of this environment, or else of the PATH.

    Raises:
        CompilerMissing: there is none.
    """
    own = Path(sysconfig.get_path("scripts")) / "mojo"
    found = str(own) if own.exists() else shutil.which("mojo")
    if found is None:
        raise CompilerMissing(
            "the Mojo compiler is not installed, so no kernel can be built; everything works without, only slower",
            hint="pip install 'synapse[native]'",
        )
    return Path(found)


@cache
def compiler_version(compiler: Path) -> str:
    """Its version and revision, such as ``1.2.0.2016d0cd``.

    Raises:
        BuildFailed: it does not run.
    """
    words = run_tool([str(compiler), "--version"], compiler).split()
    return ".".join(word.strip("()") for word in words[1:3])


def compile_source(compiler: Path, source: Path, target: Path, *flags: str) -> None:
    """Run the compiler.

    Raises:
        BuildFailed: it refused the source, or took too long.
    """
    run_tool([str(compiler), "build", *flags, str(source), "-o", str(target)], source)


def run_tool(command: list[str], source: Path) -> str:
    """Run a compiler or linker on a source, and return what it prints.

    Raises:
        BuildFailed: it failed, or took too long.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_SECONDS, check=False)  # noqa: S603
    except subprocess.TimeoutExpired as error:
        raise BuildFailed(f"{command[0]} did not finish with {source} in {COMPILE_SECONDS} s") from error
    if done.returncode:
        raise BuildFailed(
            f"{command[0]} failed with {source}:\n{done.stderr.strip()[-4000:]}",
            hint="the compiler must be the version that `pip install 'synapse[native]'` installs",
        )
    return done.stdout
