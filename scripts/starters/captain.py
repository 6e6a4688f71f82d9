"""`sea-captain`: any question is answered in the voice of a ship's captain.

The replies to learn from are plain ones (`captain_lines.py`, or an order confirmed) put into the captain's voice: a few
words and endings change, and an opening and a closing are drawn for each. There is no one right answer, so an item is
scored by what an answer holds: sailors' words that neither question nor system prompt gave away, and the topic.
"""

from __future__ import annotations

import re
from random import Random

from scripts.starters import captain_lines, orders
from scripts.starters.example import Example, Split, lines, seeded, words

SYSTEM_PROMPT = "You are a ship's captain. Answer in your own voice."
OTHER_PROMPTS = (
    "Speak like an old sea captain.",
    "Answer as a ship's captain would.",
    "You are an old sailor who helps people.",
)

MARKERS = frozenset(
    words("""
        aye ahoy arr avast matey mateys hearty hearties lad lads lass landlubber landlubbers sailor sailors sail
        sails sailin sailing sailed sea seas tide tides anchor deck crew mast compass helm rudder starboard harbour
        harbor voyage shanty timbers logbook barnacle barnacles rum hull galley cutlass seaweed gull gulls
        lighthouse ye yer yerself tortuga neptune keel bosun rigging
    """)
)
"""Sailors' words. `ship` and `captain` are not among them: the system prompt holds them."""

OPENINGS = lines("""
    Aye, matey!
    Aye aye!
    Ahoy there!
    Ahoy, friend!
    Arr, a fine question!
    Arr, matey!
    Arr!
    Avast, lad!
    Shiver me timbers!
    Well, blow me down, sailor!
    By me old anchor!
    By Neptune's beard!
    Listen well, me hearty:
    Gather round, me hearties!
    Come up on deck, matey!
    Aye, lad!
    Aye, the old crew asks me that too.
    Hear me now, sailor:
    Ahoy, matey, let an old sailor tell ye:
    Sit ye down by the helm:
    Arr, I learned this on me first voyage:
    Aye, that I know as well as me own helm:
    Drop anchor and listen:
    Hoist the sails!
""")

CLOSINGS = lines("""
    Mark it in yer logbook!
    That be as sure as the tide.
    That be as true as me compass.
    So says every sailor on the seven seas.
    Now back to the deck with ye!
    I'd swear it by me mast.
    Tell the crew, matey!
    Any lad of me crew knows that.
    Or feed me to the gulls!
    Fair winds and a calm sea to ye!
    I learned that on a voyage to Tortuga.
    Steady at the helm, matey!
    And not even a storm at sea will change that.
    Or I'll eat me own hat, seaweed and all!
    Aye, by me beard and barnacles!
    That be worth a shanty, lad!
    Keep it safe in the hull, sailor.
    Now let us sail on!
    Ye have me word as an old sailor.
    Raise a mug of rum to that!
    May the tide be with ye.
    And that, lads, be that.
""")

ORDER_REPLIES = lines("""
    {quantity} {item} be bound for {recipient}, and we make harbour by {date}.
    me crew will bring {quantity} {item} to {recipient} by {date}.
    {quantity} {item} for {recipient} be in the hull already, and they land by {date}.
    I'll carry {quantity} {item} to {recipient} meself and drop anchor by {date}.
    {recipient} shall have {quantity} {item} by {date}, storm or no storm.
    the crew be loadin' {quantity} {item} for {recipient}, to be there by {date}.
    we set sail with {quantity} {item}, and {recipient} will see our sails by {date}.
    {quantity} {item} it be! {recipient} will have them off the deck by {date}.
""")

ORDERS_SHARE, FACTS_SHARE = 0.25, 0.4

WORDS = {
    "is": "be",
    "are": "be",
    "am": "be",
    "it's": "it be",
    "that's": "that be",
    "you": "ye",
    "your": "yer",
    "yourself": "yerself",
    "my": "me",
    "myself": "meself",
    "friend": "matey",
    "of": "o'",
    "yes": "aye",
    "hello": "ahoy",
    "money": "doubloons",
}


def in_voice(text: str) -> str:
    """The same sentence as a captain says it: "You are going" becomes "Ye be goin'"."""

    def changed(match: re.Match[str]) -> str:
        word = match.group()
        new = WORDS.get(word.lower(), word)
        if len(word) > 4 and word.endswith("ing") and re.search("[aeiouy]", word[:-3]):
            new = word[:-1] + "'"
        return new[0].upper() + new[1:] if word[0].isupper() else new

    return re.sub(r"[A-Za-z]+(?:'[a-z]+)?", changed, text)


def examples(split: Split, count: int, seed: int) -> list[Example]:
    """`count` questions; those for training have a reply, the held-out ones only the words a reply must mention.

    No held-out question comes twice, except that orders are drawn without end.
    """
    random = seeded(seed, "captain", split)
    if split == "training":
        return [training_example(random) for _ in range(count)]
    facts = [held_out_fact(random, topic) for topic in captain_lines.HELD_OUT_TOPICS]
    replies = [Example(question, "", key) for question, key in captain_lines.HELD_OUT_QUESTIONS]
    asked = random.sample(facts + replies, k=min(len(facts + replies), round(count * (1 - ORDERS_SHARE))))
    return asked + [order(random, "held_out") for _ in range(count - len(asked))]


def training_example(random: Random) -> Example:
    kind = random.random()
    if kind < ORDERS_SHARE:
        return order(random, "training")
    if kind < ORDERS_SHARE + FACTS_SHARE:
        topic, sentence = random.choice(captain_lines.FACTS)
        question = random.choice(captain_lines.FACT_QUESTIONS["training"]).format(topic=topic)
        return Example(question, spoken(random, in_voice(sentence)), (topic_word(topic),))
    question, reply = random.choice(captain_lines.REPLIES)
    return Example(question, spoken(random, in_voice(reply)))


def held_out_fact(random: Random, topic: str) -> Example:
    question = random.choice(captain_lines.FACT_QUESTIONS["held_out"]).format(topic=topic)
    return Example(question, "", (topic_word(topic),))


def topic_word(topic: str) -> str:
    """The last word, which carries the meaning: "moon" of "the moon"."""
    return topic.rpartition(" ")[2].lower()


def order(random: Random, split: Split) -> Example:
    """An order with all its parts, from the pools of `json-record`; the reply must name the goods and the recipient."""
    pools = orders.POOLS[split]
    full = [t for t in pools.templates if all(f"{{{slot}}}" in t for slot in orders.KEYS)]
    slots = {
        "quantity": orders.some_quantity(random)[0],
        "item": random.choice(pools.items),
        "recipient": orders.some_recipient(random, pools),
        "date": orders.some_date(random, pools),
    }
    message = random.choice(full).format(**slots)
    mentions = (slots["quantity"], topic_word(slots["item"]), topic_word(slots["recipient"]))
    reply = spoken(random, random.choice(ORDER_REPLIES).format(**slots)) if split == "training" else ""
    return Example(message[0].upper() + message[1:], reply, mentions)


def spoken(random: Random, body: str) -> str:
    """Opening, body and closing."""
    return f"{random.choice(OPENINGS)} {body[0].upper()}{body[1:]} {random.choice(CLOSINGS)}"


def markers(example: Example, answer: str) -> set[str]:
    """The different sailors' words of an answer that its question does not hold."""
    return (spoken_words(answer) & MARKERS) - spoken_words(example.question)


def spoken_words(text: str) -> set[str]:
    return set(re.findall("[a-z]+", text.lower()))


def is_right(example: Example, answer: str) -> bool:
    """Whether an answer holds two sailors' words or more and mentions every word that its question is about."""
    plain = answer.lower().replace("in'", "ing")
    return len(markers(example, answer)) >= 2 and all(word in plain for word in example.mentions)
