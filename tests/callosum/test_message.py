"""Messages, their topics and ids, and their form on a wire."""

from __future__ import annotations

import json
import os
import threading
import time
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import JsonValue

from synapse.callosum.ids import id_number, id_text, new_id
from synapse.callosum.message import LATEST, MOST_BYTES, Message, Tract, from_wire, to_wire
from synapse.callosum.payloads import Payload, Untyped, event, payload_model
from synapse.callosum.topics import checked_topic, matcher
from synapse.errors import Corrupt, InvalidInput, TooLarge
from synapse.evidence import Evidence, join


@event("test.message.measured")
class Measured(Payload):
    what: str
    value: float


WORD = st.from_regex(r"[a-z0-9_-]{1,10}", fullmatch=True)
TOPIC = st.lists(WORD, min_size=1, max_size=8).map(".".join)
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    # a lone surrogate is no text that UTF-8 can write
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abcä", max_size=3), inner, max_size=3),
    max_leaves=8,
)


class TestIds:
    def test_are_uuids_of_version_7_that_sort_by_the_time_they_were_made(self) -> None:
        before = time.time_ns() // 1_000_000
        first = new_id()
        time.sleep(0.003)
        second = new_id()
        for number in (first, second):
            found = UUID(int=number)
            assert (found.version, found.variant) == (7, "specified in RFC 4122")
            assert before <= number >> 80 <= time.time_ns() // 1_000_000
            assert str(found) == id_text(number)
            assert id_number(id_text(number)) == number
        assert first < second

    def test_are_never_given_twice_by_threads_or_forked_processes(self) -> None:
        found: list[list[int]] = []

        def make() -> None:
            found.append([new_id() for _ in range(20_000)])

        threads = [threading.Thread(target=make) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        reading, writing = os.pipe()
        child = os.fork()
        if not child:
            os.write(writing, "".join(id_text(new_id()) for _ in range(100)).encode())
            os._exit(0)
        mine = [new_id() for _ in range(100)]
        os.waitpid(child, 0)
        text = os.read(reading, 100_000).decode()
        theirs = [id_number(text[at : at + 36]) for at in range(0, len(text), 36)]
        every = [number for numbers in found for number in numbers] + mine + theirs
        assert len(every) == 80_200
        assert len(set(every)) == len(every)

    @pytest.mark.parametrize("text", ["", "x" * 36, "123", str(UUID(int=0)), None])
    def test_that_are_none_are_refused(self, text: str) -> None:
        with pytest.raises(InvalidInput, match="an id is a UUID like"):
            id_number(text)


class TestTopics:
    @given(TOPIC)
    def test_of_words_and_dots_are_topics_and_match_themselves(self, topic: str) -> None:
        assert checked_topic(topic) == topic
        assert matcher(topic)(topic)
        assert matcher("**")(topic)

    @pytest.mark.parametrize(
        "topic", ["", ".", "a.", ".a", "a..b", "A", "a b", "a.*", "ä", "a\n", "a." * 8 + "a", "a" * 201, 7]
    )
    def test_of_another_form_are_refused(self, topic: str) -> None:
        with pytest.raises(InvalidInput, match="a topic is one to eight words"):
            checked_topic(topic)

    @pytest.mark.parametrize(
        ("pattern", "topic", "matches"),
        [
            ("a.b", "a.b", True),
            ("a.b", "a.b.c", False),
            ("a.*", "a.b", True),
            ("a.*", "a", False),
            ("a.*", "a.b.c", False),
            ("*.b", "a.b", True),
            ("a.*.c", "a.b.c", True),
            ("a.**", "a.b.c.d", True),
            ("a.**", "a", False),
            ("a.*.**", "a.b", False),
            ("a.b", "axb", False),
            ("a-b", "a-b", True),
        ],
    )
    def test_match_patterns_word_by_word(self, pattern: str, topic: str, matches: bool) -> None:
        assert matcher(pattern)(topic) is matches

    @pytest.mark.parametrize("pattern", ["", "**.a", "a.**.b", "a*", "a.", "A.*", "***", "(a)", "a|b"])
    def test_patterns_of_another_form_are_refused(self, pattern: str) -> None:
        with pytest.raises(InvalidInput, match="a pattern is words"):
            matcher(pattern)


class TestMessages:
    @given(
        topic=TOPIC.filter(lambda topic: payload_model(topic) is Untyped),
        payload=st.dictionaries(st.text("abc", max_size=3), JSON, max_size=3),
        tract=st.sampled_from(Tract),
        priority=st.integers(0, 9),
        evidence=st.sampled_from(Evidence),
        deadline=st.none() | st.floats(0, LATEST, exclude_max=True),
        key=st.none() | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=200),
        reply_to=st.none() | TOPIC,
    )
    def test_come_back_from_a_wire_as_they_were(
        self,
        topic: str,
        payload: dict[str, JsonValue],
        tract: Tract,
        priority: int,
        evidence: Evidence,
        deadline: float | None,
        key: str | None,
        reply_to: str | None,
    ) -> None:
        sent = Message(topic, Untyped(payload), tract, priority, evidence, deadline, "00-ab-cd-01", reply_to, key)
        got = from_wire(to_wire(sent))
        for name in Message.__dataclass_fields__:
            assert getattr(got, name) == getattr(sent, name)
        assert (got.id, got.time, got.dedupe_key) == (sent.id, sent.time, sent.dedupe_key)

    def test_have_the_payload_that_is_declared_for_their_topic(self) -> None:
        got = from_wire(to_wire(Message("test.message.measured", Measured(what="heat", value=2.5))))
        assert got.payload == Measured(what="heat", value=2.5)

    def test_of_a_newer_version_lose_only_what_is_new(self) -> None:
        body = json.loads(to_wire(Message("test.message.measured", Measured(what="heat", value=2.5))))
        body["colour"] = "red"
        body["payload"]["unit"] = "K"
        assert from_wire(json.dumps(body).encode()).payload == Measured(what="heat", value=2.5)

    def test_whose_payload_does_not_fit_its_model_keep_it_as_it_came(self) -> None:
        body = json.loads(to_wire(Message("test.message.measured", Measured(what="heat", value=2.5))))
        body["payload"] = {"value": "much"}
        assert from_wire(json.dumps(body).encode()).payload == Untyped({"value": "much"})

    def test_a_topic_has_one_payload(self) -> None:
        with pytest.raises(TypeError, match="has the payload Measured already"):
            event("test.message.measured")(Untyped)

    @pytest.mark.parametrize(
        "wrong",
        [
            {"topic": "A"},
            {"tract": 2},
            {"priority": 10},
            {"evidence": -1},
            {"deadline": float("inf")},
            {"deadline": 1.7e12},
            {"id": "1"},
            {"id": "ffffffff-ffff-7fff-8fff-ffffffffffff"},
            {"reply_to": "no topic"},
            {"key": "k" * 201},
            {"payload": []},
            {"payload": None},
        ],
    )
    def test_that_are_none_are_refused(self, wrong: dict[str, object]) -> None:
        body = json.loads(to_wire(Message("a.b", Untyped({})))) | wrong
        with pytest.raises(Corrupt, match="these bytes are no message"):
            from_wire(json.dumps(body).encode())

    @given(st.binary(max_size=200))
    def test_any_bytes_are_a_message_or_refused(self, body: bytes) -> None:
        with pytest.raises(Corrupt):
            from_wire(body)

    def test_that_are_too_large_are_refused_on_both_sides(self) -> None:
        with pytest.raises(TooLarge, match="at most 1,048,576 bytes"):
            to_wire(Message("a.b", Untyped({"text": "x" * MOST_BYTES})))
        with pytest.raises(Corrupt, match="at most 1,048,576 bytes"):
            from_wire(b" " * (MOST_BYTES + 1))

    @pytest.mark.parametrize(
        ("message", "expected"),
        [
            (Message("a.b", Untyped({"x": float("nan")})), "cannot be written as JSON"),
            (Message("a.b", Untyped({}), key="k" * 201), "a key has at most 200 characters"),
            (Message("a.b", Untyped({}), deadline=float("nan")), "a deadline is seconds since 1970, before the year"),
            (Message("a.b", Untyped({}), deadline=1.7e12), "a deadline is seconds since 1970, before the year"),
            (Message("a.b", Untyped({}), number=(1 << 128) - 1), "an id begins with a time before the year 10000"),
            (Message("a.b", Untyped({}), key="a\0b"), "a key has no NUL character"),
        ],
    )
    def test_that_cannot_be_written_are_refused(self, message: Message, expected: str) -> None:
        with pytest.raises(InvalidInput, match=expected):
            to_wire(message)

    @pytest.mark.parametrize("priority", [-1, 10])
    def test_have_a_priority_from_0_to_9(self, priority: int) -> None:
        with pytest.raises(InvalidInput, match="a priority is an integer from 0 to 9"):
            Message("a.b", Untyped({}), priority=priority)

    def test_expire_at_their_deadline(self) -> None:
        message = Message("a.b", Untyped({}), deadline=100.0)
        assert [message.expired(now) for now in (99.9, 100.0, 100.1)] == [False, True, True]
        assert not Message("a.b", Untyped({})).expired()


@given(st.lists(st.sampled_from(Evidence)))
def test_what_is_made_of_parts_is_trusted_like_the_least_of_them(parts: list[Evidence]) -> None:
    found = join(*parts)
    assert found in (parts or [Evidence.KNOWN])
    assert all(part <= found for part in parts)


def test_grades_of_evidence_have_the_marks_of_the_language() -> None:
    assert [grade.mark for grade in Evidence] == ["!", "?", "~", "‽"]
