"""Fixtures that several rooms share. The default models are real: each is pulled once and kept between runs."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog

from support.default_model import default_encoder_path, default_model_path
from support.time_limits import pytest_timeout_cancel_timer, pytest_timeout_set_timer, use_patient_profile

__all__ = ["pytest_timeout_cancel_timer", "pytest_timeout_set_timer"]

use_patient_profile()

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    # Under nohup or in the background of a shell Ctrl-C is ignored, by every child too. What is tested is a person's
    # Ctrl-C: with a handler here it works in this process, and in children as well, which begin without handlers.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def default_model() -> Path:
    """The GGUF file of the default chat model, in a home that is kept between runs. Read it, do not change it."""
    return default_model_path()


@pytest.fixture(scope="session")
def default_encoder() -> Path:
    """The folder of the default encoder, in a home that is kept between runs. Read it, do not change it."""
    return default_encoder_path()


@pytest.fixture
def default_model_home(default_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fresh SYNAPSE_HOME that has the default model already (hard-linked where the file system can)."""
    home = tmp_path / "home"
    source = default_model.parent
    target = home / "models" / source.name
    shutil.copytree(source, target, copy_function=_link_or_copy)
    monkeypatch.setenv("SYNAPSE_HOME", str(home))
    return home


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


@pytest.fixture(autouse=True)
def _no_user_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A test never sees the SYNAPSE_* variables or the home folder of whoever runs it."""
    for name in [name for name in os.environ if name.startswith("SYNAPSE_")]:
        if name not in ("SYNAPSE_TEST_HOME", "SYNAPSE_FORCE_PYTHON"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("SYNAPSE_HOME", str(tmp_path / "home"))
    yield
    structlog.reset_defaults()  # a command that ran in this process has set up its log
