"""`synapse chat`: one answer for a script, or a conversation at a prompt."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Mapping
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel, Field

from synapse.callosum.publish.recording import recording
from synapse.cli.chat.session import ChatSession
from synapse.cli.logs import log_to_stderr
from synapse.cli.progress import TerminalProgress
from synapse.cli.text import left_out_notice, read_stdin, style_of, tell, tell_engine, write_answer
from synapse.commands import Context, Progress
from synapse.config import load_settings
from synapse.daemon.host import open_models
from synapse.engines import EngineClient
from synapse.errors import InvalidInput, TooLarge
from synapse.models.library import open_library
from synapse.personas.base_model import ensure_base_model
from synapse.personas.chat import TextDelta, TurnOptions
from synapse.personas.conversations import conversation_of, latest_conversation, new_conversation
from synapse.personas.entities import MAX_MESSAGE_LENGTH, Conversation, Persona
from synapse.personas.lookup import find_persona_or_model, is_bare_model
from synapse.personas.talking import TurnStarted, say, say_unkept
from synapse.store import open_store


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """What `synapse chat` was asked for.

    Attributes:
        message: what to say, or None to read it from standard input or from a prompt.
        resume: go on with the persona's latest conversation.
        conversation_id: go on with this conversation.
        sampling: settings of `SamplingDefaults` that were given, by name.
    """

    persona: str
    message: str | None = None
    resume: bool = False
    conversation_id: str | None = None
    sampling: Mapping[str, Any] = field(default_factory=dict)
    as_json: bool = False


class ChatAnswer(BaseModel):
    """What `synapse chat --json` prints."""

    persona: str
    conversation_id: str | None = Field(description="none when a bare model has answered")
    content: str
    finish_reason: str = Field(description="stop, or length when max_tokens or the context ended the answer")
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    tokens_per_second: float
    left_out_messages: int = Field(description="older messages that did not fit the context")


def run_chat(request: ChatRequest) -> None:
    """Answer the message that was given or piped in, or start the prompt.

    Raises:
        SynapseError: whatever stands in the way of an answer.
    """
    log_to_stderr()
    message = _given_message(request)
    if message is not None:
        asyncio.run(_one_answer(request, message))
        return
    if request.as_json:
        raise InvalidInput("--json needs a message", hint='give one with -m "…", or pipe it in')
    # The loop only runs while there is something to wait for: at the prompt the main thread reads the keyboard, and
    # Ctrl-C is Python's own. During an answer `Runner` turns Ctrl-C into a cancellation of that answer.
    with asyncio.Runner() as runner, TerminalProgress() as progress:
        open_now = AsyncExitStack()
        try:
            context = runner.run(open_now.enter_async_context(Context(load_settings())))
            events = runner.run(open_now.enter_async_context(recording(context)))
            persona, conversation = runner.run(_opened(context, request))
            client = runner.run(_warm_up(context, persona, progress))  # stays open: at the prompt no timer runs
            progress.close()
            ChatSession(runner, context, events, persona, conversation, sampling=request.sampling).run()
            client.close()
        finally:
            runner.run(open_now.aclose())


def _given_message(request: ChatRequest) -> str | None:
    """The message from `-m`, from a pipe, or both, the piped text last; None when a person sits at the terminal."""
    piped = "" if sys.stdin.isatty() else read_stdin(4 * MAX_MESSAGE_LENGTH + 1)
    if len(piped) > MAX_MESSAGE_LENGTH:
        raise TooLarge(f"standard input has more than {MAX_MESSAGE_LENGTH} characters, which is the limit")
    if request.message is None and sys.stdin.isatty():
        return None
    return "\n\n".join(part for part in (request.message or "", piped.strip("\n")) if part)


async def _opened(context: Context, request: ChatRequest) -> tuple[Persona, Conversation | None]:
    store = await context.get(open_store)
    library = await context.get(open_library)
    persona = await find_persona_or_model(store, library, context.settings.default_model, request.persona)
    persona.sampling.with_overrides(request.sampling)  # refused now rather than after the first message
    if is_bare_model(persona):
        if request.resume or request.conversation_id is not None:
            raise InvalidInput(
                f"{persona.name} is a model: conversations are kept for personas only",
                hint=f"make one of it: synapse persona create NAME --model {persona.name}",
            )
        return persona, None
    if request.conversation_id is not None:
        return persona, await conversation_of(store, persona, request.conversation_id)
    return persona, await latest_conversation(store, persona) if request.resume else None


async def _warm_up(context: Context, persona: Persona, progress: Progress) -> EngineClient:
    """Load the model before the first message is typed, so that the first answer is as quick as the others."""
    await ensure_base_model(context, persona.base_model, tell, progress)
    style = style_of(sys.stderr)
    shown = sys.stderr.isatty()
    if shown:
        print(style.dim(f"loading {persona.base_model} …"), end="", file=sys.stderr, flush=True)
    client = await (await context.get(open_models)).get(persona.base_model)
    if shown:
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)
    tell_engine((await client.stats()).answering, context.settings.backend)
    return client


async def _one_answer(request: ChatRequest, message: str) -> None:
    with TerminalProgress(quiet=request.as_json) as progress:
        async with Context(load_settings()) as context, recording(context):
            persona, conversation = await _opened(context, request)
            await ensure_base_model(context, persona.base_model, None if request.as_json else tell, progress)
            progress.close()
            if not message.strip():
                raise InvalidInput("the message is empty", hint='give one with -m "…", or pipe it in')
            if conversation is None and not is_bare_model(persona):
                conversation = new_conversation(persona, message)
            await _answer(context, request, persona, conversation, message)


async def _answer(
    context: Context, request: ChatRequest, persona: Persona, conversation: Conversation | None, message: str
) -> None:
    pieces: list[str] = []
    left_out = 0
    options = TurnOptions(sampling=request.sampling)
    answering = (
        say_unkept(context, persona, [], message, options)
        if conversation is None
        else say(context, persona, conversation, message, options)
    )
    async with aclosing(answering) as events:
        async for event in events:
            if isinstance(event, TurnStarted):
                left_out = event.left_out
                if not request.as_json:
                    client = await (await context.get(open_models)).get(persona.base_model)
                    tell_engine((await client.stats()).answering, context.settings.backend)
                if left_out and not request.as_json:
                    tell(left_out_notice(left_out))
            elif isinstance(event, TextDelta):
                pieces.append(event.text)
                if not request.as_json:
                    write_answer(event.text)
            elif request.as_json:
                answer = ChatAnswer(
                    persona=persona.name,
                    conversation_id=conversation.id if conversation else None,
                    content="".join(pieces),
                    finish_reason=event.reason,
                    prompt_tokens=event.prompt_tokens,
                    cached_tokens=event.cached_tokens,
                    completion_tokens=event.completion_tokens,
                    tokens_per_second=round(event.tokens_per_second, 2),
                    left_out_messages=left_out,
                )
                print(answer.model_dump_json(indent=2))
            else:
                write_answer("" if pieces and pieces[-1].endswith("\n") else "\n")
