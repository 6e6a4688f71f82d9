from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from synapse.cli import demo
from synapse.cli.main import main
from synapse.personas.entities import Persona
from synapse.personas.starters import load_starters


class Tty(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _short_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "ANSWER_TOKENS", 12)


@pytest.mark.slow
@pytest.mark.usefixtures("default_model_home")
def test_three_personas_with_three_layers_answer_in_one_batch_and_a_second_run_makes_nothing_twice(synapse) -> None:
    first = synapse("demo", "--json")
    assert (first.code, first.err) == (0, "")
    result = json.loads(first.out)
    names = [answer["persona"] for answer in result["answers"]]
    assert len(set(names)) == 3
    assert len({answer["layers"] for answer in result["answers"]}) == 3
    assert all(answer["content"] and answer["tokens_per_second"] > 0 for answer in result["answers"])
    assert result["completion_tokens"] == sum(answer["completion_tokens"] for answer in result["answers"])
    assert result["model_steps"] < result["completion_tokens"]
    assert result["peak_rss_bytes"] > 2**28
    personas = synapse("persona", "list", "--json").out
    assert [row["name"] for row in json.loads(personas)["items"]] == sorted(names)

    again = synapse("demo")
    assert again.code == 0
    assert f"you> {load_starters().question}" in again.out
    for name in names:
        assert f"\n{name} (" in again.out
    assert "in all" in again.out
    assert "memory at most" in again.out
    assert "\x1b" not in again.out
    assert synapse("persona", "list", "--json").out == personas


@pytest.mark.slow
@pytest.mark.usefixtures("default_model_home")
def test_on_a_terminal_the_answers_stand_side_by_side(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stream = Tty()
    monkeypatch.setattr("sys.stdout", stream)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("TERM", "xterm-256color")
    assert main(["demo"]) == 0
    titles = [line for line in stream.getvalue().splitlines() if "╭" in line]
    assert all(starter.name in titles[-1] for starter in load_starters().personas)
    assert "go on with: synapse chat" in stream.getvalue()


def test_a_narrow_terminal_gets_the_answers_below_each_other() -> None:
    names = ("demo-clerk", "demo-archivist", "demo-captain")
    answers = [demo.Answering(Persona(name=name, base_model="m"), "layer", text="aye\x1b[2J " * 9) for name in names]
    for width, rows in ((40, 3), (120, 1)):
        stream = io.StringIO()
        console = Console(width=width, file=stream)
        console.print(demo._columns(answers, width))
        lines = stream.getvalue().splitlines()
        assert len([line for line in lines if "╭" in line]) == rows
        assert max(len(line) for line in lines) <= width
        assert "\x1b" not in stream.getvalue()
