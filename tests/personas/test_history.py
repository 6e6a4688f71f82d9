from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from synapse.engines.checking import ContextOverflow
from synapse.engines.front_end import ANSWER_TOKENS, STEPS, fit
from synapse.models.chat_template import Message
from synapse.personas.history import alternating, with_system_prompt


def encode(messages: Sequence[Message]) -> list[int]:
    """One token for a role and one for each character: enough to count with."""
    return [0 if message.role == "system" else 1 for message in messages for _ in range(1 + len(message.content))]


def user(text: str) -> Message:
    return Message("user", text)


def assistant(text: str) -> Message:
    return Message("assistant", text)


def test_the_personas_prompt_comes_first_and_a_requests_own_follows_it_in_the_same_message() -> None:
    messages = [user("hi"), Message("system", "be brief"), assistant("yes"), user("go on")]
    assert with_system_prompt("You are a captain.", messages) == [
        Message("system", "You are a captain.\n\nbe brief"),
        user("hi"),
        assistant("yes"),
        user("go on"),
    ]
    assert with_system_prompt("", [user("hi")]) == [user("hi")]


def test_neighbours_of_one_role_are_joined_and_empty_answers_are_dropped() -> None:
    assert alternating([user("a"), assistant(""), user("b"), assistant("c")]) == [user("a\n\nb"), assistant("c")]


def test_a_history_that_fits_is_kept_whole() -> None:
    messages = [Message("system", "s"), user("a"), assistant("b"), user("c")]
    assert fit(messages, encode, 1000) == (encode(messages), 0)


def test_the_oldest_turns_go_first_and_whole() -> None:
    long = "x" * 300
    messages = [Message("system", "s"), user(long), assistant(long), user(long), assistant("b"), user("c")]
    prompt, left_out = fit(messages, encode, 1024)
    assert left_out == 2
    assert prompt == encode([messages[0], *messages[3:]])


def test_the_last_message_may_use_the_room_of_the_answer_but_not_all_of_it() -> None:
    context = 1024
    fitting = [user("old"), assistant("old"), user("x" * (context - 2))]
    prompt, left_out = fit(fitting, encode, context)
    assert (len(prompt), left_out) == (context - 1, 2)
    with pytest.raises(ContextOverflow, match="1024 tokens long, and this model's context is 1024"):
        fit([user("x" * (context - 1))], encode, context)


def test_a_history_that_begins_with_an_answer_is_cut_there_too() -> None:
    messages = [assistant("x" * 900), user("a")]
    assert fit(messages, encode, 1024) == (encode([user("a")]), 1)


turns = st.lists(st.tuples(st.text("x", min_size=1, max_size=60), st.text("y", min_size=1, max_size=60)), max_size=12)


@given(turns, st.text("z", min_size=1, max_size=20), st.sampled_from(["", "system"]), st.integers(64, 1500))
def test_whole_turns_are_left_out_until_the_rest_fits_and_not_many_more_than_a_quarter(
    earlier: list[tuple[str, str]], last: str, system: str, context: int
) -> None:
    said = [message for question, answer in earlier for message in (user(question), assistant(answer))]
    messages = with_system_prompt(system, [*said, user(last)])
    head = messages[: len(messages) - len(said) - 1]
    prompt, left_out = fit(messages, encode, context)
    room = context - min(ANSWER_TOKENS, context // 4)
    assert left_out % 2 == 0
    assert prompt == encode([*head, *said[left_out:], user(last)])
    assert len(prompt) <= room or left_out == len(said)
    if left_out:
        assert len(encode([*head, *said[left_out - 2 :], user(last)])) > room - room // STEPS


@given(st.lists(st.integers(1, 60), min_size=60, max_size=60), st.sampled_from(["", "system"]))
def test_a_conversation_that_has_outgrown_its_context_keeps_its_beginning_for_many_turns(
    lengths: list[int], system: str
) -> None:
    context = 1000
    room = context - context // 4
    said: list[Message] = []
    beginnings = []
    for length in lengths:
        said.append(user("x" * length))
        prompt, left_out = fit(with_system_prompt(system, said), encode, context)
        assert len(prompt) <= room
        beginnings.append(left_out)
        said.append(assistant("y" * length))
    assert beginnings == sorted(beginnings)
    tokens = sum(len(message.content) + 1 for message in said)
    assert len(set(beginnings)) <= 2 + tokens // (room // STEPS)
