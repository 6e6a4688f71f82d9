"""`iso-date`: a sentence with a date, however it is written, becomes that date in ISO 8601, and nothing else."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from random import Random

from scripts.starters.example import Example, Split, ordinal, seeded, words

SYSTEM_PROMPT = "Answer only with the date in the message, as YYYY-MM-DD."
OTHER_PROMPTS = (
    "Write the date in ISO format.",
    "You are an archivist. Normalise the date.",
    "Which date is meant? Reply in ISO 8601.",
)
NO_DATE = "no date"

ORDINAL_WORDS = words(
    """first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth thirteenth fourteenth fifteenth
    sixteenth seventeenth eighteenth nineteenth twentieth twenty-first twenty-second twenty-third twenty-fourth
    twenty-fifth twenty-sixth twenty-seventh twenty-eighth twenty-ninth thirtieth thirty-first"""
)

Format = Callable[[datetime.date], str]

FORMATS: dict[Split, tuple[Format, ...]] = {
    "training": (
        lambda d: f"{d.day} {d:%B} {d.year}",
        lambda d: f"{d.day} {d:%b} {d.year}",
        lambda d: f"{d:%B} {d.day}, {d.year}",
        lambda d: f"{d:%b} {d.day}, {d.year}",
        lambda d: f"{d:%b}. {d.day}, {d.year}",
        lambda d: f"the {ordinal(d.day)} of {d:%B} {d.year}",
        lambda d: f"the {ordinal(d.day)} of {d:%B}, {d.year}",
        lambda d: f"{ordinal(d.day)} {d:%B} {d.year}",
        lambda d: f"{d:%B} {ordinal(d.day)}, {d.year}",
        lambda d: f"{d:%B} the {ordinal(d.day)}, {d.year}",
        lambda d: f"{d.day}-{d:%b}-{d.year}",
        lambda d: f"{d:%d.%m.%Y}",
        lambda d: f"{d:%Y/%m/%d}",
        lambda d: f"{d:%A}, {d.day} {d:%B} {d.year}",
        lambda d: f"{d:%A} the {ordinal(d.day)} of {d:%B}, {d.year}",
        lambda d: f"the {ORDINAL_WORDS[d.day - 1]} of {d:%B} {d.year}",
        lambda d: f"{d:%B} {d.day} {d.year}".upper(),
    ),
    "held_out": (
        lambda d: f"{ordinal(d.day)} of {d:%B}, {d.year}",
        lambda d: f"{d:%B} {d.day} {d.year}",
        lambda d: f"{d:%A}, {d:%B} {ordinal(d.day)}, {d.year}",
        lambda d: f"{d.day}. {d:%B} {d.year}",
        lambda d: f"{d:%Y, %B} {d.day}",
        lambda d: f"{d:%B} the {ORDINAL_WORDS[d.day - 1]}, {d.year}",
    ),
}
"""Ways to write a date. A held-out item uses one of either list, a training item only those for training."""

SENTENCES: dict[Split, tuple[str, ...]] = {
    "training": (
        "{date}",
        "Date: {date}",
        "The meeting is on {date}.",
        "She was born on {date} in Lisbon.",
        "Invoice 4471 was issued on {date}.",
        "We signed the contract on {date}, after two years of talks.",
        "Your parcel will arrive by {date}.",
        "On {date} the bridge was opened to traffic.",
        "The exhibition closes on {date}.",
        "Please answer before {date}.",
        "{date} was the day they met.",
        "My passport expires on {date}. Is that a problem?",
        "When does the course begin? It begins on {date}.",
        "Deliver 40 chairs to Mr Novak by {date}.",
        "Ship 7 boxes of tea to Anna Weber before {date}, please.",
        "The 12 members voted on {date}.",
        "Reserve a table for 6 on {date}.",
        "The letter from Captain Moore is dated {date}.",
        "Since {date}, room 214 has been empty.",
        "He retired on {date} at the age of 65.",
        "The rent of 850 euros is due on {date}.",
        "Our flight BA 117 leaves on {date} at 9:40.",
        "The museum bought the painting on {date} for 3 million dollars.",
        "Can you move my appointment to {date}?",
        "The warranty ends on {date}, so hurry.",
        "It rained all day on {date}.",
        "They were married in Oslo on {date}.",
        "The first issue of the paper appeared on {date}.",
        "From {date} on, tickets cost 15 dollars.",
        "The comet was last seen on {date} by 3 observers.",
        "Minutes of the council, {date}.",
        "The ship left port on {date} with 230 people on board.",
        "I will be away until {date}.",
        "According to the archive, the mill burned down on {date}.",
        "Let's launch version 2 on {date}!",
        "The deadline for applications is {date}.",
        "Chapter 5 ends with the events of {date}.",
        "Order 90 lamps for the hotel; they are needed on {date}.",
    ),
    "held_out": (
        "Please send 12 lanterns to Maria Rossi by {date}.",
        "The treaty came into force on {date}.",
        "Remind me to call the dentist on {date}.",
        "The concert with 80 musicians takes place on {date}.",
        "{date}: the expedition reaches the pole.",
        "Grandmother's diary starts on {date}.",
        "We moved to house number 31 on {date}.",
        "Is the library open on {date}?",
        "Payment of 1200 francs was received on {date}, with thanks.",
        "The satellite was launched on {date} from Kourou.",
        "Nobody remembers what happened on {date}.",
        "The election will be held on {date}, the mayor said.",
        "Your subscription renews on {date} for 9 pounds.",
        "The last tram ran through the old town on {date}.",
    ),
}

DATELESS: dict[Split, tuple[str, ...]] = {
    "training": (
        "The shop sells 12 kinds of tea.",
        "What is the capital of Portugal?",
        "Good morning, how are you?",
        "Please bring 3 chairs to room 14.",
        "My favourite month is spring.",
        "He counted 365 sheep.",
        "The train was late again.",
        "Call me when you can.",
    ),
    "held_out": (
        "The recipe needs 4 eggs and some butter.",
        "Who wrote this song?",
        "Send 20 envelopes to the office.",
        "I think the cat is hungry.",
    ),
}
DATELESS_SHARE = 0.06


def is_held_out(day: datetime.date) -> bool | None:
    """Which split a day may serve: True held-out, False training, None neither.

    Held-out days have both a year and a day of the year that training never sees.
    """
    year, day_of_year = day.year % 5 == 4, (7 * day.day + 3 * day.month) % 5 == 0
    return year if year == day_of_year else None


FIRST, LAST = datetime.date(1900, 1, 1), datetime.date(2059, 12, 31)


def examples(split: Split, count: int, seed: int) -> list[Example]:
    """`count` sentences and their dates. The same split, count and seed give the same list."""
    random = seeded(seed, "dates", split)
    return [example(random, split) for _ in range(count)]


def example(random: Random, split: Split) -> Example:
    if random.random() < DATELESS_SHARE:
        return Example(random.choice(DATELESS[split]), NO_DATE)
    day = some_day(random, split)
    formats = FORMATS["training"] if split == "training" or random.random() < 0.5 else FORMATS["held_out"]
    text = random.choice(SENTENCES[split]).format(date=random.choice(formats)(day))
    return Example(text[0].upper() + text[1:], day.isoformat())


def some_day(random: Random, split: Split) -> datetime.date:
    """A day of this split; half of them lie in 2000 to 2039, where most written dates do."""
    first, last = (FIRST, LAST) if random.random() < 0.5 else (datetime.date(2000, 1, 1), datetime.date(2039, 12, 31))
    while True:
        day = first + datetime.timedelta(days=random.randrange((last - first).days + 1))
        if is_held_out(day) is (split == "held_out"):
            return day


def is_right(example: Example, answer: str) -> bool:
    """Whether the answer is exactly the date wanted and nothing more."""
    return answer.strip() == example.answer
