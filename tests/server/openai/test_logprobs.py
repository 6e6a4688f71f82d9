"""Log-probabilities of tokens that are no whole characters."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from synapse.engines import Delta, TokenLogprob
from synapse.server.openai.logprobs import LEAST_LOGPROB, characters, chat_logprobs, completion_logprobs, told_tokens
from synapse.server.openai.shapes import ChatShape, CompletionShape

EURO = "€".encode()


class Bytes:
    """A vocabulary of four tokens: two parts of a euro sign, a letter, and the end of text."""

    eos_ids = frozenset({3})
    pieces = (EURO[:2], EURO[2:], b"a", b"")

    def token_bytes(self, token: int) -> bytes:
        return self.pieces[token]

    def decode(self, ids: Sequence[int]) -> str:
        assert list(ids) == [3]
        return "<|end|>"


ENTRIES = [
    TokenLogprob(0, -0.5, ((0, -0.5), (3, -2.0))),
    TokenLogprob(1, -0.1, ((1, -0.1), (2, -3.0))),
    TokenLogprob(2, float("-inf"), ((1, -0.2), (0, -4.0))),
]


def test_chat_escapes_parts_of_characters_and_gives_their_bytes() -> None:
    content = chat_logprobs(ENTRIES, Bytes())["content"]
    assert [entry["token"] for entry in content] == ["\\xe2\\x82", "\\xac", "a"]
    assert bytes(byte for entry in content for byte in entry["bytes"]) == "€a".encode()
    assert content[0]["top_logprobs"][1] == {"token": "<|end|>", "logprob": -2.0, "bytes": list(b"<|end|>")}
    assert content[2]["logprob"] == LEAST_LOGPROB


def test_completions_mark_parts_of_characters_and_say_where_tokens_begin() -> None:
    found = completion_logprobs(ENTRIES, Bytes(), 10)
    assert found["tokens"] == ["bytes:\\xe2\\x82", "bytes:\\xac", "a"]
    assert found["text_offset"] == [10, 11, 11]
    assert found["token_logprobs"] == [-0.5, -0.1, LEAST_LOGPROB]
    assert found["top_logprobs"][2] == {"bytes:\\xac": -0.2, "bytes:\\xe2\\x82": -4.0, "a": LEAST_LOGPROB}


@given(st.text())
def test_the_offset_counts_characters(text: str) -> None:
    assert characters(text.encode()) == len(text)


@pytest.mark.parametrize("shape", [ChatShape(Bytes(), logprobs=True), CompletionShape(Bytes(), logprobs=True, count=1)])
def test_the_token_that_ends_an_answer_is_not_a_part_of_it(shape: ChatShape | CompletionShape) -> None:
    end = Delta("r1", "", (3,), (TokenLogprob(3, -0.1),))
    assert told_tokens([end], Bytes()) == []
    assert shape.chunk(0, end) is None
    half = Delta("r1", "", (0,), (ENTRIES[0],))
    assert shape.chunk(0, half) is not None  # no text yet, but a token to tell of
