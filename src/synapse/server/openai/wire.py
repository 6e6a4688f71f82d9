"""The bodies of OpenAI's requests, checked strictly.

Source: https://platform.openai.com/docs/api-reference/chat/create and …/completions/create. A field that OpenAI knows
and this server does not honour is refused when it would change the answer, and accepted when it would not; a field
that nobody knows is refused, because it is most often a misspelt one. `top_k`, `min_p` and `repetition_penalty` are
extensions under the names that other servers of open models use.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from synapse.callosum.message import Tract
from synapse.engines.request import Grammar
from synapse.server.http.errors import BadField, UnsupportedField

MAX_CHOICES = 8
MAX_STOPS = 16
MAX_PROMPTS = 64
SEED_RANGE = 2**63

INERT_VALUES: tuple[object, ...] = (None, False, [], {}, "none")
"""Values with which an unsupported field asks for nothing."""

BoundedSeed = Annotated[int, Field(ge=-SEED_RANGE, lt=SEED_RANGE)]
StopString = Annotated[str, Field(min_length=1, max_length=1024)]
Tokens = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(fail_fast=True)]


class StreamOptions(BaseModel):
    """What a stream tells beside the text."""

    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool = Field(False, description="send one more chunk with the token counts at the end")
    include_obfuscation: bool = Field(False, description="accepted and ignored")


class GenerationBody(BaseModel):
    """What chat completions and completions have in common."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    refused: ClassVar[Mapping[str, str]] = {}
    """Fields that are not supported, and why or what to use instead."""

    model: str = Field(description="name of a persona or of a pulled model", min_length=1, max_length=256)
    max_tokens: int | None = Field(None, ge=1, description="at most so many new tokens")
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, description="keep the k most likely tokens; 0 or -1 keeps all (extension)")
    min_p: float | None = Field(None, ge=0, le=1, description="least share of the top probability (extension)")
    repetition_penalty: float | None = Field(None, gt=0, le=10, description="1 is off (extension)")
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: Mapping[str, Annotated[float, Field(ge=-100, le=100)]] | None = Field(None, max_length=1024)
    seed: BoundedSeed | None = Field(None, description="same seed, same text; choice i uses seed + i")
    stop: StopString | Annotated[list[StopString], Field(fail_fast=True, max_length=MAX_STOPS)] | None = None
    n: int | None = Field(None, ge=1, le=MAX_CHOICES, description="answers to generate for a prompt")
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    user: Any = Field(None, description="accepted and ignored")
    metadata: Any = Field(None, description="accepted and ignored")
    store: Any = Field(None, description="accepted and ignored")
    service_tier: Any = Field(None, description="flex: nobody waits for the answer, so others go first; else ignored")
    safety_identifier: Any = Field(None, description="accepted and ignored")
    prompt_cache_key: Any = Field(None, description="accepted and ignored: prefixes are always shared")
    prompt_cache_retention: Any = Field(None, description="accepted and ignored")
    prompt_cache_options: Any = Field(None, description="accepted and ignored")

    @model_validator(mode="before")
    @classmethod
    def _without_refused(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        for name, reason in cls.refused.items():
            if name in body and body[name] not in INERT_VALUES:
                raise UnsupportedField(f"{name} is not supported: {reason}", hint="leave it out", param=name)
        return {name: value for name, value in body.items() if name not in cls.refused}

    @field_validator("logit_bias")
    @classmethod
    def _token_ids(cls, bias: Mapping[str, float] | None) -> Mapping[str, float] | None:
        for token in bias or {}:
            if not (token.isascii() and token.isdecimal() and len(token) < 10):
                raise PydanticCustomError("token_id", "the keys are token ids, written as decimal numbers")
        return bias

    @model_validator(mode="after")
    def _options_of_a_stream(self) -> GenerationBody:
        if self.stream_options is not None and not self.stream:
            raise BadField("stream_options is only for a stream", hint="set stream to true", param="stream_options")
        return self

    @property
    def choices(self) -> int:
        """Answers for each prompt."""
        return self.n or 1

    @property
    def tract(self) -> Tract:
        """Who waits for the answer: with the service tier `flex`, for batches and evaluations, nobody does."""
        return Tract.INTERNAL if self.service_tier == "flex" else Tract.EXTERNAL

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the token counts."""
        return self.stream_options is not None and self.stream_options.include_usage

    def sampling_overrides(self) -> dict[str, Any]:
        """The sampling settings that the client chose, under the names of `engines.request.Sampling`."""
        names = ("temperature", "top_p", "min_p", "repetition_penalty", "frequency_penalty", "presence_penalty", "seed")
        chosen = {name: value for name in names if (value := getattr(self, name)) is not None}
        if self.top_k is not None:
            chosen["top_k"] = max(self.top_k, 0)
        if self.logit_bias:
            chosen["logit_bias"] = {int(token): bias for token, bias in self.logit_bias.items()}
        return chosen


def _only_text(kind: str) -> str:
    if kind != "text":
        raise PydanticCustomError("part", "only parts of type 'text' can be read, not images, audio or files")
    return kind


class TextPart(BaseModel):
    """A part of a message."""

    model_config = ConfigDict(extra="ignore", strict=True)

    type: Annotated[str, AfterValidator(_only_text)]
    text: str


class ChatMessage(BaseModel):
    """A message of a chat. `developer` is the newer name of `system`."""

    model_config = ConfigDict(extra="forbid", strict=True)

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(fail_fast=True, max_length=256)]
    name: str | None = Field(None, description="accepted and ignored")
    refusal: None = None
    annotations: Any = Field(None, description="accepted and ignored")

    @model_validator(mode="before")
    @classmethod
    def _without_tools(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        refused = ("tool_calls", "function_call", "audio", "tool_call_id")
        for name in refused:
            if body.get(name) not in INERT_VALUES:
                raise UnsupportedField(f"{name} in a message is not supported", hint="leave it out", param="messages")
        if body.get("role") in ("tool", "function"):
            raise UnsupportedField(f"messages of role {body['role']} are not supported", param="messages")
        return {name: value for name, value in body.items() if name not in refused}

    @property
    def text(self) -> str:
        """The content; text parts are joined without a separator."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class JsonSchema(BaseModel):
    """A named JSON schema; answers always follow it strictly, whatever `strict` says."""

    model_config = ConfigDict(extra="forbid", strict=True, populate_by_name=True, serialize_by_alias=True)

    name: str = Field(min_length=1, max_length=64)
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(BaseModel):
    """The form of the answer: plain text, any JSON object, or JSON that fits a schema."""

    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _schema_when_needed(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            wrong = "is missing" if self.json_schema is None else f"means nothing with type {self.type!r}"
            raise BadField(f"response_format.json_schema {wrong}", param="response_format.json_schema")
        return self

    def grammar(self) -> Grammar | None:
        """The constraint for the engine."""
        if self.type == "text":
            return None
        if self.json_schema is None:
            return Grammar("json_object")
        return Grammar("json_schema", json.dumps(self.json_schema.schema_))


class ChatBody(GenerationBody):
    """`POST /v1/chat/completions`."""

    refused: ClassVar[Mapping[str, str]] = {
        "tools": "personas do not call tools here",
        "tool_choice": "personas do not call tools here",
        "functions": "personas do not call functions here",
        "function_call": "personas do not call functions here",
        "audio": "answers are text",
        "modalities": "answers are text",
        "web_search_options": "personas do not search the web here",
        "reasoning_effort": "these models have no such setting",
        "verbosity": "these models have no such setting; use max_tokens",
        "moderation": "there is no moderation service",
    }

    messages: Annotated[list[ChatMessage], Field(fail_fast=True, min_length=1, max_length=2048)]
    max_completion_tokens: int | None = Field(None, ge=1, description="the newer name of max_tokens")
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    response_format: ResponseFormat | None = None
    parallel_tool_calls: Any = Field(None, description="accepted and ignored: there are no tools")
    prediction: Any = Field(None, description="accepted and ignored: it only speeds up")

    @model_validator(mode="before")
    @classmethod
    def _text_modality(cls, body: Any) -> Any:
        if isinstance(body, dict) and body.get("modalities") == ["text"]:
            return {name: value for name, value in body.items() if name != "modalities"}
        return body

    @model_validator(mode="after")
    def _consistent(self) -> ChatBody:
        if self.top_logprobs is not None and not self.logprobs:
            raise BadField("top_logprobs needs logprobs", hint="set logprobs to true", param="top_logprobs")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise BadField(
                "max_tokens and max_completion_tokens differ", hint="send one of them", param="max_completion_tokens"
            )
        return self

    @property
    def token_limit(self) -> int | None:
        """At most so many new tokens."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def alternatives(self) -> int | None:
        """How many alternatives to report beside each token, or None for no logprobs."""
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionBody(GenerationBody):
    """`POST /v1/completions`: the model goes on from the prompt as it is, without a chat template."""

    refused: ClassVar[Mapping[str, str]] = {
        "echo": "put the prompt in front of the answer yourself",
        "suffix": "these models do not fill in the middle",
    }

    prompt: (
        str
        | Annotated[list[str], Field(fail_fast=True, min_length=1, max_length=MAX_PROMPTS)]
        | Annotated[Tokens, Field(min_length=1)]
        | Annotated[
            list[Annotated[Tokens, Field(min_length=1)]], Field(fail_fast=True, min_length=1, max_length=MAX_PROMPTS)
        ]
    )
    logprobs: int | None = Field(None, ge=0, le=5, description="alternatives to report beside each token")
    best_of: int | None = Field(None, ge=1, le=MAX_CHOICES, description="only accepted when it equals n")

    @model_validator(mode="after")
    def _no_choosing(self) -> CompletionBody:
        if self.best_of not in (None, self.choices):
            raise UnsupportedField("best_of other than n is not supported", hint="leave it out", param="best_of")
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, one or many, each as text or as token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        return [self.prompt] if isinstance(self.prompt[0], int) else list(self.prompt)
