"""The default model, opened once for all tests of the engine."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from synapse.engines import Engine, Limits
from synapse.models.chat_template import Message, encode_chat


@pytest.fixture(scope="session")
def engine(open_default: Callable[[Limits], Engine]) -> Engine:
    return open_default(Limits(max_context=1024))


@pytest.fixture(scope="session")
def chat(engine: Engine) -> Callable[[str], tuple[int, ...]]:
    """The prompt that asks the default model something."""
    return lambda text: tuple(encode_chat(engine.tokenizer, engine.chat_template, [Message("user", text)]))
