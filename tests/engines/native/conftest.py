"""What tests of the native engine share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from threadpoolctl import threadpool_limits

from support.native_engine import wait_until_ready
from synapse.engines.native.model import NativeModel


@pytest.fixture(scope="session", autouse=True)
def _one_blas_thread() -> Iterator[None]:
    """Threads of BLAS spin for one another, which on small matrices and a busy machine takes longer than the work."""
    with threadpool_limits(1, user_api="blas"):
        yield


@pytest.fixture
def at_home(native_home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The test runs in that home, and the kernel answers there."""
    monkeypatch.setenv("SYNAPSE_HOME", str(native_home))
    monkeypatch.delenv("SYNAPSE_FORCE_PYTHON", raising=False)
    wait_until_ready()
    return native_home


@pytest.fixture
def close() -> Iterator[Callable[[NativeModel], NativeModel]]:
    """Closes a model when the test is over, also when it fails: its threads would go on."""
    models: list[NativeModel] = []

    def note(model: NativeModel) -> NativeModel:
        models.append(model)
        return model

    yield note
    for model in models:
        model.close()
