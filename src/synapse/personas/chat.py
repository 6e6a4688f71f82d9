"""One turn of a chat: from a persona and its messages to the events of an answer.

The terminal and the server both come through here. `prepare_turn` gathers everything that can be refused, so that a
caller knows before the first word whether there will be an answer; `run_turn` streams it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from synapse.callosum.message import Tract
from synapse.commands import Context
from synapse.daemon.host import open_models
from synapse.engines import (
    Delta,
    EngineClient,
    Event,
    Finished,
    FinishReason,
    Grammar,
    LayersOverflow,
    Request,
)
from synapse.models.chat_template import Message as ChatMessage
from synapse.personas.entities import Persona
from synapse.personas.events import TurnNews
from synapse.personas.history import alternating, with_system_prompt
from synapse.personas.layers import named, persona_stack


@dataclass(frozen=True, slots=True)
class Turn:
    """An answer that can be generated.

    Attributes:
        client: of the engine, which stays open until the client is closed or dropped; `run_turn` closes it.
        request: what the engine is asked; change it with `dataclasses.replace` for other seeds of the same prompt.
        news: publishes how the turn ends; `run_turn` tells it, and whoever runs the request without that.
        left_out: messages that were too old to fit the context.
    """

    context: Context
    client: EngineClient
    request: Request
    news: TurnNews
    left_out: int = 0

    async def events(self) -> AsyncGenerator[Event]:
        """The engine's events. Closing the iterator cancels the request within a step.

        Raises:
            as `EngineClient.generate`.
        """
        async with aclosing(self.client.generate(self.request)) as events:
            try:
                async for event in events:
                    yield event
            except LayersOverflow as error:
                raise await named(self.context, error) from error


@dataclass(frozen=True, slots=True)
class TextDelta:
    """More of the answer's text."""

    text: str


@dataclass(frozen=True, slots=True)
class TurnFinished:
    """The end of an answer. `seconds` run from asking the engine; the rate counts the answer's tokens over them."""

    reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        return self.completion_tokens / self.seconds if self.seconds > 0 else 0.0


ChatEvent = TextDelta | TurnFinished


@dataclass(frozen=True, slots=True)
class TurnOptions:
    """What one turn does differently from its persona's defaults.

    Attributes:
        sampling: settings of `SamplingDefaults` by name, and their values.
        trim: leave the oldest turns out when the history is too long, instead of refusing it.
        stack: the layers' sha256 and weights to use in place of the persona's genome.
        conversation: the id of the conversation it is part of, for what is published about it.
        tract: internal when nobody waits for the answer; it gives way to those that somebody waits for.
    """

    sampling: Mapping[str, Any] = field(default_factory=dict)
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    grammar: Grammar | None = None
    trim: bool = True
    stack: tuple[tuple[str, float], ...] | None = None
    conversation: str | None = None
    tract: Tract = Tract.EXTERNAL


async def prepare_turn(
    context: Context, persona: Persona, messages: Sequence[ChatMessage], options: TurnOptions | None = None
) -> Turn:
    """Everything before the first token: model, layers, prompt.

    Args:
        messages: the conversation so far, the newest message last; without the persona's own system prompt.

    Raises:
        NotFound: the base model is not pulled, or a layer of the genome is gone.
        ContextOverflow: not even the last message alone fits the context (without `trim` the engine checks, later).
        InvalidInput: a sampling setting is out of range, or a message has a role the template does not know.
        LayerRefused, Corrupt: a layer's files cannot be used.
    """
    options = options or TurnOptions()
    news = TurnNews(persona, options.conversation)
    try:
        return await _prepared(context, persona, messages, options, news)
    except Exception as error:
        news.failed(error)
        raise
    except BaseException:
        news.cancelled()
        raise


async def _prepared(
    context: Context, persona: Persona, messages: Sequence[ChatMessage], options: TurnOptions, news: TurnNews
) -> Turn:
    settings = persona.sampling.with_overrides(options.sampling)
    client = await (await context.get(open_models)).get(persona.base_model)
    stack = options.stack if options.stack is not None else await persona_stack(context, persona)
    for sha256, _ in stack:
        await client.load_layer(sha256)
    whole = with_system_prompt(persona.system_prompt, alternating(messages))
    max_tokens = settings.max_tokens
    left_out = 0
    if options.trim:
        prompt, left_out = await asyncio.to_thread(client.front.fit_chat, whole)
        if max_tokens is not None:
            max_tokens = min(max_tokens, client.front.context - len(prompt))
    else:
        prompt = await asyncio.to_thread(client.front.encode_chat, whole)
    request = Request(
        prompt=tuple(prompt),
        layers=stack,
        sampling=settings.to_sampling(options.logit_bias),
        max_tokens=max_tokens,
        stop=options.stop,
        logprobs=options.logprobs,
        grammar=options.grammar,
        tract=options.tract,
    )
    return Turn(context, client, request, news, left_out)


async def run_turn(turn: Turn) -> AsyncGenerator[ChatEvent]:
    """The answer as text. The last event is `TurnFinished`; closing the iterator cancels the request.

    Raises:
        as `EngineClient.generate`.
    """
    started = time.perf_counter()
    try:
        async with aclosing(turn.events()) as events:
            async for event in events:
                if isinstance(event, Delta):
                    if event.text:
                        yield TextDelta(event.text)
                else:
                    turn.news.finished(
                        event.reason,
                        prompt_tokens=event.prompt_tokens,
                        tokens=event.completion_tokens,
                        cached_tokens=event.cached_tokens,
                    )
                    yield _finished(event, time.perf_counter() - started)
    except Exception as error:
        turn.news.failed(error)
        raise
    finally:
        turn.news.cancelled()  # unless something else was told
        turn.client.close()


def _finished(event: Finished, seconds: float) -> TurnFinished:
    return TurnFinished(event.reason, event.prompt_tokens, event.completion_tokens, event.cached_tokens, seconds)


async def chat(
    context: Context, persona: Persona, messages: Sequence[ChatMessage], options: TurnOptions | None = None
) -> AsyncGenerator[ChatEvent]:
    """Prepare a turn and run it. Raises what `prepare_turn` and `run_turn` raise."""
    async with aclosing(run_turn(await prepare_turn(context, persona, messages, options))) as events:
        async for event in events:
            yield event
