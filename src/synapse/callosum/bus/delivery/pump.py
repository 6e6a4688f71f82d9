"""A pump: takes messages from a queue and gives them to a handler, as far as its breakers let it.

Taking goes message by message, so what a person waits for is never behind what was taken before it came. The pump lets
the event loop go on after at most `BURST` messages, or about `SLICE_S`, of a handler that waits for nothing.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from functools import partial
from inspect import isawaitable

from synapse.callosum.bus.delivery.breaker import Breaker, BreakerPolicy, State
from synapse.callosum.bus.delivery.holding import HoldingQueue
from synapse.callosum.bus.delivery.outcomes import Outcomes
from synapse.callosum.message import LANES, Message, Tract
from synapse.callosum.router.router import Empty
from synapse.callosum.router.waiters import Waiters

Handler = Callable[[Message], Awaitable[object] | object]
BURST = 64
SLICE_S = 0.001


class Pump:
    """Workers that empty one queue. Made in a running event loop, and of that one only.

    Attributes:
        breakers: one for each tract.
        running: messages that are with an asynchronous handler now.
        sleeping: the workers that have nothing to do; after a message was queued, one is to be woken.
        handled, failed: how often the handler returned, and raised.
    """

    def __init__(
        self,
        queue: HoldingQueue,
        handler: Handler,
        outcomes: Outcomes,
        *,
        concurrency: int,
        policy: BreakerPolicy,
        on_change: Callable[[Tract, State, str], None],
    ) -> None:
        """Start the workers.

        Args:
            concurrency: messages of an asynchronous handler that are handled at a time.
            on_change: told when a breaker has changed, with the last error.
        """
        self._queue, self._handler, self._outcomes, self._on_change = queue, handler, outcomes, on_change
        self.breakers = tuple(Breaker(policy, on_change=partial(self._changed, tract)) for tract in Tract)
        self._room: dict[int, Waiters] = {}
        self.running = self.handled = self.failed = 0
        self._error = ""
        self._held: set[Tract] = set()
        self._stopping = False
        self._rare = True  # there is more to look at than the queue: a breaker, a retry, somebody who waits for room
        self.sleeping: list[asyncio.Future[None]] = []
        self._timers: dict[Tract, asyncio.TimerHandle] = {}
        self._loop = asyncio.get_running_loop()
        self._workers = [self._loop.create_task(self._work()) for _ in range(concurrency)]

    def put(self, message: Message) -> None:
        """Queue a message. Raises `Full`."""
        self._queue.put_nowait(message)
        if self.sleeping:
            self.wake()

    def wake(self, count: int = 1) -> None:
        """So many messages have come, or may be handled again."""
        while count > 0 and self.sleeping:
            sleeping = self.sleeping.pop()
            if not sleeping.done():  # the loop is being closed
                sleeping.set_result(None)
            count -= 1

    @property
    def idle(self) -> bool:
        """Whether no worker has anything to do just now: all is handled, or held."""
        return len(self.sleeping) == len(self._workers)

    async def room(self, message: Message) -> None:
        """Wait until there may be room for a message, or the pump stops."""
        lane = message.lane % LANES
        self._rare = True
        waiters = self._room.setdefault(lane, Waiters())
        await waiters.wait(lambda: True)

    async def stop(self, patience_s: float) -> int:
        """End: what is being handled may end within so many seconds, and is cancelled then. Returns how many were."""
        self._stopping = self._rare = True
        for timer in self._timers.values():
            timer.cancel()
        self.wake(len(self._workers))
        for lane in list(self._room):
            self._tell_room(lane, all_of_them=True)
        ours = [worker for worker in self._workers if worker is not asyncio.current_task()]
        if not ours:
            return 0
        _, late = await asyncio.wait(ours, timeout=patience_s)
        for worker in late:
            worker.cancel()
        await asyncio.gather(*late, return_exceptions=True)
        return len(late)

    async def _work(self) -> None:
        get_nowait, handler = self._queue.get_nowait, self._handler
        burst = left = 1
        began = time.perf_counter()
        while True:
            try:
                message = self._next() if self._rare else get_nowait()
            except Empty:
                if self._stopping:
                    return
                burst = _paced(burst, burst - left, began)
                await self._sleep()
                left, began = burst, time.perf_counter()
                continue
            try:
                answer = handler(message)
            except (Exception, asyncio.CancelledError) as error:  # of a task that it asked: ours is not waiting
                self._fail(message, self.breakers[message.tract].era, error)
            else:
                if answer is not None and isawaitable(answer):
                    await self._finish(message, answer)
                else:
                    self.handled += 1
                    if self._rare:
                        self._succeed(message, self.breakers[message.tract].era)
            left -= 1
            if left <= 0:
                burst = _paced(burst, burst, began)
                await asyncio.sleep(0)
                left, began = burst, time.perf_counter()

    async def _finish(self, message: Message, answer: Awaitable[object]) -> None:
        """Wait for the end of an asynchronous handler."""
        era = self.breakers[message.tract].era
        self.running += 1
        try:
            await answer
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            self._fail(message, era, error)  # somebody else's task was cancelled, not ours
        except Exception as error:
            self._fail(message, era, error)
        else:
            self.handled += 1
            if self._rare:
                self._succeed(message, era)
        finally:
            self.running -= 1

    def _next(self) -> Message:
        """The next message when more than the queue is to be looked at."""
        while not self._stopping:
            message = self._taken()
            if self._room:
                self._tell_room(message.lane % LANES)
            if self._outcomes.wanted(message):
                self.breakers[message.tract].admit()
                return message
        raise Empty

    def _taken(self) -> Message:
        for tract, breaker in zip(Tract, self.breakers, strict=True):
            if breaker.state is State.HALF_OPEN and breaker.ready():
                try:
                    return self._queue.take_held(tract)
                except Empty:
                    continue
        return self._queue.get_nowait()

    def _succeed(self, message: Message, era: int) -> None:
        """Tell those who want to know of successes, and find out whether anybody still does."""
        self._outcomes.handled(message)
        self.breakers[message.tract].succeeded(era)
        calm = all(breaker.calm for breaker in self.breakers)
        self._rare = not calm or self._stopping or bool(self._room) or self._outcomes.attentive

    async def _sleep(self) -> None:
        future = self._loop.create_future()
        self.sleeping.append(future)
        await future

    def _fail(self, message: Message, era: int, error: BaseException) -> None:
        self._rare = True
        self.failed += 1
        self._error = _described(error)
        self._outcomes.failed(message, self._error)
        self.breakers[message.tract].failed(era)

    def made_room(self, message: Message) -> None:
        """A message has left the queue and was not taken from it."""
        self._tell_room(message.lane % LANES)

    def _tell_room(self, lane: int, *, all_of_them: bool = False) -> None:
        waiters = self._room.get(lane)
        if waiters is not None:
            waiters.wake(len(waiters.futures) if all_of_them else 1)
            if not waiters.futures:
                del self._room[lane]

    def _changed(self, tract: Tract, state: State) -> None:
        if state is State.OPEN:
            if tract not in self._held:
                self._held.add(tract)
                self._queue.hold(tract)
            self._try_later(tract)
        elif state is State.CLOSED:
            self._held.remove(tract)
            self._queue.release(tract)
            self.wake(len(self._workers))
        self._on_change(tract, state, self._error)

    def _try_later(self, tract: Tract) -> None:
        wait_s = self.breakers[tract].until - time.monotonic()
        self._timers[tract] = self._loop.call_later(max(0.0, wait_s), self._try, tract)

    def _try(self, tract: Tract) -> None:
        if self.breakers[tract].refresh() is State.OPEN:
            self._try_later(tract)
        else:
            self.wake(len(self._workers))


def _described(error: BaseException) -> str:
    """What an error says, in characters that can be written down; one of the handler's own may fail to say it."""
    try:
        text = f"{type(error).__name__}: {error}"
    except Exception as worse:
        text = f"{type(error).__name__}, which cannot be shown: {type(worse).__name__}"
    return text[:500].encode(errors="backslashreplace").decode()


def _paced(burst: int, done: int, began: float) -> int:
    """How many messages may go before the event loop goes on, when so many have taken the time since `began`."""
    if not done:
        return burst
    return max(1, min(BURST, int(done * SLICE_S / (time.perf_counter() - began + 1e-9))))
