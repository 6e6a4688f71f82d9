"""`synapse demo`: three personas with three different layers answer one question, in one batch, before your eyes."""

from __future__ import annotations

import asyncio
import resource
import sys
import time
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pydantic import BaseModel, Field

from synapse.callosum.publish.recording import recording
from synapse.cli.logs import log_to_stderr
from synapse.cli.output import human_bytes
from synapse.cli.progress import TerminalProgress
from synapse.cli.text import printable, style_of, tell, tell_engine
from synapse.commands import Context
from synapse.config import load_settings
from synapse.daemon.host import open_models
from synapse.models.chat_template import Message as ChatMessage
from synapse.personas.base_model import ensure_base_model
from synapse.personas.chat import TextDelta, Turn, TurnFinished, TurnOptions, prepare_turn, run_turn
from synapse.personas.entities import Persona
from synapse.personas.starters import ensure_starter, load_starters

if TYPE_CHECKING:
    from rich.console import RenderableType

ANSWER_TOKENS = 96
NARROWEST_COLUMN = 26
FRAMES_PER_SECOND = 12


@dataclass(slots=True)
class Answering:
    """One persona's answer while it grows."""

    persona: Persona
    layers: str
    text: str = ""
    tokens: int = 0
    finished: TurnFinished | None = None
    started: float = field(default_factory=time.perf_counter)


class DemoAnswer(BaseModel):
    persona: str
    layers: str
    content: str
    completion_tokens: int
    tokens_per_second: float


class DemoResult(BaseModel):
    """What `synapse demo --json` prints."""

    question: str
    answers: list[DemoAnswer]
    completion_tokens: int
    seconds: float
    tokens_per_second: float = Field(description="over all answers together")
    model_steps: int = Field(description="passes through the model that all answers together took")
    peak_rss_bytes: int = Field(description="most memory this process has held")


def run_demo(*, as_json: bool) -> None:
    """Fetch the model, make the personas, ask, show.

    Raises:
        SynapseError: the model cannot be fetched, or something on the way fails.
    """
    log_to_stderr()
    result = asyncio.run(_demo(as_json))
    if as_json:
        print(result.model_dump_json(indent=2))
    else:
        _show_numbers(result)


async def _demo(as_json: bool) -> DemoResult:
    starters = load_starters()
    with TerminalProgress(quiet=as_json) as progress:
        async with Context(load_settings()) as context, recording(context):
            model = context.settings.default_model
            await ensure_base_model(context, model, None if as_json else tell, progress)
            progress.close()
            if not as_json:
                tell(f"loading {model} and making {len(starters.personas)} personas …")
            personas = [await ensure_starter(context, starter) for starter in starters.personas]
            options = TurnOptions(sampling={"max_tokens": ANSWER_TOKENS})
            question = [ChatMessage("user", starters.question)]
            turns = [await prepare_turn(context, persona, question, options) for persona in personas]
            answers = [
                Answering(persona, starter.layer) for persona, starter in zip(personas, starters.personas, strict=True)
            ]
            client = await (await context.get(open_models)).get(model)
            before = await client.stats()
            if not as_json:
                tell_engine(before.answering, context.settings.backend)
            started = time.perf_counter()
            await _answer_all(starters.question, list(zip(answers, turns, strict=True)), as_json)
            seconds = time.perf_counter() - started
            steps = (await client.stats()).counters.steps - before.counters.steps
            return _result(starters.question, answers, seconds, steps)


async def _answer_all(question: str, asked: Sequence[tuple[Answering, Turn]], as_json: bool) -> None:
    if as_json:
        await asyncio.gather(*(_answer(*each) for each in asked))
    elif sys.stdout.isatty():
        print(f"{style_of(sys.stdout).bold('you>')} {question}\n")
        await _answer_live(asked)
    else:
        print(f"you> {question}", flush=True)
        await asyncio.gather(*(_answer_section(*each) for each in asked))


async def _answer(answering: Answering, turn: Turn) -> None:
    answering.started = time.perf_counter()
    async with aclosing(run_turn(turn)) as events:
        async for event in events:
            if isinstance(event, TextDelta):
                answering.text += event.text
                answering.tokens += 1
            else:
                answering.finished = event
                answering.tokens = event.completion_tokens


async def _answer_section(answering: Answering, turn: Turn) -> None:
    """Answer, then print the whole answer under its persona's name: for logs and pipes."""
    await _answer(answering, turn)
    assert answering.finished is not None  # noqa: S101 (the last event of every turn)
    rate = f"{answering.finished.tokens_per_second:.1f} tokens/s"
    print(f"\n{answering.persona.name} ({answering.layers}, {rate})\n{answering.text.strip()}", flush=True)


async def _answer_live(asked: Sequence[tuple[Answering, Turn]]) -> None:
    """Draw the answers side by side while they grow, and leave the whole of them on the screen."""
    from rich.console import Console
    from rich.live import Live

    console = Console()
    answers = [answering for answering, _ in asked]
    with Live(console=console, auto_refresh=False, transient=True) as live:

        async def draw() -> None:
            while True:
                live.update(_columns(answers, console.width), refresh=True)
                await asyncio.sleep(1 / FRAMES_PER_SECOND)

        drawing = asyncio.create_task(draw())
        try:
            async with asyncio.TaskGroup() as group:
                for answering, turn in asked:
                    group.create_task(_answer(answering, turn))
        finally:
            drawing.cancel()
            await asyncio.gather(drawing, return_exceptions=True)
    console.print(_columns(answers, console.width))


def _columns(answers: Sequence[Answering], width: int) -> RenderableType:
    from rich.console import Group
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    panels = [
        Panel(
            Text(printable(each.text.strip()) or "…"),
            title=f"[bold]{each.persona.name}[/]",
            subtitle=f"[dim]{_rate(each)}[/]",
            border_style="cyan" if each.finished is None else "green",
        )
        for each in answers
    ]
    if width < NARROWEST_COLUMN * len(panels):
        return Group(*panels)
    grid = Table.grid(expand=True)
    for _ in panels:
        grid.add_column(ratio=1)
    grid.add_row(*panels)
    return grid


def _rate(answering: Answering) -> str:
    if answering.finished is not None:
        return f"{answering.tokens} tokens · {answering.finished.tokens_per_second:.1f}/s"
    seconds = time.perf_counter() - answering.started
    return f"{answering.layers} · {answering.tokens / seconds:.1f}/s" if answering.tokens else answering.layers


def _result(question: str, answers: Sequence[Answering], seconds: float, steps: int) -> DemoResult:
    tokens = sum(each.tokens for each in answers)
    return DemoResult(
        question=question,
        answers=[
            DemoAnswer(
                persona=each.persona.name,
                layers=each.layers,
                content=each.text,
                completion_tokens=each.tokens,
                tokens_per_second=round(each.finished.tokens_per_second, 2) if each.finished else 0.0,
            )
            for each in answers
        ],
        completion_tokens=tokens,
        seconds=round(seconds, 3),
        tokens_per_second=round(tokens / seconds, 2),
        model_steps=steps,
        peak_rss_bytes=peak_rss(),
    )


def peak_rss() -> int:
    """The most memory this process has held, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _show_numbers(result: DemoResult) -> None:
    style = style_of(sys.stdout)
    width = max(len(each.persona) for each in result.answers)
    print()
    for each in result.answers:
        print(f"{each.persona:<{width}}  {each.completion_tokens:>4} tokens  {each.tokens_per_second:>6.1f} tokens/s")
    together = f"{result.completion_tokens:>4} tokens  {result.tokens_per_second:>6.1f} tokens/s"
    print(style.bold(f"{'in all':<{width}}  {together}  in {result.seconds:.1f} s"))
    print(
        f"{result.model_steps} steps of one shared model for {result.completion_tokens} tokens and "
        f"{len(result.answers)} prompts; "
        f"memory at most {human_bytes(result.peak_rss_bytes)}"
    )
    print(style.dim(f"go on with: synapse chat {result.answers[0].persona}"))
