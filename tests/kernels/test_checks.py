"""What a library has to pass: real ones that crash, hang, lie or were altered, none of which harm this process."""

from __future__ import annotations

import os
import platform
from dataclasses import replace
from pathlib import Path

import pytest

from support.tiny_kernel import KERNEL, LOG, compile_tiny
from synapse.errors import Unavailable
from synapse.kernels import checks as kernel_checks
from synapse.kernels import cpu
from synapse.kernels.cache import KernelBuild
from synapse.kernels.checks import SEAL_BYTES, KernelRefused, check_build, is_intact, load_build, seal
from synapse.kernels.cpu import FEATURES, lacking_features

ABSENT = {"x86_64": 2, "aarch64": 0}
"""A bit of `FEATURES` that no processor of an architecture has."""


@pytest.fixture
def self_tests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file with a line for every self-test that was begun: the process it ran in."""
    log = tmp_path / "self-tests"
    log.touch()
    monkeypatch.setenv(LOG, str(log))
    return log


def altered(build: KernelBuild, content: bytes, name: str = "tiny-altered.so") -> KernelBuild:
    """Another file: the one before may be loaded, and must stay as it is until this process ends."""
    path = build.path.with_name(name)
    path.unlink(missing_ok=True)
    path.write_bytes(content)
    return replace(build, path=path)


@pytest.mark.parametrize(
    ("macros", "reason"),
    [
        ({"AT_CALL": "*(volatile int *)0 = 1"}, "it crashed with SIGSEGV in its self-test"),
        ({"AT_CALL": "raise(SIGILL)"}, "it crashed with SIGILL in its self-test"),
        ({"AT_CALL": "abort()"}, "it crashed with SIGABRT in its self-test"),
        ({"AT_LOAD": "raise(SIGBUS)"}, "it crashed with SIGBUS in its self-test"),
        ({"AT_CALL": "for (;;)"}, "it did not answer in 1 seconds in its self-test"),
        ({"AT_CALL": "return 3 * number"}, "it fails its self-test: twice 21 is 42, not 63"),
    ],
)
def test_a_library_that_misbehaves_when_it_is_tested_costs_one_process_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, macros: dict[str, str], reason: str
) -> None:
    monkeypatch.setattr(kernel_checks, "SELF_TEST_SECONDS", 1.0)
    build = compile_tiny(tmp_path, **macros)
    for _ in range(2):  # it is not remembered as one that has passed
        with pytest.raises(KernelRefused, match=reason):
            load_build(KERNEL, build, tmp_path)
    assert not (tmp_path / "passed").exists()


def test_a_test_that_is_killed_from_outside_blames_nobody(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="could not be tested: its process ended with -9"):
        load_build(KERNEL, compile_tiny(tmp_path, AT_CALL="raise(SIGKILL)"), tmp_path)


def test_a_self_test_that_another_process_cannot_import_is_not_passed(tmp_path: Path) -> None:
    def local(library: object) -> None:
        raise AssertionError("not reached")

    with pytest.raises(Unavailable, match=r"could not be tested: .*local"):
        load_build(replace(KERNEL, self_test=local), compile_tiny(tmp_path), tmp_path)


def test_a_library_is_tested_once_in_another_process_and_then_only_opened(tmp_path: Path, self_tests: Path) -> None:
    build = compile_tiny(tmp_path)
    for _ in range(3):
        assert load_build(KERNEL, build, tmp_path).tiny_double(2**40) == 2**41
    (process,) = self_tests.read_text().split()
    assert int(process) != os.getpid()
    check_build(KERNEL, build, tmp_path)  # `synapse kernels verify` tests it again
    assert len(self_tests.read_text().split()) == 2


def test_a_library_is_tested_again_when_its_bytes_the_cpu_or_what_is_asked_of_it_are_others(
    tmp_path: Path, self_tests: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = compile_tiny(tmp_path)
    load_build(KERNEL, build, tmp_path)
    load_build(KERNEL, compile_tiny(tmp_path, FEATURES="0"), tmp_path)
    assert len(self_tests.read_text().split()) == 2
    with pytest.raises(KernelRefused, match="its ABI version is 1, and this Synapse needs 2"):
        load_build(replace(KERNEL, abi_version=2), build, tmp_path)
    monkeypatch.setattr(kernel_checks, "cpu", lambda: "another")
    load_build(KERNEL, build, tmp_path)
    assert len(self_tests.read_text().split()) == 3
    monkeypatch.setattr(kernel_checks, "__version__", "another")
    load_build(KERNEL, build, tmp_path)
    assert len(self_tests.read_text().split()) == 4


def test_where_nothing_can_be_noted_a_library_is_tested_each_time(tmp_path: Path, self_tests: Path) -> None:
    build = compile_tiny(tmp_path)
    (tmp_path / "passed").write_text("in the way")
    for tests in (1, 2):
        assert load_build(KERNEL, build, tmp_path).tiny_double(4) == 8
        assert len(self_tests.read_text().split()) == tests


def test_where_it_is_noted_that_a_library_has_passed_is_the_home(tmp_path: Path, self_tests: Path) -> None:
    for _ in range(2):
        load_build(KERNEL, compile_tiny(tmp_path))
    assert len(self_tests.read_text().split()) == 1
    assert len(list((tmp_path / "home" / "kernels" / "passed").iterdir())) == 1


def test_a_library_altered_anywhere_since_it_was_built_is_refused_and_not_run(tmp_path: Path, self_tests: Path) -> None:
    build = compile_tiny(tmp_path)
    load_build(KERNEL, build, tmp_path)
    content = build.path.read_bytes()
    for at in (*range(0, len(content), 997), *range(len(content) - SEAL_BYTES, len(content))):
        changed = bytearray(content)
        changed[at] ^= 1
        damaged = altered(build, bytes(changed))
        assert not is_intact(damaged.path)
        with pytest.raises(
            KernelRefused, match=r"altered since it was built: expected sha256 \w{12}, |checksum"
        ) as caught:
            load_build(KERNEL, damaged, tmp_path)
        assert caught.value.hint == "build it anew with `synapse kernels build tiny`"
    for length in (0, 5, SEAL_BYTES, len(content) // 2, len(content) - SEAL_BYTES, len(content) - 1):
        with pytest.raises(KernelRefused, match="cut short or altered"):
            load_build(KERNEL, altered(build, content[:length]), tmp_path)
    assert len(self_tests.read_text().split()) == 1


def test_a_prebuilt_library_needs_no_checksum_but_a_right_one_if_it_has_one(tmp_path: Path, self_tests: Path) -> None:
    build = compile_tiny(tmp_path)
    content = build.path.read_bytes()
    bare = altered(build, content[:-SEAL_BYTES], "tiny.so")
    for _ in range(2):
        assert load_build(KERNEL, bare, tmp_path).tiny_double(4) == 8
    assert len(self_tests.read_text().split()) == 1
    with pytest.raises(KernelRefused, match="altered since") as caught:
        load_build(KERNEL, altered(build, content.replace(b"tiny_double", b"tiny_treble", 1), "tiny.so"), tmp_path)
    assert "SYNAPSE_KERNEL_PATH" in str(caught.value.hint)


def test_a_sealed_library_is_intact_and_one_that_is_not_there_is_not(tmp_path: Path) -> None:
    library = tmp_path / "library"
    assert not is_intact(library)
    library.write_bytes(b"anything")
    assert not is_intact(library)
    seal(library)
    assert is_intact(library)


def test_a_library_that_needs_another_than_libc_is_refused_before_it_is_loaded(
    tmp_path: Path, self_tests: Path
) -> None:
    compile_tiny(tmp_path).path.rename(tmp_path / "libother.so")
    beside = f"-Wl,-rpath,{tmp_path}"  # it would load here, and not where this folder is gone
    build = compile_tiny(tmp_path, f"-L{tmp_path}", beside, "-Wl,--no-as-needed", "-lother")
    with pytest.raises(KernelRefused, match=r"it needs libother\.so, and a kernel may need libc only"):
        load_build(KERNEL, build, tmp_path)
    assert not self_tests.read_text()


@pytest.mark.skipif(platform.machine() not in ABSENT, reason="nothing is known of this architecture")
def test_a_library_for_a_cpu_with_more_features_is_refused_before_its_self_test(
    tmp_path: Path, self_tests: Path
) -> None:
    bit = ABSENT[platform.machine()]
    with pytest.raises(KernelRefused, match=f"compiled for a CPU with {FEATURES[bit][0]}.*, which this one lacks"):
        load_build(KERNEL, compile_tiny(tmp_path, FEATURES=str(1 << bit), AT_CALL="raise(SIGILL)"), tmp_path)
    with pytest.raises(KernelRefused, match="compiled for a CPU with feature 40, which"):
        load_build(KERNEL, compile_tiny(tmp_path, FEATURES="1L << 40"), tmp_path)
    assert self_tests.read_text() == ""


def test_what_a_cpu_lacks_is_read_from_its_flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listed = tmp_path / "cpuinfo"
    monkeypatch.setattr(cpu, "CPUINFO", listed)
    assert lacking_features(0b1111) == (), "unknown: the self-test has to find out"
    listed.write_text("processor : 0\nflags\t: fpu avx2 fma f16c avx512f\n\nprocessor : 1\nflags\t: fpu\n")
    assert lacking_features(0b1001) == ()
    assert lacking_features(0b0011) == ("avx512bw", "avx512vl", "avx512_vnni")
    listed.write_text("processor : 0\nFeatures\t: fp asimd\n")
    assert lacking_features(0b0100) == ("asimddp",)
    listed.write_text("processor : 0\nFeatures\t: fp asimd asimddp\n")
    assert lacking_features(0b0100) == ()
    assert lacking_features(0b10001) == ("avx2", "fma", "f16c", "feature 4")
