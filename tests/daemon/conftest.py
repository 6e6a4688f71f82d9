"""A home in which the engine's kernel answers, made once: its answers do not depend on how they are cut into steps."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.native_engine import living_in, put_kernel


@pytest.fixture(scope="session")
def native_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = put_kernel(tmp_path_factory.mktemp("daemon") / "home")
    with living_in(home):
        return home
