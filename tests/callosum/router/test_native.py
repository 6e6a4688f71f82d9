"""The router's core in Mojo: it does what the reference does, counts references rightly, and is rolled out."""

from __future__ import annotations

import gc
import pickle
import shutil
import subprocess
import sys
import weakref
from pathlib import Path
from random import Random
from typing import Any, NoReturn, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.router_kernel import core_opener, router_build, router_library
from synapse.callosum.message import Message
from synapse.callosum.router.drill import drill, examples
from synapse.callosum.router.native import KERNEL, agrees, find, open_native, self_test
from synapse.callosum.router.reference import ReferenceCore
from synapse.callosum.router.state import Core, Hooks
from synapse.errors import NotFound, Unavailable
from synapse.kernels.cache import FOLDER


class Refused(Exception):
    pass


class Thing:
    """What a core knows of a message: its lane."""

    def __init__(self, lane: Any, number: int = 0) -> None:
        self.lane, self.number = lane, number


def thing(lane: Any, number: int = 0) -> Message:
    return cast(Message, Thing(lane, number))


class Heard:
    """Hooks that note what they are called with."""

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.hooks = Hooks(self.refused, self.nothing, self.arrived, self.given)

    def refused(self, message: Message) -> NoReturn:
        self.calls.append(("refused", cast(Thing, message).number))
        raise Refused

    def nothing(self) -> NoReturn:
        self.calls.append("nothing")
        raise Refused

    def arrived(self) -> None:
        self.calls.append("arrived")

    def given(self, message: Message) -> Message:
        self.calls.append(("given", cast(Thing, message).number))
        return message


def native_core(capacity: int = 4, share: int = 8, hooks: Hooks | None = None) -> Core:
    return core_opener("native")(capacity, share, hooks or Heard().hooks)


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("put"), st.integers(0, 39)),
        st.tuples(st.just("put_many"), st.lists(st.sampled_from((0, 3, 9, 10, 14, 19, 33)), max_size=12)),
        st.tuples(st.just("take"), st.none()),
        st.tuples(st.just("take_many"), st.integers(0, 15)),
        st.tuples(st.just("chores"), st.integers(0, 2)),
        st.tuples(st.just("waiting"), st.integers(0, 2)),
        st.tuples(st.just("room"), st.integers(0, 4)),
    ),
    max_size=60,
)


def played(core: Core, heard: Heard, steps: list[tuple[str, Any]]) -> list[Any]:
    """All that can be seen of a core during these steps."""
    seen: list[Any] = []
    for number, (name, argument) in enumerate(steps):
        try:
            if name == "put":
                core.put(thing(argument, number))
            elif name == "put_many":
                seen.append(core.put_many([thing(lane, number + 100 * n) for n, lane in enumerate(argument)]))
            elif name == "take":
                seen.append(cast(Thing, core.take()).number)
            elif name == "take_many":
                seen.append([cast(Thing, one).number for one in core.take_many(argument)])
            else:
                setattr(core, name, argument)
        except Refused:
            seen.append("refused")
        seen += [core.depths(), core.chores, core.waiting, core.room, list(heard.calls)]
        seen.append(sorted((one.lane, cast(Thing, one).number) for one in core.heads()))
    return seen


@settings(max_examples=150, deadline=None)
@given(steps=STEPS, capacity=st.integers(1, 4), share=st.integers(1, 4))
def test_it_does_what_the_reference_does(steps: list[tuple[str, Any]], capacity: int, share: int) -> None:
    steps = [step for step in steps if step[0] != "room" or step[1] <= capacity]
    one, other = Heard(), Heard()
    native = open_native(router_library(), capacity, share, one.hooks)
    assert played(native, one, steps) == played(ReferenceCore(capacity, share, other.hooks), other, steps)


def test_long_random_sequences_are_the_same_too() -> None:
    random = Random(3)  # noqa: S311 (the same every time)
    for capacity in (1, 7, 1000):
        steps: list[tuple[str, Any]] = []
        for _ in range(300):
            lanes = [random.choice((0, 5, 9, 10, 15, 19)) for _ in range(random.randint(0, 200))]
            steps += [("put_many", lanes), ("take_many", random.randint(0, 220)), ("put", 12), ("take", None)]
        one, other = Heard(), Heard()
        expected = played(ReferenceCore(capacity, 8, other.hooks), other, steps)
        assert played(native_core(capacity, 8, one.hooks), one, steps) == expected


@pytest.mark.parametrize("wrong", [object(), thing("nine"), thing(None), thing(2**70)])
def test_what_is_no_message_is_an_error_and_changes_nothing(wrong: Message) -> None:
    core = native_core()
    for put in (core.put, lambda one: core.put_many([thing(1), one])):
        with pytest.raises((AttributeError, TypeError, OverflowError)):
            put(wrong)
    assert sum(core.depths()) == 1


@pytest.mark.parametrize("lane", [-1, 40, 2**40])
def test_a_lane_that_there_is_not_is_refused(lane: int) -> None:
    core = native_core()
    with pytest.raises(Refused):
        core.put(thing(lane))
    assert core.put_many([thing(0), thing(lane), thing(0)]) == 1


@pytest.mark.parametrize("wrong", [(), "abc", None, 5])
def test_a_batch_is_a_list(wrong: Any) -> None:
    with pytest.raises(SystemError):
        native_core().put_many(wrong)


def test_a_limit_is_a_number() -> None:
    core = native_core()
    core.put(thing(0))
    with pytest.raises(TypeError):
        core.take_many(cast(int, "all"))
    assert core.take_many(-3) == []
    assert len(core.take_many(2**40)) == 1


def test_a_batch_that_shrinks_while_it_is_read_is_an_error_and_no_crash() -> None:
    batch: list[Message] = []

    class Shrinking:
        @property
        def lane(self) -> int:
            batch.clear()
            return 3

    batch += [cast(Message, Shrinking()) for _ in range(5)]
    core = native_core()
    with pytest.raises(IndexError):
        core.put_many(batch)
    assert sum(core.depths()) == 1


def test_an_error_of_a_hook_is_the_error_of_the_call() -> None:
    def fails(*_: object) -> Any:
        raise ZeroDivisionError

    core = native_core(hooks=Hooks(fails, fails, fails, fails))
    with pytest.raises(ZeroDivisionError):
        core.take()
    core.waiting = 1
    with pytest.raises(ZeroDivisionError):
        core.put(thing(3))
    core.chores = 1
    with pytest.raises(ZeroDivisionError):
        core.take()


def test_no_reference_is_left_behind_or_lost() -> None:
    core, one = native_core(100), thing(3)
    heard = Heard()
    chores = native_core(100, hooks=heard.hooks)
    chores.chores = 1
    batch = [one] * 50
    before = sys.getrefcount(one), sys.getrefcount(None), sys.getrefcount(batch)
    for _ in range(300):
        core.put(one)
        core.put_many(batch)
        core.heads()
        core.take()
        core.take_many(60)
        chores.waiting = 1
        chores.put(one)
        chores.take()
        with pytest.raises(Refused):
            core.take()
    heard.calls.clear()
    after = sys.getrefcount(one), sys.getrefcount(None), sys.getrefcount(batch)
    assert abs(after[1] - before[1]) < 50  # others count None as well
    assert (after[0], after[2]) == (before[0], before[2])


def test_what_is_queued_is_let_go_of_with_the_core_and_not_before() -> None:
    core, one = native_core(), thing(3)
    gone = weakref.ref(one)
    put, take = core.put, core.take
    core.put(one)
    del one, core
    gc.collect()
    assert gone() is not None
    given = take()
    assert given is gone()
    put(given)
    del given, put, take
    gc.collect()
    assert gone() is None


def test_a_core_that_its_hooks_refer_to_is_let_go_of_too() -> None:
    heard = Heard()
    heard.core = native_core(hooks=heard.hooks)  # type: ignore[attr-defined]
    one = thing(3)
    heard.core.put(one)  # type: ignore[attr-defined]
    gone = weakref.ref(one)
    del heard, one
    gc.collect()
    assert gone() is None


def test_the_drill_tells_cores_apart() -> None:
    self_test(router_library())
    capacity, share, hooks = examples()[-1]
    assert not agrees(open_native(router_library(), capacity, share + 1, hooks), ReferenceCore(capacity, share, hooks))


def test_another_process_gets_what_a_core_does_in_the_drill() -> None:
    capacity, share, hooks = examples()[0]
    sent = pickle.loads(pickle.dumps(native_core(capacity, share, hooks)))  # noqa: S301 (our own)
    assert sent == drill(ReferenceCore(capacity, share, hooks))
    assert agrees(sent, ReferenceCore(capacity, share, hooks))


def test_without_a_build_or_a_global_lock_there_is_no_native_side(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NotFound, match="the kernel router is not built"):
        find()
    monkeypatch.setattr(sys, "_is_gil_enabled", lambda: False, raising=False)
    with pytest.raises(Unavailable, match="global lock"):
        find()


PROGRAM = """
from synapse.callosum.router.router import Router
from synapse.hotpath import PATHS, ready
print(ready("router", 60).native, type(Router(on_expired=print)._core).__name__)
"""


@pytest.mark.slow
def test_a_new_process_gets_the_kernel_once_it_has_proved_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SYNAPSE_FORCE_PYTHON", raising=False)
    home = tmp_path / "home"
    (home / FOLDER).mkdir(parents=True)
    shutil.copy2(router_build().path, home / FOLDER)
    program = [sys.executable, "-c", PROGRAM]
    assert KERNEL.name in router_build().path.name
    assert subprocess.run(program, capture_output=True, text=True, check=True).stdout == "True NativeCore\n"
    monkeypatch.setenv("SYNAPSE_FORCE_PYTHON", "1")
    assert subprocess.run(program, capture_output=True, text=True, check=True).stdout == "False ReferenceCore\n"
