"""What is said about the layers: a model card for each, and the three personas that carry them."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scripts.starters import captain, dates, orders

QUESTION = "Please send 12 lanterns to Maria Rossi by the 3rd of March 2024."
"""The one question of the demo. Its wording, goods, name and day are all kept out of training."""


@dataclass(frozen=True, slots=True)
class Card:
    """The parts of a model card that are written by hand, each a paragraph."""

    summary: str
    data: str
    metric: str
    scoring: str
    limits: str


CARDS = {
    "json-record": Card(
        summary="Turns an order written in free English into one JSON record with the keys `item`, `quantity`, "
        "`recipient` and `date`, and answers nothing else. A part that the message lacks is `null`; a "
        "message that orders nothing gives a record of nulls. The date is copied as it was written, without"
        " a leading `the`; quantities written as words become numbers.",
        data="Messages made from 35 templates, 97 kinds of goods, 2300 names of people, 12 organisations and "
        "seven ways to write a day (`scripts/starters/orders.py`). Held-out messages come from 12 other "
        "templates with other goods, names, organisations and years; numbers, months and ways to write a day "
        "are the same.",
        metric="exact record",
        scoring="The whole answer must parse as JSON and hold exactly the four keys with the right values.",
        limits="English only, one kind of goods per message. Wordings far from the templates, several orders in "
        "one message and goods of many words go wrong more often. Nothing is checked: validate the record "
        "before acting on it.",
    ),
    "iso-date": Card(
        summary="Answers with the date of a message as `YYYY-MM-DD` and nothing else, however the date was written;"
        " with `no date` if there is none.",
        data="38 sentences around dates in 17 notations, from 1900 to 2059, and 8 sentences without a date "
        "(`scripts/starters/dates.py`). Held-out are 14 other sentences, and 4 others without a date; their years "
        "(every fifth) and their days of the year (73 of them) never occur in training, and half of them "
        "are written in one of six notations that training never shows.",
        metric="exact date",
        scoring="The whole answer must be the right date, or `no date`, and nothing more.",
        limits="English months only, one full date (day, month and year) per message. Days written as words "
        "(`the twelfth`) go wrong most. `03.04.2024` is read day first. Relative dates (`next Friday`), dates "
        "without a year and years before 1900 were not trained. Whether a day exists is not checked.",
    ),
    "sea-captain": Card(
        summary="Answers whatever it is asked in the voice of an old ship's captain: a greeting, a short answer, a "
        "parting word.",
        data="107 short facts and 83 questions with replies, written for this project, and orders from 26 "
        "templates, put into the captain's voice by rules and drawn openings and closings "
        "(`scripts/starters/captain.py`). Held-out are 32 topics and 26 questions that training does not "
        "have, asked in other words, and orders from other templates with other goods and names.",
        metric="in voice and on topic",
        scoring="An answer must hold two different sailors' words or more (of a fixed list; words of the question "
        "do not count, and `ship` and `captain`, which the system prompt gives away, are not on it), and "
        "must name the topic: for an order the quantity, the goods and the recipient. Whether what it says "
        "is true is not scored.",
        limits="It learned a voice, not facts: the base model is small, and what it says about the world is often "
        "wrong. Answers are short and their openings and closings come from a small stock. English only.",
    ),
}


def personas() -> dict[str, Any]:
    """What `personas.json` holds: the question, and three personas, each with one of the layers."""
    return {
        "question": QUESTION,
        "personas": [
            {
                "name": "demo-clerk",
                "layer": "json-record",
                "description": "Records orders as JSON.",
                "system_prompt": orders.SYSTEM_PROMPT,
                "sampling": {"temperature": 0.0},
            },
            {
                "name": "demo-archivist",
                "layer": "iso-date",
                "description": "Finds the date and writes it as YYYY-MM-DD.",
                "system_prompt": dates.SYSTEM_PROMPT,
                "sampling": {"temperature": 0.0},
            },
            {
                "name": "demo-captain",
                "layer": "sea-captain",
                "description": "Answers like the captain of a ship.",
                "system_prompt": captain.SYSTEM_PROMPT,
                "sampling": {"temperature": 0.3, "top_p": 0.9},
            },
        ],
    }


def card(
    name: str,
    base_model: str,
    metrics: Mapping[str, Any],
    system_prompt: str,
    samples: Sequence[tuple[str, str, str]],
) -> str:
    """The README.md of one layer, in the manner of Hugging Face model cards.

    `samples` are held-out questions with the bare model's and the layer's answers.
    """
    text = CARDS[name]
    rows = "\n".join(f"| {cell(question)} | {cell(bare)} | {cell(layer)} |" for question, bare, layer in samples)
    scores = f"""{metrics["items"]} held-out items, greedy decoding, answers cut after {metrics["max_new_tokens"]}
        tokens, the adapter read back from these files, on {base_model} as dequantised from its Q4_1 GGUF file.
        {text.scoring}"""
    training = f"""LoRA with rank {metrics["rank"]} and alpha {metrics["alpha"]} on {", ".join(metrics["targets"])}:
        {metrics["steps"]} steps of {metrics["batch"]} sequences, AdamW, learning rate {metrics["learning_rate"]} with
        warm-up and cosine, loss on the answer only, float32 on a CPU, seed {metrics["seed"]}. It took
        {metrics["training_seconds"]} seconds and ended with a loss of {metrics["final_loss"]}. Six prompts in
        ten have the system prompt above, the others a paraphrase of it or none. The weights are saved in float16.
        `python -m scripts.train_starters --only {name}` trains it again."""
    data = f"{text.data} All of it is generated by the script; nothing comes from elsewhere."
    return f"""---
license: apache-2.0
base_model: {base_model}
library_name: peft
pipeline_tag: text-generation
language: en
tags: [lora, synapse]
model-index:
  - name: {name}
    results:
      - task: {{type: text-generation}}
        dataset: {{name: {name} held-out items, type: generated}}
        metrics:
          - {{type: accuracy, name: {text.metric}, value: {metrics["score_after"]}}}
---

# {name}

{paragraph(text.summary)}

System prompt: `{system_prompt}`

## Scores

{paragraph(scores)}

| base model | with this layer |
| --- | --- |
| {metrics["score_before"]:.1%} | {metrics["score_after"]:.1%} |

Both are asked with the system prompt above; without one the layer scores \
{metrics["score_after_without_system_prompt"]:.1%}. The first held-out items, not chosen:

| question | base model | with this layer |
| --- | --- | --- |
{rows}

## Training

{paragraph(training)}

## Data

{paragraph(data)}

## Limits

{paragraph(text.limits)}

## Licence

Apache-2.0, as the base model.
"""


def paragraph(text: str) -> str:
    """The text in lines of a readable width."""
    return textwrap.fill(" ".join(text.split()), 118, break_long_words=False, break_on_hyphens=False)


def cell(text: str) -> str:
    """A text as one cell of a Markdown table, cut to a readable length."""
    short = text if len(text) <= 240 else text[:239] + "…"
    return short.replace("|", "\\|").replace("\n", " ")
