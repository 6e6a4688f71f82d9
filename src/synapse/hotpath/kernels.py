"""Native kernels: compiled from Mojo for this CPU, kept in a cache, and checked before a call is made into them.

A kernel is a Mojo source beside the Python module that specifies it. `build_kernel` compiles it into a library that
needs nothing but libc, `find_build` finds a library that fits, `load_build` checks it and opens it. Kernels are for
Linux; elsewhere, and without the compiler, the references answer.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib
import os
import platform
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from filelock import FileLock

from synapse.config import Settings
from synapse.errors import Corrupt, InternalError, Unavailable
from synapse.hotpath.elf import expected_machine, read_library

MODULES = ("synapse.hotpath.pattern_native",)
"""Each has one `KERNEL`."""
FLAGS = ("--emit", "shared-lib", "-O3")
FOLDER = "kernels"
"""The cache's folder in the home."""
COMPILE_SECONDS = 300


class CompilerMissing(Unavailable):
    """There is nothing to compile Mojo with."""

    code = "compiler_missing"


class BuildFailed(InternalError):
    """The compiler did not accept a kernel's source."""

    code = "kernel_build_failed"


class KernelRefused(Corrupt):
    """A library is not what its kernel must be; no call was made into it, except of its version and its self-test."""

    code = "kernel_refused"


@dataclass(frozen=True)
class KernelSpec:
    """A kernel that ships with Synapse."""

    name: str
    source: Path
    """What is compiled; files it imports are beside it, and their names begin with its own."""
    symbols: tuple[str, ...]
    """What the library must export, `<name>_abi_version` among it."""
    abi_version: int
    self_test: Callable[[ctypes.CDLL], None]
    """Calls the library on a small example and raises on a wrong answer; declares the result types."""
    main: Path | None = None
    """A Mojo source that exports `<name>_main(argc, argv)`, for a kernel that can be a program of its own."""


@dataclass(frozen=True)
class KernelBuild:
    """A library on disk, not yet checked."""

    name: str
    build_id: str
    """Hexadecimal sha256 over source, compiler, CPU and flags; of the file itself for a prebuilt one."""
    path: Path


def kernel_specs() -> dict[str, KernelSpec]:
    """All kernels that ship, by name."""
    specs = (importlib.import_module(module).KERNEL for module in MODULES)
    return {spec.name: spec for spec in specs}


def build_kernel(spec: KernelSpec, folder: Path, *, strict: bool = False) -> KernelBuild:
    """Compile a kernel for this CPU into the cache, unless it is there.

    Two processes that build the same kernel at once wait for each other, and a library appears in the cache only when
    it is complete and has passed every check of `load_build`.

    Args:
        folder: the cache.
        strict: compile even if it is there, and count a warning as an error.

    Raises:
        CompilerMissing: `mojo` is not installed.
        BuildFailed: the compiler refused the source.
        KernelRefused: the new library does not pass its checks.
    """
    compiler = find_compiler()
    build = _cached(spec, folder, compiler_version(compiler))
    with FileLock(folder / f"{spec.name}.lock"):
        if strict or not build.path.exists():
            with tempfile.TemporaryDirectory(dir=folder, prefix=f".{spec.name}-") as scratch:
                library = Path(scratch) / build.path.name
                compile_source(compiler, spec.source, library, *FLAGS, *(["--Werror"] if strict else []))
                load_build(spec, KernelBuild(spec.name, build.build_id, library))
                library.replace(build.path)
    return build


def build_prebuilt(spec: KernelSpec, folder: Path, cpu: str) -> KernelBuild:
    """Compile a kernel for another CPU of this architecture into `folder`/NAME.so, for `SYNAPSE_KERNEL_PATH` elsewhere.

    Only what can be read from the file is checked: this CPU may be unable to run it.

    Raises:
        CompilerMissing, BuildFailed, KernelRefused: as `build_kernel`.
    """
    compiler = find_compiler()
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=f".{spec.name}-") as scratch:
        library = Path(scratch) / f"{spec.name}.so"
        compile_source(compiler, spec.source, library, *FLAGS, "--target-cpu", cpu)
        check_file(spec, library)
        library.replace(folder / library.name)
    return _prebuilt(spec, folder / f"{spec.name}.so")


def find_build(spec: KernelSpec, settings: Settings) -> KernelBuild | None:
    """A library for this kernel: a prebuilt one in `SYNAPSE_KERNEL_PATH`, else one in the cache, else None.

    The compiler is not needed: among cached builds of this source for this CPU, the newest is taken.
    """
    prebuilt = os.environ.get("SYNAPSE_KERNEL_PATH")
    if prebuilt:
        path = Path(prebuilt).expanduser() / f"{spec.name}.so"
        if path.exists():
            return _prebuilt(spec, path)
    folder = settings.home / FOLDER
    fitting = sorted(folder.glob(f"{spec.name}-{_key(spec)}-*.so"), key=lambda path: path.stat().st_mtime)
    if not fitting:
        return None
    return _cached(spec, folder, fitting[-1].stem.rpartition("-")[2])


def load_build(spec: KernelSpec, build: KernelBuild) -> ctypes.CDLL:
    """Check a library and open it. Calls through it release the interpreter lock.

    Raises:
        KernelRefused: it is damaged, for another machine, lacks a symbol, has another ABI version, or fails its
            self-test.
    """
    check_file(spec, build.path)
    try:
        library = ctypes.CDLL(str(build.path.absolute()))
    except OSError as error:
        raise _refused(spec, build.path, f"the loader does not accept it: {error}") from error
    version = library[f"{spec.name}_abi_version"]
    version.restype = ctypes.c_int64
    found = version()
    if found != spec.abi_version:
        raise _refused(spec, build.path, f"its ABI version is {found}, and this Synapse needs {spec.abi_version}")
    try:
        spec.self_test(library)
    except Exception as error:
        raise _refused(spec, build.path, f"it fails its self-test: {error}") from error
    return library


def check_file(spec: KernelSpec, path: Path) -> None:
    """Check what can be read from a library without loading it.

    Raises:
        KernelRefused: it is damaged, for another machine, or lacks a symbol.
    """
    try:
        library = read_library(path)
    except Corrupt as error:
        raise _refused(spec, path, error.message) from error
    if library.machine != expected_machine():
        raise _refused(spec, path, f"it is for ELF machine {library.machine}, and this is {platform.machine()}")
    missing = [symbol for symbol in spec.symbols if symbol not in library.symbols]
    if missing:
        raise _refused(spec, path, f"it does not export {', '.join(missing)}")


def build_standalone(spec: KernelSpec, target: Path) -> Path:
    """Make a program of its own from a kernel that has a `main`: one file that needs libc only.

    Raises:
        Unavailable: the kernel has no main, or there is no C compiler to link with.
        CompilerMissing, BuildFailed: as `build_kernel`.
    """
    if spec.main is None:
        raise Unavailable(f"the kernel {spec.name} has no main", hint="only a kernel with a main becomes a program")
    linker = shutil.which("cc")
    if linker is None:
        raise Unavailable("there is no `cc` to link a program with", hint="install a C compiler, such as gcc")
    compiler = find_compiler()
    with tempfile.TemporaryDirectory(prefix="synapse-kernel-") as scratch:
        code, program = Path(scratch) / "main.o", Path(scratch) / "program"
        compile_source(compiler, spec.main, code, "--emit", "object", "-O3")
        entry = f"-Wl,--gc-sections,--defsym=main={spec.name}_main"
        _run([linker, str(code), "-o", str(program), entry, "-lm"], spec.main)
        target.parent.mkdir(parents=True, exist_ok=True)
        unfinished = target.with_name(f".{target.name}.{os.getpid()}")
        shutil.copy2(program, unfinished)
        unfinished.replace(target)
    return target


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
    words = _run([str(compiler), "--version"], compiler).split()
    return ".".join(word.strip("()") for word in words[1:3])


def compile_source(compiler: Path, source: Path, target: Path, *flags: str) -> None:
    """Run the compiler.

    Raises:
        BuildFailed: it refused the source, or took too long.
    """
    _run([str(compiler), "build", *flags, str(source), "-o", str(target)], source)


@cache
def cpu() -> str:
    """What code compiled for this CPU depends on: the architecture, and the model and features where Linux tells."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    facts = dict(line.split(":", 1) for line in reversed(lines) if ":" in line)
    kept = {name.strip(): value.strip() for name, value in facts.items()}
    names = ("vendor_id", "cpu family", "model", "flags", "CPU implementer", "CPU part", "Features")
    return "\n".join([platform.machine(), *(kept.get(name, "") for name in names)])


def _source(spec: KernelSpec) -> bytes:
    """Every file of the kernel: those whose names begin with that of its source."""
    files = sorted(spec.source.parent.glob(f"{spec.source.stem}*.mojo"))
    return b"\0".join(file.read_bytes() for file in files)


def _key(spec: KernelSpec) -> str:
    return _sha256(_source(spec), cpu().encode(), " ".join(FLAGS).encode())[:16]


def _cached(spec: KernelSpec, folder: Path, version: str) -> KernelBuild:
    build_id = _sha256(_source(spec), version.encode(), cpu().encode(), " ".join(FLAGS).encode())
    return KernelBuild(spec.name, build_id, folder / f"{spec.name}-{_key(spec)}-{version}.so")


def _prebuilt(spec: KernelSpec, path: Path) -> KernelBuild:
    return KernelBuild(spec.name, _sha256(path.read_bytes()), path)


def _sha256(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()


def _run(command: list[str], source: Path) -> str:
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


def _refused(spec: KernelSpec, path: Path, reason: str) -> KernelRefused:
    return KernelRefused(
        f"the library {path} of the kernel {spec.name} is refused: {reason}",
        hint=f"build it anew with `synapse kernels build {spec.name}`",
    )
