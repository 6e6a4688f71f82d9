"""Fixtures that several rooms share. The default models are real: each is pulled once and kept between runs."""

from __future__ import annotations

import os
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import structlog

from support.default_model import default_encoder_path, default_model_path, link_or_copy, put_packed
from support.time_limits import pytest_timeout_cancel_timer, pytest_timeout_set_timer, use_patient_profile

if TYPE_CHECKING:
    from synapse.engines import Engine, Limits

__all__ = ["pytest_timeout_cancel_timer", "pytest_timeout_set_timer"]

use_patient_profile()

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    # Under nohup or in the background of a shell Ctrl-C is ignored, by every child too. What is tested is a person's
    # Ctrl-C: with a handler here it works in this process, and in children as well, which begin without handlers.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure(config: pytest.Config) -> None:
    config.option.loadscopereorder = False  # of pytest-xdist: the order below is better


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Where processes share the files, those with slow tests come first: a long one at the end has one process wait."""
    if hasattr(config, "workerinput"):
        slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
        items.sort(key=lambda item: (-slow[item.path], str(item.path)))


@pytest.fixture(scope="session")
def default_model() -> Path:
    """The GGUF file of the default chat model, in a home that is kept between runs. Read it, do not change it."""
    return default_model_path()


@pytest.fixture(scope="session")
def default_encoder() -> Path:
    """The folder of the default encoder, in a home that is kept between runs. Read it, do not change it."""
    return default_encoder_path()


@pytest.fixture(scope="session")
def native_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with the engine's kernel, after its burn-in: from here on the kernel is this process' own."""
    from support.native_engine import living_in, put_kernel

    home = put_kernel(tmp_path_factory.mktemp("native") / "home")
    with living_in(home):
        return home


@pytest.fixture(scope="session")
def native(request: pytest.FixtureRequest) -> bool:
    """Whether the kernel answers here: for tests that are quicker with it and as good without."""
    try:
        request.getfixturevalue("native_home")
    except pytest.skip.Exception:
        return False
    return True


@pytest.fixture(scope="session")
def make_model_home(default_model: Path, native: bool, tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Path]:
    """Makes homes that have the default model, by hard links, and in which the kernel answers at once."""
    from support.native_engine import put_kernel

    def make() -> Path:
        home = tmp_path_factory.mktemp("model") / "home"
        shutil.copytree(default_model.parent, home / "models" / default_model.parent.name, copy_function=link_or_copy)
        if native:
            put_packed(home)
            put_kernel(home)
        return home

    return make


@pytest.fixture(scope="session")
def open_default(
    default_model: Path, make_model_home: Callable[[], Path], native: bool
) -> Iterator[Callable[[Limits], Engine]]:
    """Opens the default model, natively where that works: what is tested here is the same with either transformer."""
    from synapse.engines.opening import open_engine_file

    home = make_model_home()
    opened: list[Engine] = []

    def open_it(limits: Limits) -> Engine:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("SYNAPSE_HOME", str(home))
            patch.delenv("SYNAPSE_FORCE_PYTHON", raising=False)
            opened.append(open_engine_file(default_model, "native" if native else "reference", limits))
        return opened[-1]

    yield open_it
    for engine in opened:
        engine.close()


@pytest.fixture
def default_model_home(make_model_home: Callable[[], Path], native: bool, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fresh SYNAPSE_HOME with the default model, in which the kernel answers at once."""
    from support.native_engine import wait_until_ready

    home = make_model_home()
    monkeypatch.setenv("SYNAPSE_HOME", str(home))
    monkeypatch.delenv("SYNAPSE_FORCE_PYTHON", raising=False)
    if native:
        wait_until_ready()
    return home


@pytest.fixture(scope="module")
def compiles_once() -> Iterator[None]:
    """Kernels that this process builds are compiled by the first run that has these sources, and remembered."""
    from support.compiled import compile_remembered
    from synapse.kernels import cache

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache, "compile_source", compile_remembered)
        yield


@pytest.fixture(autouse=True)
def _no_user_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A test never sees the SYNAPSE_* variables or the home folder of whoever runs it."""
    for name in [name for name in os.environ if name.startswith("SYNAPSE_")]:
        if name not in ("SYNAPSE_TEST_HOME", "SYNAPSE_FORCE_PYTHON"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("SYNAPSE_HOME", str(tmp_path / "home"))
    yield
    structlog.reset_defaults()  # a command that ran in this process has set up its log
