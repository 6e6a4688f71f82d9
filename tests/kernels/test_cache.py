"""Building, finding and checking kernels, with a real compiler and really damaged libraries."""

from __future__ import annotations

import importlib.resources
import os
import platform
import re
import stat
import subprocess
import sys
import sysconfig
import tomllib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from support import tiny_kernel
from support.compiled import compile_remembered
from support.pattern_kernel import kernel_build
from synapse.config import Settings
from synapse.errors import Unavailable
from synapse.kernels import cache as kernels
from synapse.kernels.cache import (
    MODULES,
    KernelBuild,
    KernelRefused,
    KernelSpec,
    build_kernel,
    build_prebuilt,
    build_standalone,
    find_build,
    kernel_specs,
    load_build,
)
from synapse.kernels.checks import SEAL_BYTES, check_file
from synapse.kernels.compiler import BuildFailed, CompilerMissing, find_compiler
from synapse.kernels.cpu import lacking_features
from synapse.kernels.elf import expected_machine, read_library
from synapse.vectors.kernel import KERNEL

SOURCE = tiny_kernel.KERNEL.source.read_text()
PARTS = tiny_kernel.KERNEL.source.with_name("tiny_parts.mojo").read_text()
ROOT = Path(__file__).parents[2]


def tiny(folder: Path, source: str = SOURCE, parts: str = PARTS) -> KernelSpec:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tiny.mojo").write_text(source)
    (folder / "tiny_parts.mojo").write_text(parts)
    return replace(tiny_kernel.KERNEL, source=folder / "tiny.mojo")


pytestmark = pytest.mark.usefixtures("compiles_once")


@pytest.fixture(scope="module")
def built(compiles_once: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[KernelSpec, KernelBuild]:
    folder = tmp_path_factory.mktemp("tiny")
    spec = tiny(folder)
    return spec, build_kernel(spec, folder)


def altered(built: KernelBuild, folder: Path, content: bytes) -> KernelBuild:
    """A prebuilt library, which may be without a checksum."""
    path = folder / "tiny.so"
    path.unlink(missing_ok=True)  # the one before may be loaded, and must stay as it is until this process ends
    path.write_bytes(content)
    return replace(built, path=path)


def bare(built: KernelBuild) -> bytes:
    """A library without the checksum at its end."""
    return built.path.read_bytes()[:-SEAL_BYTES]


@pytest.mark.parametrize("module", MODULES)
def test_every_kernel_that_ships_builds_to_what_it_promises(module: str, tmp_path: Path) -> None:
    spec: KernelSpec = importlib.import_module(module).KERNEL
    assert kernel_specs()[spec.name] is spec
    assert f"{spec.name}_cpu_features" in spec.symbols
    load_build(spec, kernel_build(spec), kernel_build(spec).path.parent)
    assert spec.main is None or spec.main.exists()


@pytest.mark.parametrize("module", MODULES)
def test_every_source_of_a_kernel_is_in_its_package_and_named_after_it(module: str) -> None:
    """What is named so is part of the build's key, and what is in the package is in the wheel."""
    spec: KernelSpec = importlib.import_module(module).KERNEL
    package = importlib.resources.files(module.rpartition(".")[0])
    waiting, seen = [spec.source.stem, *([spec.main.stem] if spec.main else [])], set[str]()
    while waiting:
        name = waiting.pop()
        seen.add(name)
        assert name.startswith(spec.source.stem), f"{name}.mojo is not part of the key of {spec.name}"
        text = package.joinpath(f"{name}.mojo").read_text()
        imported = re.findall(r"^(?:from|import) (\w+)", text, re.MULTILINE)
        waiting += [other for other in imported if other != "std" and other not in seen]


def test_the_wheel_is_all_of_the_package() -> None:
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert wheel == {"packages": ["src/synapse"]}, "nothing is left out of it, except what git ignores"
    sources = [str(path) for path in (ROOT / "src").rglob("*.mojo")]
    ignored = subprocess.run(["git", "check-ignore", *sources], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (ignored.returncode, ignored.stdout) == (1, ""), "1: none of them"


def test_a_build_exports_its_symbols_and_needs_libc_only(built: tuple[KernelSpec, KernelBuild]) -> None:
    library = read_library(built[1].path)
    assert library.machine == expected_machine()
    assert {"tiny_abi_version", "tiny_double"} <= library.symbols
    needed = subprocess.run(["ldd", kernel_build().path], capture_output=True, text=True, check=True).stdout
    assert "KGEN" not in needed
    assert "stdc++" not in needed


def test_a_build_is_made_once_and_anew_when_its_source_changes(tmp_path: Path) -> None:
    spec = tiny(tmp_path)
    first = build_kernel(spec, tmp_path)
    when = first.path.stat().st_mtime_ns
    assert build_kernel(spec, tmp_path) == first
    assert first.path.stat().st_mtime_ns == when
    changed = tiny(tmp_path, SOURCE.replace("FACTOR * number", "number + number"))
    second = build_kernel(changed, tmp_path)
    assert second.build_id != first.build_id
    assert second.path != first.path
    assert load_build(changed, second).tiny_double(4) == 8


def test_an_imported_source_is_part_of_a_kernel(tmp_path: Path) -> None:
    spec = tiny(tmp_path)
    assert load_build(spec, build_kernel(spec, tmp_path)).tiny_double(4) == 8
    tiny(tmp_path, parts=PARTS.replace("= 2", "= 3"))
    with pytest.raises(KernelRefused, match="twice 21"):
        build_kernel(spec, tmp_path)


def test_a_library_that_was_altered_is_built_anew(tmp_path: Path) -> None:
    spec = tiny(tmp_path)
    build = build_kernel(spec, tmp_path)
    content = build.path.read_bytes()
    build.path.write_bytes(content[:100] + b"!" + content[101:])
    with pytest.raises(KernelRefused, match="altered since it was built"):
        load_build(spec, build, tmp_path)
    assert build_kernel(spec, tmp_path) == build
    assert load_build(spec, build, tmp_path).tiny_double(4) == 8


def test_kernels_are_built_at_once_and_tested_apart(tmp_path: Path) -> None:
    """Two threads, as `synapse kernels build` has; the self-test of one brings its process down."""
    good, bad = tiny(tmp_path / "good"), tiny(tmp_path / "bad")
    bad = replace(bad, self_test=tiny_kernel.dies)
    with ThreadPoolExecutor(2) as pool:
        well, ill = (pool.submit(build_kernel, spec, spec.source.parent) for spec in (good, bad))
        assert load_build(good, well.result(), tmp_path).tiny_double(4) == 8
        with pytest.raises(KernelRefused, match="crashed with SIGSEGV in its self-test"):
            ill.result()


def test_what_a_build_depends_on_is_in_its_id(
    built: tuple[KernelSpec, KernelBuild], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, build = built
    monkeypatch.setattr(kernels, "cpu", lambda: "another")
    assert kernels._cached(spec, build.path.parent, "1").build_id != build.build_id
    assert find_build(spec, Settings(home=build.path.parent)) is None


def test_processes_that_build_at_once_compile_once(tmp_path: Path) -> None:
    tiny(tmp_path)
    log = tmp_path / "log"
    compiler = tmp_path / "mojo"
    compiler.write_text(f'#!/bin/sh\n[ "$1" = build ] && echo x >> {log}\nexec {find_compiler()} "$@"\n')
    compiler.chmod(0o755)
    program = f"""
from pathlib import Path
from dataclasses import replace
from support.tiny_kernel import KERNEL
from synapse.kernels import cache as kernels
kernels.find_compiler = lambda: Path({str(compiler)!r})
spec = replace(KERNEL, source=Path({str(tmp_path / "tiny.mojo")!r}))
print(kernels.build_kernel(spec, Path({str(tmp_path)!r})).path)
"""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    children = [
        subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env=environment)
        for _ in range(3)
    ]
    paths = {child.communicate(timeout=100)[0].strip() for child in children}
    assert [child.returncode for child in children] == [0, 0, 0]
    assert log.read_text().count("x") == 1
    assert [Path(path).exists() for path in paths] == [True]
    assert {path.name for path in tmp_path.iterdir()} == {
        "tiny.mojo",
        "tiny_parts.mojo",
        "tiny.lock",
        "passed",
        "log",
        "mojo",
        Path(paths.pop()).name,
    }


def test_a_source_that_does_not_compile_fails_with_the_compilers_words(tmp_path: Path) -> None:
    with pytest.raises(BuildFailed, match="error:"):
        build_kernel(tiny(tmp_path, SOURCE.replace("FACTOR * number", "FACTOR * nothing")), tmp_path)
    assert not list(tmp_path.glob("*.so"))


def test_a_warning_fails_a_strict_build_only(tmp_path: Path) -> None:
    spec = tiny(tmp_path, SOURCE.replace("    return FACTOR", "    var unused = 3\n    return FACTOR"))
    build_kernel(spec, tmp_path)
    with pytest.raises(BuildFailed, match="unused"):
        build_kernel(spec, tmp_path, strict=True)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (("FACTOR * number", "3 * number"), "fails its self-test: twice 21 is 42, not 63"),
        (("return 1", "return 7"), "its ABI version is 7, and this Synapse needs 1"),
        (("tiny_double", "tiny_triple"), "does not export tiny_double"),
    ],
)
def test_a_build_that_is_not_what_it_must_be_never_reaches_the_cache(
    tmp_path: Path, change: tuple[str, str], reason: str
) -> None:
    with pytest.raises(KernelRefused, match=reason):
        build_kernel(tiny(tmp_path, SOURCE.replace(*change)), tmp_path)
    assert not list(tmp_path.glob("*.so"))
    assert not list(tmp_path.glob(".tiny-*"))


def test_a_library_cut_short_anywhere_is_refused(built: tuple[KernelSpec, KernelBuild], tmp_path: Path) -> None:
    spec, build = built
    content = bare(build)
    for length in (0, 3, 16, 63, 64, 500, len(content) // 2, len(content) - 1):
        with pytest.raises(KernelRefused):
            load_build(spec, altered(build, tmp_path, content[:length]))


@pytest.mark.parametrize(
    ("offset", "value", "reason"),
    [
        (0, b"MZ", "not an ELF file"),
        (4, b"\x01", "not 64-bit"),
        (5, b"\x02", "little-endian"),
        (16, b"\x02", "not a shared library"),
        (18, b"\x08\x00", "it is for ELF machine 8"),
        (32, b"\xff" * 8, "outside the file"),
        (40, b"\xff\xff\xff\x7f", "outside the file"),
    ],
)
def test_a_library_with_another_header_is_refused(
    built: tuple[KernelSpec, KernelBuild], tmp_path: Path, offset: int, value: bytes, reason: str
) -> None:
    spec, build = built
    content = bytearray(bare(build))
    content[offset : offset + len(value)] = value
    with pytest.raises(KernelRefused, match=reason):
        load_build(spec, altered(build, tmp_path, bytes(content)))


def test_a_library_without_a_symbol_is_refused(built: tuple[KernelSpec, KernelBuild], tmp_path: Path) -> None:
    spec, build = built
    content = bare(build).replace(b"tiny_double\0", b"tiny_dribble"[:11] + b"\0")
    with pytest.raises(KernelRefused, match="does not export tiny_double"):
        load_build(spec, altered(build, tmp_path, content))


def test_a_library_that_is_missing_or_no_file_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "nothing.so", tmp_path):
        with pytest.raises(KernelRefused, match="cannot be read"):
            check_file(KERNEL, path)


def test_the_wrong_kernels_library_is_refused(built: tuple[KernelSpec, KernelBuild]) -> None:
    with pytest.raises(KernelRefused, match="does not export pattern_search_abi_version"):
        load_build(KERNEL, built[1])


def test_a_build_is_found_without_a_compiler(
    built: tuple[KernelSpec, KernelBuild], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, build = built
    settings = Settings(home=tmp_path)
    assert find_build(spec, settings) is None
    path = settings.folder("kernels") / build.path.name
    path.write_bytes(build.path.read_bytes())
    monkeypatch.setattr(kernels, "find_compiler", lambda: pytest.fail("the compiler was asked for"))
    assert find_build(spec, settings) == replace(build, path=path)


def test_a_prebuilt_library_is_used_first_and_checked_the_same_way(
    built: tuple[KernelSpec, KernelBuild], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, build = built
    settings = Settings(home=tmp_path)
    (settings.folder("kernels") / build.path.name).write_bytes(build.path.read_bytes())
    monkeypatch.setenv("SYNAPSE_KERNEL_PATH", str(tmp_path / "prebuilt"))
    assert find_build(spec, settings) is not None  # nothing prebuilt for this kernel: the cache
    (tmp_path / "prebuilt").mkdir()
    altered(build, tmp_path / "prebuilt", build.path.read_bytes())
    found = find_build(spec, settings)
    assert found is not None
    assert found.path == tmp_path / "prebuilt" / "tiny.so"
    assert found.build_id != build.build_id
    assert load_build(spec, found).tiny_double(5) == 10
    altered(build, tmp_path / "prebuilt", bare(build)[:-100])
    damaged = find_build(spec, settings)
    assert damaged is not None
    with pytest.raises(KernelRefused, match="cut short"):
        load_build(spec, damaged)


def test_a_library_for_another_cpu_can_be_built(tmp_path: Path) -> None:
    oldest = {"x86_64": "x86-64-v2", "aarch64": "generic"}[os.uname().machine]
    build = build_prebuilt(KERNEL, tmp_path / "prebuilt", oldest)
    assert build.path == tmp_path / "prebuilt" / "pattern_search.so"
    library = load_build(KERNEL, build)  # the portable code gives the same answers
    assert library.pattern_search_cpu_features() == 0


@pytest.mark.skipif(platform.machine() != "x86_64", reason="for the processors of x86-64")
@pytest.mark.parametrize(("target", "mask"), [("x86-64-v3", 0b0001), ("znver4", 0b1011)])
def test_a_library_says_what_it_needs_of_the_cpu_and_is_refused_where_that_is_missing(
    tmp_path: Path, target: str, mask: int
) -> None:
    build = build_prebuilt(KERNEL, tmp_path / "prebuilt", target)
    if lacking_features(mask):
        with pytest.raises(KernelRefused, match=f"compiled for a CPU with .*{lacking_features(mask)[0]}"):
            load_build(KERNEL, build)
    else:
        assert load_build(KERNEL, build).pattern_search_cpu_features() == mask


@pytest.mark.slow
def test_the_source_compiles_for_every_kind_of_processor(tmp_path: Path) -> None:
    targets = {
        "x86_64-unknown-linux-gnu": ["x86-64-v2", "x86-64-v3", "znver4"],
        "aarch64-unknown-linux-gnu": ["cortex-a72", "neoverse-n1"],
    }
    for triple, cpus in targets.items():
        for cpu in cpus:
            flags = ("--emit", "object", "-O3", "--Werror", "--target-triple", triple, "--target-cpu", cpu)
            compile_remembered(find_compiler(), KERNEL.source, tmp_path / f"{cpu}.o", *flags)


def test_without_the_compiler_building_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(CompilerMissing) as caught:
        build_kernel(KERNEL, tmp_path)
    assert caught.value.hint == "pip install 'synapse[native]'"
    with pytest.raises(CompilerMissing):
        build_prebuilt(KERNEL, tmp_path, "x86-64-v3")


def test_a_compiler_that_does_not_run_is_a_failed_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "mojo"
    broken.write_text("#!/bin/sh\necho out of order >&2\nexit 3\n")
    broken.chmod(stat.S_IRWXU)
    monkeypatch.setattr(kernels, "find_compiler", lambda: broken)
    with pytest.raises(BuildFailed, match="out of order"):
        build_kernel(KERNEL, tmp_path)


def test_a_kernel_becomes_a_program_of_one_file(tmp_path: Path) -> None:
    program = build_standalone(KERNEL, tmp_path / "bin" / "pattern_search")
    for arguments in ([], ["1000"], ["5000", "33"], ["7", "1"]):
        run = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=60, check=False)
        assert run.returncode == 0
        assert "the ten best are found in" in run.stdout
    for arguments in (["0"], ["x"], ["10", "5000"], ["1", "2", "3"]):
        run = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=60, check=False)
        assert (run.returncode, run.stdout[:6]) == (2, "usage:")
    needed = subprocess.run(["ldd", program], capture_output=True, text=True, check=True).stdout
    assert "KGEN" not in needed


def test_a_program_needs_a_main_and_a_linker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Unavailable, match="has no main"):
        build_standalone(tiny(tmp_path), tmp_path / "program")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(Unavailable, match="no `cc`"):
        build_standalone(KERNEL, tmp_path / "program")
