"""Model cards: a summary and a licence, whatever the text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from synapse.genome.cards import SUMMARY_LENGTH, Card, parse_card


@pytest.mark.parametrize(
    ("text", "card"),
    [
        ("", Card("", "")),
        ("Plain words.", Card("Plain words.", "")),
        ("# Title\n\nFirst\nparagraph.\n\nSecond.", Card("First paragraph.", "")),
        ("---\nlicense: apache-2.0\nbase_model: x\n---\n\n# T\n\nWords.", Card("Words.", "apache-2.0")),
        ("---\r\nlicense: 'mit'\r\n---\r\n\r\nWords.", Card("Words.", "mit")),
        ("---\nlicense: [a, b]\n---\n\n<!-- comment -->\n\n| a | b |\n\n- item\n\nWords.", Card("Words.", "")),
        ("license: mit\n", Card("license: mit", "")),
    ],
)
def test_a_card_is_read(text: str, card: Card) -> None:
    assert parse_card(text.encode()) == card


@given(st.binary(max_size=500))
def test_any_bytes_are_a_card(data: bytes) -> None:
    card = parse_card(data)
    assert len(card.summary) <= SUMMARY_LENGTH
    assert "\x00" not in card.summary
