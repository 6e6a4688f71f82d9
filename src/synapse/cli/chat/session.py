"""A conversation at the prompt: messages, answers as they come, and a few commands that begin with a slash."""

from __future__ import annotations

import asyncio
import difflib
import json
import re
import sys
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from typing import Any

from synapse.callosum.publish.outbox import Outbox
from synapse.cli.chat.line_editor import LineEditor
from synapse.cli.problems import problem_of, show_problem
from synapse.cli.text import left_out_notice, printable, style_of, tell, write_answer
from synapse.commands import Context
from synapse.errors import InvalidInput, SynapseError
from synapse.models.chat_template import Message as ChatMessage
from synapse.personas.chat import ChatEvent, TextDelta, TurnFinished, TurnOptions
from synapse.personas.conversations import messages_of, new_conversation
from synapse.personas.entities import Conversation, Persona
from synapse.personas.lookup import is_bare_model
from synapse.personas.talking import TurnStarted, as_chat, say, say_unkept
from synapse.store import open_store

COMMAND = re.compile(r"/[a-z]+(?=\s|$)")
PROMPT = "you> "
EVENTS_SECONDS = 1.0
"""Longest wait, after an answer, for its event to be recorded; later there is another chance."""


class ChatSession:
    """The conversation of one person with one persona, until the person leaves."""

    def __init__(
        self,
        runner: asyncio.Runner,
        context: Context,
        events: Outbox,
        persona: Persona,
        conversation: Conversation | None,
        *,
        sampling: Mapping[str, Any],
    ) -> None:
        self._runner = runner
        self._context = context
        self._events = events
        self._persona = persona
        self._conversation = conversation
        self._said: list[ChatMessage] = []  # to a bare model, of which no conversation is kept
        self._sampling = dict(sampling)
        self._told_left_out = False
        self._editor = LineEditor(context.settings.folder("") / "chat_history")
        self._commands: dict[str, tuple[str, Callable[[str], None]]] = {
            "/help": ("show this", self._help),
            "/new": ("start a new conversation", self._new),
            "/history": ("show this conversation so far", self._history),
            "/system": ("show the system prompt, or set it for this session: /system TEXT", self._system),
            "/set": ("show the sampling settings, or change one: /set temperature=0.2", self._set),
            "/exit": ("leave (Ctrl-D does too)", self._exit),
        }
        self._leaving = False

    def run(self) -> None:
        """Until `/exit` or Ctrl-D. Ctrl-C at the prompt gives up the line, as in a shell."""
        self._greet()
        try:
            while not self._leaving:
                try:
                    line = self._editor.read(PROMPT)
                except KeyboardInterrupt:
                    print(file=sys.stderr)
                    tell("Ctrl-D leaves")
                    continue
                except EOFError:
                    print(file=sys.stderr)
                    break
                self._take(line)
        finally:
            self._editor.save()

    def _take(self, line: str) -> None:
        if not line.strip():
            return
        try:
            if COMMAND.match(line):
                self._command(line)
            else:
                self._runner.run(self._answer(line))
        except SynapseError as error:
            show_problem(problem_of(error), as_json=False)
        except KeyboardInterrupt:  # a second Ctrl-C, while the first was still stopping the answer
            print(file=sys.stderr)

    async def _answer(self, message: str) -> None:
        """Say it and show the answer. Ctrl-C cancels this task: the answer stops, what came of it is kept."""
        options = TurnOptions(sampling=self._sampling)
        text = ""
        try:
            async with aclosing(await self._saying(message, options)) as events:
                async for event in events:
                    if isinstance(event, TurnStarted):
                        self._notice_left_out(event.left_out)
                    elif isinstance(event, TextDelta):
                        text += event.text
                        write_answer(event.text)
                    else:
                        write_answer("" if text.endswith("\n") else "\n")
                        tell(_status(event))
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None:
                task.uncancel()
            write_answer("\n")
            tell("stopped")
        await self._events.settled(EVENTS_SECONDS)  # at the prompt the loop stands still

    async def _saying(self, message: str, options: TurnOptions) -> AsyncGenerator[TurnStarted | ChatEvent]:
        if is_bare_model(self._persona):
            return say_unkept(self._context, self._persona, self._said, message, options)
        if self._conversation is None:
            self._conversation = new_conversation(self._persona, message)
        return say(self._context, self._persona, self._conversation, message, options)

    def _notice_left_out(self, left_out: int) -> None:
        if left_out and not self._told_left_out:
            self._told_left_out = True
            tell(left_out_notice(left_out))

    def _greet(self) -> None:
        style = style_of(sys.stderr)
        about = f" - {self._persona.description}" if self._persona.description else ""
        print(f"{style.bold(self._persona.name)}{printable(about)}", file=sys.stderr)
        tell(f"{self._persona.base_model}; /help lists the commands, Ctrl-D leaves")
        if self._conversation is not None:
            tell(f"going on with “{self._conversation.title}” (/history shows it)")

    # Slash commands

    def _command(self, line: str) -> None:
        name, _, rest = line.partition(" ")
        if name not in self._commands:
            near = difflib.get_close_matches(name, self._commands, n=1)
            hint = f"did you mean {near[0]}?" if near else f"the commands are {', '.join(self._commands)}"
            raise InvalidInput(f"there is no command {name}", hint=hint)
        self._commands[name][1](rest.strip())

    def _help(self, _: str) -> None:
        style = style_of(sys.stdout)
        for name, (summary, _action) in self._commands.items():
            print(f"{style.cyan(name)}{' ' * (10 - len(name))}{summary}")
        print(f"{style.cyan(chr(34) * 3)}{' ' * 7}begins and ends a message of several lines")
        print(f"{style.cyan('Ctrl-C')}{' ' * 4}stops an answer, or gives up the line")

    def _new(self, _: str) -> None:
        self._conversation = None
        self._said = []
        self._told_left_out = False
        tell("a new conversation begins with your next message")

    def _history(self, _: str) -> None:
        said = self._said if self._conversation is None else self._runner.run(self._messages(self._conversation))
        if not said:
            tell("nothing has been said yet")
        style = style_of(sys.stdout)
        for message in said:
            name = self._persona.name if message.role == "assistant" else "you"
            print(f"{style.bold(name + '>')} {printable(message.content)}")

    async def _messages(self, conversation: Conversation) -> list[ChatMessage]:
        return as_chat(await messages_of(await self._context.get(open_store), conversation.id))

    def _system(self, text: str) -> None:
        if text:
            self._persona = self._persona.model_copy(update={"system_prompt": text})
            keep = f"; to keep it: synapse persona edit {self._persona.name} --system-prompt …"
            tell(f"set for this session{'' if is_bare_model(self._persona) else keep}")
        else:
            print(printable(self._persona.system_prompt) or "there is no system prompt")

    def _set(self, text: str) -> None:
        if text:
            name, separator, value = text.replace(" ", "").partition("=")
            if not separator:
                raise InvalidInput(f"/set takes NAME=VALUE, not {text!r}", hint="for example /set temperature=0.2")
            changed = {**self._sampling, name: None if value == "none" else value}
            settings = self._persona.sampling.with_overrides(changed)
            self._sampling = {key: getattr(settings, key) for key in changed}
        for name, value in self._persona.sampling.with_overrides(self._sampling).model_dump().items():
            mark = " (this session)" if name in self._sampling else ""
            print(f"{name} = {json.dumps(value)}{mark}")

    def _exit(self, _: str) -> None:
        self._leaving = True


def _status(end: TurnFinished) -> str:
    """The line after an answer: its length and speed, and why it ended when that is worth knowing."""
    why = {"length": " · reached its longest length", "cancelled": " · stopped"}.get(end.reason, "")
    return f"{end.completion_tokens} tokens · {end.tokens_per_second:.1f} tokens/s{why}"
