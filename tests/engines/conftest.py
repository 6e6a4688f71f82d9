"""The default model, opened once for all tests of the engine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from synapse.engines import Engine, Limits
from synapse.engines.opening import open_engine_file
from synapse.models.chat_template import Message, encode_chat


@pytest.fixture(scope="session")
def engine(default_model: Path) -> Engine:
    return open_engine_file(default_model, "reference", Limits(max_context=1024))


@pytest.fixture(scope="session")
def chat(engine: Engine) -> Callable[[str], tuple[int, ...]]:
    """The prompt that asks the default model something."""
    return lambda text: tuple(encode_chat(engine.tokenizer, engine.chat_template, [Message("user", text)]))
