"""Commands that a test registers are gone after it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from synapse.commands import all_commands, registry


@pytest.fixture(autouse=True)
def _only_new_commands_are_forgotten() -> Iterator[None]:
    all_commands()
    before = dict(registry._commands)
    yield
    registry._commands.clear()
    registry._commands.update(before)
