"""Native kernels: compiled from Mojo for this CPU, kept in a cache, and checked before a call is made into them.

A kernel is a Mojo source beside the Python module that specifies it. `build_kernel` compiles it into a library that
needs nothing but libc and the interpreter that loads it, `find_build` finds a library that fits, `load_build` checks it
and opens it. Kernels are for Linux; elsewhere, and without the compiler, the references answer.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import shutil
import tempfile
from pathlib import Path

from filelock import FileLock

from synapse.config import Settings, load_settings
from synapse.errors import NotFound, Unavailable
from synapse.kernels.checks import FOLDER, KernelRefused, check_build, check_file, is_intact, load_build, seal
from synapse.kernels.compiler import FLAGS, OPTIONS, compile_source, compiler_version, find_compiler, run_tool
from synapse.kernels.cpu import cpu
from synapse.kernels.native import FoundBuild
from synapse.kernels.spec import KernelBuild, KernelSpec

__all__ = [
    "FOLDER",
    "KernelBuild",
    "KernelRefused",
    "KernelSpec",
    "build_kernel",
    "build_prebuilt",
    "build_standalone",
    "check_build",
    "find_build",
    "found_build",
    "kernel_specs",
    "load_build",
]

MODULES = ("synapse.vectors.kernel", "synapse.engines.native.kernel", "synapse.callosum.router.native")
"""Each has one `KERNEL`. Rooms above this one are named, not imported, until somebody asks for the kernels."""


def kernel_specs() -> dict[str, KernelSpec]:
    """All kernels that ship, by name."""
    specs = (importlib.import_module(module).KERNEL for module in MODULES)
    return {spec.name: spec for spec in specs}


def build_kernel(spec: KernelSpec, folder: Path, *, strict: bool = False) -> KernelBuild:
    """Compile a kernel for this CPU into the cache, unless it is there as it was built.

    Two processes that build the same kernel at once wait for each other, and a library appears in the cache only when
    it is complete and has passed every check of `check_build`.

    Args:
        folder: the cache.
        strict: compile even if it is there, and count a warning as an error.

    Raises:
        CompilerMissing: `mojo` is not installed.
        BuildFailed: the compiler refused the source.
        KernelRefused, Unavailable: the new library does not pass its checks, or they could not be made.
    """
    compiler = find_compiler()
    build = _cached(spec, folder, compiler_version(compiler))
    with FileLock(folder / f"{spec.name}.lock"):
        if strict or not is_intact(build.path):
            with tempfile.TemporaryDirectory(dir=folder, prefix=f".{spec.name}-") as scratch:
                library = Path(scratch) / build.path.name
                compile_source(compiler, spec.source, library, *FLAGS, *(["--Werror"] if strict else []))
                seal(library)
                check_build(spec, KernelBuild(spec.name, build.build_id, library), folder)
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
        seal(library)
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
        if path.is_file():
            return _prebuilt(spec, path)
    folder = settings.home / FOLDER
    fitting = sorted(folder.glob(f"{spec.name}-{_key(spec)}-*.so"), key=lambda path: path.stat().st_mtime)
    if not fitting:
        return None
    return _cached(spec, folder, fitting[-1].stem.rpartition("-")[2])


def found_build(spec: KernelSpec) -> FoundBuild:
    """The library of this machine for a kernel, as a hot path wants it; for the `find` of its `NativeSide`.

    Raises:
        NotFound: there is none.
    """
    build = find_build(spec, load_settings())
    if build is None:
        raise NotFound(f"the kernel {spec.name} is not built", hint=f"synapse kernels build {spec.name}")
    return FoundBuild(build.build_id, build.path)


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
        compile_source(compiler, spec.main, code, "--emit", "object", *OPTIONS)
        entry = f"-Wl,--gc-sections,--defsym=main={spec.name}_main"
        run_tool([linker, str(code), "-o", str(program), entry, "-lm"], spec.main)
        target.parent.mkdir(parents=True, exist_ok=True)
        unfinished = target.with_name(f".{target.name}.{os.getpid()}")
        shutil.copy2(program, unfinished)
        unfinished.replace(target)
    return target


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
    return KernelBuild(spec.name, hashlib.sha256(path.read_bytes()).hexdigest(), path)


def _sha256(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()
