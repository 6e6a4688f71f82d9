"""What a process writes to a log and gives to its subscriptions itself is passed over by its reader, once."""

from __future__ import annotations

from callosum.log.log_backends import note
from synapse.callosum.bus.delivery.ours import Ours


def read() -> Ours:
    """While somebody reads the log."""
    ours = Ours()
    ours.read = True
    return ours


def test_while_nobody_reads_nothing_that_was_written_is_remembered() -> None:
    given, accepted = note("given"), note("accepted")
    ours = Ours()
    ours.gave(given)
    ours.wrote_given([given])
    ours.writing([accepted])
    ours.wrote([accepted], [True])
    assert not ours.passes(given)
    assert not ours.passes(accepted)


def test_what_others_write_is_not_passed_over() -> None:
    assert not read().passes(note("a"))


def test_what_is_given_here_is_passed_over_before_and_after_it_is_written() -> None:
    early, late = note("early"), note("late")
    ours = read()
    for message in (early, late):
        ours.gave(message)
    assert ours.passes(early)
    ours.wrote_given([early, late])
    assert ours.passes(late)


def test_what_was_accepted_is_passed_over_whether_it_is_read_before_that_is_known_or_after() -> None:
    before, after = note("before"), note("after")
    ours = read()
    ours.writing([before, after])
    assert ours.passes(before)
    assert ours.wrote([before, after], [True, True]) == []
    assert ours.passes(after)


def test_what_was_read_and_then_said_to_be_refused_is_left_to_be_given() -> None:
    before, after = note("before"), note("after")
    ours = read()
    ours.writing([before, after])
    assert ours.passes(before)
    assert ours.wrote([before, after], [False, False]) == [before]
    assert not ours.passes(after)


def test_what_is_written_twice_at_once_is_given_once() -> None:
    message = note("a")
    ours = read()
    ours.writing([message])
    ours.writing([message])
    assert ours.wrote([message], [True]) == []
    assert ours.wrote([message], [False]) == []
    assert ours.passes(message)


def test_what_was_never_read_is_forgotten_once_a_look_that_began_later_found_nothing_more() -> None:
    refused, new = note("refused"), note("new")
    ours = read()
    ours.gave(refused)
    ours.wrote_given([refused])
    ours.look()  # and the log cannot be read
    ours.look()
    ours.writing([new])
    ours.wrote([new], [True])
    ours.looked()
    assert not ours.passes(refused)
    assert ours.passes(new), "it was written after the look had begun"
