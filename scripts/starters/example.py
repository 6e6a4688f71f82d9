"""What every starter layer's data is made of: one question, the answer wanted, and which split it belongs to."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import Literal

Split = Literal["training", "held_out"]
"""`training` and `held_out` are drawn from pools that share no template and no value, not from one shuffled pool."""


@dataclass(frozen=True, slots=True)
class Example:
    """One question and the answer wanted.

    `mentions` are the words, lower case, that an answer must hold when no single wording is the right one.
    """

    question: str
    answer: str
    mentions: tuple[str, ...] = ()


def seeded(seed: int, *purpose: str) -> Random:
    """A generator of its own for each purpose, so that more of one kind of data changes nothing of another."""
    return Random(f"{seed}/{'/'.join(purpose)}")  # noqa: S311 - data, not a secret


def words(text: str) -> tuple[str, ...]:
    """The words of a block of text."""
    return tuple(text.split())


def listed(text: str) -> tuple[str, ...]:
    """What a block of text lists between commas."""
    return tuple(part.strip() for part in text.split(","))


def lines(text: str) -> tuple[str, ...]:
    """The lines of a block of text, without the spaces around them."""
    return tuple(line.strip() for line in text.strip().splitlines())


MONTHS = (
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
)

WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")


def ordinal(number: int) -> str:
    """1st, 2nd, 3rd, 4th, 11th … for 1 to 31."""
    ending = "th" if 11 <= number <= 13 else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"
