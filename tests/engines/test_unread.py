"""What waits between an engine and its reader."""

from __future__ import annotations

import asyncio

import pytest

from synapse.engines.request import Delta, Finished, TokenLogprob
from synapse.engines.unread import SlowReader, Unread


def delta(text: str, token: int) -> Delta:
    return Delta("r1", text, (token,), (TokenLogprob(token, -1.0),))


END = Finished("r1", "stop", 3, 2)


async def test_a_reader_that_comes_late_gets_one_delta_with_everything() -> None:
    unread = Unread()
    for event in (delta("a", 1), delta("", 2), delta("b", 3), END):
        assert unread.put(event)
    both = await unread.get()
    assert isinstance(both, Delta)
    assert (both.text, both.tokens, [entry.token for entry in both.logprobs]) == ("ab", (1, 2, 3), [1, 2, 3])
    assert await unread.get() is END


async def test_a_reader_that_keeps_up_gets_each_delta_as_it_is() -> None:
    unread = Unread(most=2)
    for token in range(10):
        reading = asyncio.ensure_future(unread.get())
        await asyncio.sleep(0)
        assert unread.put(sent := delta("x", token))
        assert await reading is sent


async def test_a_reader_that_does_not_read_gets_what_fits_and_then_an_error() -> None:
    unread = Unread(most=3)
    assert [unread.put(delta(str(token), token)) for token in range(5)] == [True, True, True, False, False]
    assert not unread.put(END)
    found = await unread.get()
    assert isinstance(found, Delta)
    assert found.text == "012"
    with pytest.raises(SlowReader, match="3 tokens"):
        await unread.get()


async def test_what_failed_is_raised_in_its_turn() -> None:
    unread = Unread()
    unread.put(delta("a", 1))
    unread.put(ValueError("the engine failed"))
    assert isinstance(await unread.get(), Delta)
    with pytest.raises(ValueError, match="the engine failed"):
        await unread.get()
