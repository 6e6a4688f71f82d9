"""Answers in OpenAI's shapes: whole objects, and the chunks of a stream.

Source: https://platform.openai.com/docs/api-reference/chat/object, …/chat/streaming and …/completions/object.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import synapse
from synapse.engines.request import Delta, Finished, TokenLogprob
from synapse.models.tokenizer import Tokenizer
from synapse.server.http.event_stream import DONE, JSON, data_event
from synapse.server.openai.generation import Answer, Generation, count_usage
from synapse.server.openai.logprobs import chat_logprobs, completion_logprobs, length_of, told_tokens

FINGERPRINT = f"synapse-{synapse.__version__}"


@dataclass(frozen=True, slots=True)
class Frame:
    """What all chunks of an answer have in common."""

    model: str
    id: str
    created: int = field(default_factory=lambda: int(time.time()))

    def as_wire(self, kind: str, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        """One object of the API."""
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": FINGERPRINT,
            "choices": choices,
            **more,
        }


def chat_frame(model: str) -> Frame:
    """The frame of a new chat answer."""
    return Frame(model, f"chatcmpl-{uuid.uuid4().hex}")


def completion_frame(model: str) -> Frame:
    """The frame of a new completion."""
    return Frame(model, f"cmpl-{uuid.uuid4().hex}")


class Shape(Protocol):
    """How one API writes choices."""

    @property
    def whole(self) -> str: ...
    @property
    def part(self) -> str: ...
    def choice(self, index: int, answer: Answer) -> dict[str, Any]: ...
    def opening(self, index: int) -> dict[str, Any] | None: ...
    def chunk(self, index: int, delta: Delta) -> dict[str, Any] | None: ...
    def closing(self, index: int, finished: Finished) -> dict[str, Any]: ...


class ChatShape:
    """Choices of chat completions."""

    whole = "chat.completion"
    part = "chat.completion.chunk"

    def __init__(self, tokenizer: Tokenizer, *, logprobs: bool) -> None:
        self._tokenizer = tokenizer
        self._logprobs = logprobs

    def choice(self, index: int, answer: Answer) -> dict[str, Any]:
        return {
            "index": index,
            "message": {"role": "assistant", "content": answer.text, "refusal": None},
            "logprobs": self._told(told_tokens(answer.deltas, self._tokenizer)),
            "finish_reason": answer.finished.reason,
        }

    def opening(self, index: int) -> dict[str, Any]:
        return self._part(index, {"role": "assistant", "content": "", "refusal": None}, None)

    def chunk(self, index: int, delta: Delta) -> dict[str, Any] | None:
        entries = told_tokens([delta], self._tokenizer)
        if not delta.text and not entries:
            return None
        return self._part(index, {"content": delta.text}, self._told(entries))

    def closing(self, index: int, finished: Finished) -> dict[str, Any]:
        return {**self._part(index, {}, None), "finish_reason": finished.reason}

    def _told(self, entries: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        return chat_logprobs(entries, self._tokenizer) if self._logprobs else None

    def _part(self, index: int, delta: dict[str, Any], logprobs: dict[str, Any] | None) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": None}


class CompletionShape:
    """Choices of completions, whole and in parts alike."""

    whole = part = "text_completion"

    def __init__(self, tokenizer: Tokenizer, *, logprobs: bool, count: int) -> None:
        self._tokenizer = tokenizer
        self._logprobs = logprobs
        self._offsets = [0] * count
        """Where in each answer its next token begins, in characters."""

    def choice(self, index: int, answer: Answer) -> dict[str, Any]:
        return self._part(index, answer.text, told_tokens(answer.deltas, self._tokenizer), answer.finished.reason)

    def opening(self, index: int) -> None:
        return None

    def chunk(self, index: int, delta: Delta) -> dict[str, Any] | None:
        entries = told_tokens([delta], self._tokenizer)
        if not delta.text and not entries:
            return None
        return self._part(index, delta.text, entries, None)

    def closing(self, index: int, finished: Finished) -> dict[str, Any]:
        return {"index": index, "text": "", "logprobs": None, "finish_reason": finished.reason}

    def _part(self, index: int, text: str, entries: Sequence[TokenLogprob], reason: str | None) -> dict[str, Any]:
        logprobs = None
        if self._logprobs:
            logprobs = completion_logprobs(entries, self._tokenizer, self._offsets[index])
            self._offsets[index] += length_of(entries, self._tokenizer)
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}


def whole_answer(frame: Frame, shape: Shape, answers: Sequence[Answer], choices: int) -> dict[str, Any]:
    """The response when it is not streamed. `choices` answers belong to each prompt."""
    usage = count_usage([answer.finished for answer in answers], choices)
    written = [shape.choice(index, answer) for index, answer in enumerate(answers)]
    return frame.as_wire(shape.whole, written, usage=usage.as_wire())


class TextChunk:
    """A chunk that only brings text, which is nearly every one: all but the text is written once for the stream."""

    MARK = "\x00text\x00"

    def __init__(self, frame: Frame, shape: Shape, index: int, more: dict[str, Any]) -> None:
        whole = data_event(frame.as_wire(shape.part, [shape.chunk(index, Delta("", self.MARK, ())) or {}], **more))
        self._before, _, self._after = whole.partition(JSON.encode(self.MARK).encode())

    def event(self, text: str) -> bytes:
        """The chunk as an event."""
        return self._before + JSON.encode(text).encode() + self._after


async def chunks(
    frame: Frame, shape: Shape, events: Generation, *, count: int, choices: int, include_usage: bool
) -> AsyncGenerator[bytes, None]:
    """A stream of `count` answers as server-sent events, `[DONE]` being the last.

    With `include_usage`, one more chunk, without choices, counts the tokens.

    Raises:
        SynapseError: as `Generation` does.
    """
    more: dict[str, Any] = {"usage": None} if include_usage else {}
    for index in range(count):
        if (opening := shape.opening(index)) is not None:
            yield data_event(frame.as_wire(shape.part, [opening], **more))
    texts = [TextChunk(frame, shape, index, more) for index in range(count)]
    ends: dict[int, Finished] = {}
    async for index, event in events:
        if isinstance(event, Finished):
            ends[index] = event
            yield data_event(frame.as_wire(shape.part, [shape.closing(index, event)], **more))
        elif not event.logprobs:
            if event.text:
                yield texts[index].event(event.text)
        elif (written := shape.chunk(index, event)) is not None:
            yield data_event(frame.as_wire(shape.part, [written], **more))
    if include_usage:
        usage = count_usage([ends[index] for index in range(count)], choices)
        yield data_event(frame.as_wire(shape.part, [], usage=usage.as_wire()))
    yield DONE
