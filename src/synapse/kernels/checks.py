"""What a library has to pass before a call of a user is made into it.

What is read from the file comes first: its checksum, then ELF class, machine and symbols. The rest means running it:
loading, ABI version, CPU features, self-test. A new library may crash at each of these, or never come back, so they
happen in a process of their own. That a library has passed is noted in the cache by its sha256, and it is only opened
from then on.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import platform
from collections.abc import Callable
from functools import partial
from pathlib import Path

from synapse import __version__
from synapse.config import load_settings
from synapse.errors import Corrupt, Unavailable
from synapse.kernels.child import Crashed, Lost, Raised, TrialProcess, Unusable
from synapse.kernels.cpu import cpu, lacking_features
from synapse.kernels.elf import expected_machine, read_library
from synapse.kernels.spec import KernelBuild, KernelSpec
from synapse.kernels.structs import wrong_size

FOLDER = "kernels"
"""The cache's folder in the home."""
PASSED = "passed"
"""The folder in the cache with a file for each library that has passed."""
SELF_TEST_SECONDS = 30.0
"""How long loading and self-test may take; less than a new build has to open in its burn-in, where they may happen."""
SYSTEM_LIBRARIES = ("libc.", "libm.", "libdl.", "libpthread.", "ld-linux", "ld-musl")
"""How the libraries are called that a kernel may need: they are wherever Python is. Those of the compiler stay where it
was, and a cached build outlives that place."""
SEAL = b"SYNSUM01"
"""How a library that Synapse built ends, after the sha256 of all that comes before it. No loader looks there."""
SEAL_BYTES = hashlib.sha256().digest_size + len(SEAL)


class KernelRefused(Corrupt):
    """A library is not what its kernel must be; no call was made into it in this process."""

    code = "kernel_refused"


def load_found(spec: KernelSpec, path: Path) -> ctypes.CDLL:
    """As `load_build`, for the `bind` of a `NativeSide`, which is told no more of a build than where it is."""
    return load_build(spec, KernelBuild(spec.name, "", path))


def load_build(spec: KernelSpec, build: KernelBuild, folder: Path | None = None) -> ctypes.CDLL:
    """Open a library, after checking it if these bytes have not been checked on this CPU yet.

    Calls through it release the interpreter lock.

    Args:
        folder: the cache, where it is noted that a library has passed; by default that of the home.

    Raises:
        KernelRefused, Unavailable: as `check_build`.
    """
    folder = folder or load_settings().home / FOLDER
    if not has_passed(spec, build, folder):
        check_build(spec, build, folder)
    library = ctypes.CDLL(str(build.path.absolute()))
    if flaw := wrong_size(library, spec.name, spec.structs):  # again: they may differ in the same version of Synapse
        raise _refused(spec, build.path, flaw)
    if spec.declare is not None:
        spec.declare(library)
    return library


def has_passed(spec: KernelSpec, build: KernelBuild, folder: Path) -> bool:
    """Whether `load_build` opens a library without checking it first, because these bytes were checked on this CPU.

    Raises:
        KernelRefused: it was altered or cut short.
    """
    return _note(spec, _checked_sum(spec, build), folder).exists()


def check_build(spec: KernelSpec, build: KernelBuild, folder: Path) -> None:
    """Check a library, whether or not that was done before, and note in the cache that it has passed.

    Raises:
        KernelRefused: it was altered or cut short, is for another machine or CPU, lacks a symbol, has another ABI
            version or structures of another size, or fails its self-test: by a wrong answer, a crash, or not coming
            back.
        Unavailable: the process of the self-test could not be started, or was killed.
    """
    digest = _checked_sum(spec, build)
    check_file(spec, build.path)
    child = TrialProcess(partial(_examination, spec), build.path, call_seconds=SELF_TEST_SECONDS)
    try:
        child.start()
        flaw, _ = child.call((), {})
    except Crashed as error:
        flaw = f"{error} in its self-test"
    except (Unusable, Raised, Lost) as error:
        raise Unavailable(f"the kernel {spec.name} could not be tested: {error}", hint="try again") from error
    finally:
        child.close()
    if flaw:
        raise _refused(spec, build.path, flaw)
    note = _note(spec, digest, folder)
    with contextlib.suppress(OSError):  # where nothing can be noted, a library is checked by each process that opens it
        note.parent.mkdir(parents=True, exist_ok=True)
        note.touch()


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
    absent_elsewhere = [name for name in library.needed if not name.startswith(SYSTEM_LIBRARIES)]
    if absent_elsewhere:
        raise _refused(spec, path, f"it needs {', '.join(absent_elsewhere)}, and a kernel may need libc only")


def seal(path: Path) -> None:
    """Put the checksum behind a library that was just built."""
    content = path.read_bytes()
    path.write_bytes(content + hashlib.sha256(content).digest() + SEAL)


def is_intact(path: Path) -> bool:
    """Whether a library is there with its checksum, and as it was built."""
    return path.is_file() and _broken_seal(path.read_bytes()) == ""


def _broken_seal(content: bytes) -> str | None:
    """In what way a library was altered since it was built; empty when in none, None when it has no checksum."""
    if not content.endswith(SEAL) or len(content) < SEAL_BYTES:
        return None
    expected = content[-SEAL_BYTES : -len(SEAL)].hex()
    found = hashlib.sha256(content[:-SEAL_BYTES]).hexdigest()
    return "" if expected == found else f"altered since it was built: expected sha256 {expected:.12}, found {found:.12}"


def _checked_sum(spec: KernelSpec, build: KernelBuild) -> bytes:
    """The sha256 of the whole file, after its checksum was found to be right. A prebuilt library need not have one."""
    try:
        content = build.path.read_bytes()
    except OSError as error:
        raise _refused(spec, build.path, f"it cannot be read: {error.strerror}") from error
    broken = _broken_seal(content)
    if broken is None and not _is_prebuilt(spec, build.path):
        broken = "it does not end with its checksum: it was cut short or altered"
    if broken:
        raise _refused(spec, build.path, broken)
    return hashlib.sha256(content).digest()


def _note(spec: KernelSpec, digest: bytes, folder: Path) -> Path:
    """The file that says that a library with this sha256 has passed on this CPU what this Synapse asks of it."""
    what = hashlib.sha256(digest + f"{__version__}\n{spec.abi_version}\n{cpu()}".encode()).hexdigest()
    return folder / PASSED / f"{spec.name}-{what[:32]}"


def _examination(spec: KernelSpec, library: Path) -> Callable[[], str]:
    """What the child calls: importable, as `TrialProcess` needs it."""
    return partial(_flaw, spec, library)


def _flaw(spec: KernelSpec, path: Path) -> str:
    """What is wrong with a library, found by running it; empty when nothing is. It may bring the process down."""
    try:
        library = ctypes.CDLL(str(path.absolute()))
    except OSError as error:
        return f"the loader does not accept it: {error}"
    version = _number(library, f"{spec.name}_abi_version")
    if version != spec.abi_version:
        return f"its ABI version is {version}, and this Synapse needs {spec.abi_version}"
    if flaw := wrong_size(library, spec.name, spec.structs):
        return flaw
    features = f"{spec.name}_cpu_features"
    lacking = lacking_features(_number(library, features)) if hasattr(library, features) else ()
    if lacking:
        return f"it was compiled for a CPU with {', '.join(lacking)}, which this one lacks"
    try:
        if spec.declare is not None:
            spec.declare(library)
        spec.self_test(library)
    except Exception as error:
        return f"it fails its self-test: {error}"
    return ""


def _number(library: ctypes.CDLL, symbol: str) -> int:
    function = library[symbol]
    function.restype = ctypes.c_int64
    number: int = function()
    return number


def _is_prebuilt(spec: KernelSpec, path: Path) -> bool:
    """Whether it comes from `SYNAPSE_KERNEL_PATH`: there a library is called NAME.so, in the cache never."""
    return path.name == f"{spec.name}.so"


def _refused(spec: KernelSpec, path: Path, reason: str) -> KernelRefused:
    anew = f"build it anew with `synapse kernels build {spec.name}`"
    return KernelRefused(
        f"the library {path} of the kernel {spec.name} is refused: {reason}",
        hint=f"take it out of SYNAPSE_KERNEL_PATH, then {anew}" if _is_prebuilt(spec, path) else anew,
    )
