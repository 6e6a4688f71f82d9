"""Streaming text is whole characters, ends before a stop string, and is the same however tokens cut it."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from synapse.engines.text import TextStream


def stream(pieces: list[bytes], stop: list[str]) -> tuple[list[str], bool]:
    text = TextStream(stop)
    out = [text.push(piece) for piece in pieces]
    out.append(text.push(b"", last=True))
    return out, text.stopped


def test_a_character_split_over_tokens_appears_once_it_is_whole() -> None:
    out, _ = stream([b"\xf0\x9f", b"\x98", b"\x80!"], [])
    assert out == ["", "", "😀!", ""]


def test_an_incomplete_character_at_the_end_becomes_the_replacement_character() -> None:
    out, _ = stream([b"a\xf0\x9f"], [])
    assert "".join(out) == "a\ufffd"


def test_a_stop_string_across_tokens_is_never_shown_not_even_its_beginning() -> None:
    out, stopped = stream([b"one E", b"N", b"D two"], ["END"])
    assert out == ["one ", "", "", ""]
    assert stopped


def test_what_only_looked_like_a_stop_string_is_shown_late() -> None:
    out, stopped = stream([b"E", b"N", b"x"], ["END"])
    assert out == ["", "", "ENx", ""]
    assert not stopped


def test_text_held_back_is_let_go_at_the_end() -> None:
    out, stopped = stream([b"the EN"], ["END"])
    assert "".join(out) == "the EN"
    assert not stopped


def test_the_first_complete_of_several_stop_strings_counts() -> None:
    out, _ = stream([b"a b c"], [" c", "b"])
    assert "".join(out) == "a "


@given(st.text(max_size=40), st.lists(st.integers(0, 160), max_size=8), st.lists(st.text(min_size=1, max_size=4)))
def test_the_text_does_not_depend_on_where_tokens_end(whole: str, cuts: list[int], stop: list[str]) -> None:
    data = whole.encode()
    places = sorted({min(cut, len(data)) for cut in cuts} | {0, len(data)})
    pieces = [data[a:b] for a, b in itertools.pairwise(places)]
    out, stopped = stream(pieces, stop)
    ends = [(place + len(s), place) for s in stop if (place := whole.find(s)) >= 0]
    assert stopped == bool(ends)
    assert "".join(out) == (whole[: min(ends)[1]] if ends else whole)
