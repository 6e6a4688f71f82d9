"""What a layer's model card (README.md, as on the Hugging Face hub) says about it."""

from __future__ import annotations

import re
from dataclasses import dataclass

CARD_FILE = "README.md"
MAX_CARD_BYTES = 2**20
SUMMARY_LENGTH = 240
FRONT_MATTER = re.compile(r"\A---\r?\n(.*?)\r?\n---\r?\n", re.DOTALL)
LICENCE = re.compile(r"^license:[ \t]*[\"']?([\w.+-]{1,64})[\"']?[ \t]*$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Card:
    """The first sentences and the licence; empty where the card does not say."""

    summary: str
    license: str


def parse_card(data: bytes) -> Card:
    """Read a card. Whatever it holds, it is only text: what cannot be read is left out."""
    text = data.decode("utf-8", errors="replace").replace("\x00", "")
    front = FRONT_MATTER.match(text)
    licence = LICENCE.search(front[1]) if front else None
    body = text[front.end() :] if front else text
    paragraphs = (" ".join(block.split()) for block in re.split(r"\n\s*\n", body))
    prose = (block for block in paragraphs if block and block[0] not in "#<!|-[`>")
    summary = next(prose, "")
    if len(summary) > SUMMARY_LENGTH:
        summary = summary[: SUMMARY_LENGTH - 1].rstrip() + "…"
    return Card(summary=summary, license=licence[1] if licence else "")
