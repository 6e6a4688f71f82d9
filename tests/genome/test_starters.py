"""The layers that ship with the package: what is in their folders, and that each does its job for real."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from scripts.starters import captain, captain_lines, cards, dates, orders
from scripts.starters.example import Example
from support.engine_runs import run
from synapse.engines import Engine, Limits, Request, Sampling
from synapse.models.adapters.adapter import read_adapter
from synapse.models.chat_template import Message, encode_chat

STARTERS = Path(str(files("synapse.genome") / "starters"))
NAMES = ("json-record", "iso-date", "sea-captain")
BASE_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
MAX_RANK, MAX_BYTES = 16, 4_000_000

each_starter = pytest.mark.parametrize("name", NAMES)
each_task = pytest.mark.parametrize("task", [orders, dates, captain], ids=NAMES)


def read_json(path: Path) -> dict[str, Any]:
    loaded = json.loads(path.read_text())
    assert isinstance(loaded, dict)
    return loaded


def test_the_package_ships_exactly_these_layers() -> None:
    assert sorted(path.name for path in STARTERS.iterdir() if path.is_dir()) == sorted(NAMES)


@each_starter
def test_a_starter_is_small_and_holds_nothing_but_its_four_files(name: str) -> None:
    folder = STARTERS / name
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "metrics.json",
    ]
    assert sum(path.stat().st_size for path in folder.iterdir()) <= MAX_BYTES


@each_starter
def test_a_starter_passes_the_checks_that_every_layer_must_pass(name: str) -> None:
    layer = read_adapter(STARTERS / name, None)
    assert layer.rank <= MAX_RANK
    assert layer.base_model == BASE_MODEL
    assert len(layer.factors) == 30 * len(layer.targets)
    assert all(factors.B.any() for factors in layer.factors.values()), "an untrained layer has zeros in B"


@each_starter
def test_the_weights_are_float16_and_the_config_names_no_local_path(name: str) -> None:
    with safe_open(STARTERS / name / "adapter_model.safetensors", framework="np") as weights:
        assert {weights.get_slice(key).get_dtype() for key in weights.keys()} == {"F16"}  # noqa: SIM118
    config = read_json(STARTERS / name / "adapter_config.json")
    assert config["base_model_name_or_path"] == BASE_MODEL
    assert config["inference_mode"] is True
    assert "/home" not in json.dumps(config) and "/tmp" not in json.dumps(config)  # noqa: S108


@each_starter
def test_training_improved_the_score_on_held_out_items(name: str) -> None:
    metrics = read_json(STARTERS / name / "metrics.json")
    assert metrics["items"] >= 60
    assert metrics["score_after"] >= 0.8
    assert metrics["score_after"] >= metrics["score_before"] + 0.4
    assert metrics["score_after_without_system_prompt"] > metrics["score_before"]


@each_starter
def test_the_card_says_the_same_as_the_metrics_and_the_config(name: str) -> None:
    text = (STARTERS / name / "README.md").read_text()
    metrics = read_json(STARTERS / name / "metrics.json")
    config = read_json(STARTERS / name / "adapter_config.json")
    assert text.startswith("---\nlicense: apache-2.0\nbase_model: " + BASE_MODEL)
    assert f"| {metrics['score_before']:.1%} | {metrics['score_after']:.1%} |" in text
    assert (config["r"], config["lora_alpha"]) == (metrics["rank"], metrics["alpha"])
    assert set(config["target_modules"]) == set(metrics["targets"])
    for heading in ("## Scores", "## Training", "## Data", "## Limits", "## Licence"):
        assert heading in text


def test_the_three_layers_differ_in_rank_and_in_targets() -> None:
    layers = [read_adapter(STARTERS / name, None) for name in NAMES]
    assert len({layer.rank for layer in layers}) == 3
    assert len({tuple(sorted(layer.targets)) for layer in layers}) == 3


def test_each_persona_carries_one_layer_and_the_prompt_it_was_trained_with() -> None:
    shipped = read_json(STARTERS / "personas.json")
    assert shipped == cards.personas()
    assert {persona["layer"] for persona in shipped["personas"]} == set(NAMES)
    assert {persona["layer"]: persona["system_prompt"] for persona in shipped["personas"]} == {
        "json-record": orders.SYSTEM_PROMPT,
        "iso-date": dates.SYSTEM_PROMPT,
        "sea-captain": captain.SYSTEM_PROMPT,
    }


@each_task
def test_the_data_is_the_same_in_every_run_and_right_by_its_own_score(task: Any) -> None:
    drawn = task.examples("training", 500, 7)
    assert drawn == task.examples("training", 500, 7)
    assert drawn != task.examples("training", 500, 8)
    assert len({example.question for example in drawn}) > 250
    assert all(task.is_right(example, example.answer) for example in drawn)
    assert not any(task.is_right(example, "I am a helpful assistant.") for example in drawn)


def test_held_out_orders_share_no_template_and_no_name_with_training() -> None:
    training, held_out = orders.TRAINING, orders.HELD_OUT
    for pool in ("templates", "items", "first_names", "last_names", "organisations", "years", "chatter"):
        assert not set(getattr(training, pool)) & set(getattr(held_out, pool)), pool


def test_held_out_dates_share_no_sentence_no_year_and_no_day_of_the_year_with_training() -> None:
    for pool in (dates.SENTENCES, dates.DATELESS, dates.FORMATS):
        assert not set(pool["training"]) & set(pool["held_out"])
    training = [e.answer for e in dates.examples("training", 3000, 1) if e.answer != dates.NO_DATE]
    held_out = [e.answer for e in dates.examples("held_out", 3000, 1) if e.answer != dates.NO_DATE]
    assert not {day[:4] for day in training} & {day[:4] for day in held_out}
    assert not {day[5:] for day in training} & {day[5:] for day in held_out}


def test_held_out_questions_to_the_captain_are_about_things_training_never_asks() -> None:
    asked = " ".join(
        [*(topic for topic, _ in captain_lines.FACTS), *(question for question, _ in captain_lines.REPLIES)]
    )
    known = set(re.findall("[a-z]+", asked.lower()))
    held_out = {captain.topic_word(topic) for topic in captain_lines.HELD_OUT_TOPICS}
    held_out |= {word for _, key in captain_lines.HELD_OUT_QUESTIONS for word in key}
    assert not held_out & known
    assert not set(captain_lines.FACT_QUESTIONS["training"]) & set(captain_lines.FACT_QUESTIONS["held_out"])


def test_the_demo_question_is_made_of_nothing_that_training_shows() -> None:
    for task in (orders, dates, captain):
        seen = " ".join(example.question for example in task.examples("training", 2000, 20))
        assert not re.search(r"Please send|lanterns|Maria|Rossi|the 3rd of March 2024", seen)


def test_a_captain_is_not_scored_for_the_words_of_the_question() -> None:
    asked = Example("Does the tide turn at sea?", "", ("tide",))
    assert not captain.is_right(asked, "The tide turns at sea.")
    assert captain.is_right(asked, "Aye, matey, the tide turns.")
    assert not captain.is_right(asked, "Aye, matey, it turns.")


@pytest.fixture(scope="module")
def engine(open_default: Callable[[Limits], Engine]) -> Engine:
    return open_default(Limits(max_context=512))


def answers(engine: Engine, system: str, questions: list[str], tokens: int, layer: str | None) -> list[str]:
    """Greedy answers; one that does not end within so many tokens is cut there."""
    layers = ((engine.load_layer(STARTERS / layer), 1.0),) if layer else ()
    prompts = [
        encode_chat(engine.tokenizer, engine.chat_template, [Message("system", system), Message("user", question)])
        for question in questions
    ]
    greedy = Sampling(temperature=0)
    given = run(engine, *(Request(tuple(prompt), layers, greedy, max_tokens=tokens) for prompt in prompts))
    return [answer.text.strip() for answer in given]


@pytest.mark.slow
@each_starter
def test_a_starter_does_its_job_where_the_bare_model_does_not(engine: Engine, name: str) -> None:
    from scripts.train_starters import STARTER_LAYERS

    starter = next(starter for starter in STARTER_LAYERS if starter.name == name)
    items = starter.examples("held_out", 4, 1234)  # another seed than that of the score: other items of the same kind
    questions = [item.question for item in items]

    def right(layer: str | None) -> int:
        given = answers(engine, starter.system_prompt, questions, starter.max_new_tokens, layer)
        return sum(starter.is_right(item, answer) for item, answer in zip(items, given, strict=True))

    assert right(name) >= 3 > right(None) + 1


@pytest.mark.slow
def test_the_three_personas_answer_the_demo_question_each_in_its_own_way(engine: Engine) -> None:
    replies = {
        persona["name"]: answers(engine, persona["system_prompt"], [cards.QUESTION], 72, persona["layer"])[0]
        for persona in cards.personas()["personas"]
    }
    assert json.loads(replies["demo-clerk"]) == {
        "item": "lanterns",
        "quantity": 12,
        "recipient": "Maria Rossi",
        "date": "3rd of March 2024",
    }
    assert replies["demo-archivist"] == "2024-03-03"
    asked = Example(cards.QUESTION, "", ("12", "lanterns", "rossi"))
    assert captain.is_right(asked, replies["demo-captain"])
