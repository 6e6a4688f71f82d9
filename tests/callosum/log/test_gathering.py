"""Many small requests at once become few, and each caller gets what is theirs."""

from __future__ import annotations

import asyncio

import pytest

from synapse.callosum.log.gathering import Gathering
from synapse.errors import Unavailable


class Line:
    """Answers each part with ten times itself, when the test lets it; a part below 0 breaks the whole request."""

    def __init__(self, most: int = 100) -> None:
        self.requests: list[list[int]] = []
        self.open = asyncio.Event()
        self.open.set()
        self.gathering: Gathering[int, int] = Gathering(self.send, lambda part: 1, most)

    async def send(self, parts: list[int]) -> list[int]:
        self.requests.append(parts)
        await self.open.wait()
        if min(parts) < 0:
            raise Unavailable("broken")
        return [10 * part for part in parts]

    def ask(self, *parts: int) -> asyncio.Task[object]:
        return asyncio.create_task(self.gathering.ask(parts))


async def test_a_request_alone_is_sent_at_once() -> None:
    line = Line()
    assert await line.ask(1) == [10]
    assert await line.ask(2, 3) == [20, 30]
    assert line.requests == [[1], [2, 3]]


async def test_what_is_asked_while_one_is_on_its_way_goes_together_and_each_caller_gets_their_part() -> None:
    line = Line()
    line.open.clear()
    asked = [line.ask(0)]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    asked += [line.ask(n, 10 * n) for n in range(1, 5)]
    await asyncio.sleep(0)
    line.open.set()
    assert await asyncio.gather(*asked) == [[0], *([10 * n, 100 * n] for n in range(1, 5))]
    assert line.requests == [[0], [1, 10, 2, 20, 3, 30, 4, 40]]


async def test_what_one_caller_gives_is_never_divided_and_the_rest_is_no_more_than_the_limit() -> None:
    line = Line(most=5)
    asked = [line.ask(*range(length)) for length in (2, 2, 2, 9, 1, 4)]
    await asyncio.gather(*asked)
    assert [len(request) for request in line.requests] == [4, 2, 9, 5]


async def test_an_error_is_for_those_of_its_request_only() -> None:
    line = Line(most=2)
    asked = [line.ask(1, 2), line.ask(-1), line.ask(3), line.ask(4)]
    found = await asyncio.gather(*asked, return_exceptions=True)
    assert [isinstance(one, Unavailable) for one in found] == [False, True, True, False]
    assert (found[0], found[3]) == ([10, 20], [40])


async def test_a_caller_who_is_cancelled_takes_nothing_from_the_others() -> None:
    line = Line()
    line.open.clear()
    first, cancelled, last = line.ask(1), line.ask(2), line.ask(3)
    await asyncio.sleep(0.01)
    cancelled.cancel()
    line.open.set()
    assert (await first, await last) == ([10], [30])
    with pytest.raises(asyncio.CancelledError):
        await cancelled


async def test_closing_waits_for_what_is_on_its_way() -> None:
    line = Line()
    await line.gathering.close()
    asked = line.ask(1)
    await asyncio.sleep(0)
    await line.gathering.close()
    assert line.requests == [[1]]
    assert asked.done() or await asked == [10]
