"""From messages to the prompt that a model was trained on: the chat template in its file, and its tokens.

A template is a program that came with the model, so it runs in Jinja2's immutable sandbox with limits on its size, its
output and its time. What it may use is what transformers' `apply_chat_template` offers, so the text is the same.

Messages come from outside. `encode_chat` makes sure that text in a message never becomes a control token, whatever it
says: only the template writes those.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, TemplateSyntaxError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from synapse.errors import InvalidInput
from synapse.models.gguf_file import ModelFile
from synapse.models.template_guard import (
    FILTERS,
    LARGEST_NUMBER,
    LONGEST_VALUE,
    NO_METHODS,
    Budget,
    Instrument,
    TooMuch,
    budget,
    charged,
    check_call,
    guarded_filter,
    length,
    weight,
)
from synapse.models.tokenizer import Tokenizer

LONGEST_TEMPLATE = 2**18  # characters; the longest published ones have about 2**15
LONGEST_OUTPUT = 2**24  # characters
TIME_LIMIT = 5.0  # seconds
ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")
PRIVATE_USE = range(0xF0000, 0xFFFFE)
NAMED_TOKENS = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}


class ChatTemplateError(InvalidInput):
    """The model has no usable chat template, or the template refuses these messages."""

    code = "chat_template_error"


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation. `role` is one of `ROLES`."""

    role: str
    content: str


@dataclass(frozen=True)
class ChatTemplate:
    """The Jinja2 program that turns messages into a prompt. Safe to use from several threads.

    Attributes:
        source: the program; empty when the model has none.
        tokens: the text of the tokens it may name: ``bos_token``, ``eos_token``, ``unk_token``, ``pad_token``.
    """

    source: str
    tokens: Mapping[str, str] = field(default_factory=dict)

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> str:
        """The prompt as text, with an opening for the assistant's answer if `add_generation_prompt`.

        Raises:
            ChatTemplateError: there is no template, it does not work, it takes too long, or it refuses the messages
                (many insist on alternating roles).
        """
        for message in messages:
            if message.role not in ROLES:
                raise ChatTemplateError(
                    f"there is no role {message.role[:40]!r}", hint=f"the roles are {', '.join(ROLES)}"
                )
        values: dict[str, Any] = {
            "messages": [{"role": message.role, "content": message.content} for message in messages],
            "tools": None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            **self.tokens,
        }
        template = self._compiled
        clock = budget.set(Budget(TIME_LIMIT))
        try:
            return _join(template.generate(values))
        except (ChatTemplateError, SecurityError) as error:
            raise ChatTemplateError(str(error)) from error
        except TemplateError as error:
            raise ChatTemplateError(f"the model's chat template refuses these messages: {str(error)[:300]}") from error
        except Exception as error:  # a template is foreign code: it can raise anything
            reason = f"{type(error).__name__}: {str(error)[:300]}"
            raise ChatTemplateError(f"the model's chat template fails on these messages: {reason}") from error
        finally:
            budget.reset(clock)

    @cached_property
    def _compiled(self) -> Template:
        if not self.source:
            raise ChatTemplateError(
                "this model has no chat template, so it cannot chat", hint="use plain completions, or a chat model"
            )
        if len(self.source) > LONGEST_TEMPLATE:
            raise ChatTemplateError(f"the model's chat template is longer than {LONGEST_TEMPLATE} characters")
        try:
            return _Environment().from_string(self.source)
        except TemplateSyntaxError as error:
            raise ChatTemplateError(
                f"the model's chat template is not valid Jinja2: {str(error)[:300]} (line {error.lineno})"
            ) from error
        except (SyntaxError, RecursionError, MemoryError, ValueError) as error:  # nested deeper than Python can compile
            raise ChatTemplateError(f"the model's chat template cannot be compiled: {str(error)[:300]}") from error


def load_chat_template(file: ModelFile) -> ChatTemplate:
    """The chat template of a model; one without a template gets one that raises when it is used."""
    source = file.metadata.get("tokenizer.chat_template")
    vocabulary = file.metadata.get("tokenizer.ggml.tokens")
    tokens = {}
    for name, key in NAMED_TOKENS.items():
        token = file.metadata.get(f"tokenizer.ggml.{key}")
        if isinstance(vocabulary, list) and isinstance(token, int) and 0 <= token < len(vocabulary):
            tokens[name] = vocabulary[token]
    return ChatTemplate(source if isinstance(source, str) else "", tokens)


def encode_chat(
    tokenizer: Tokenizer, template: ChatTemplate, messages: Sequence[Message], add_generation_prompt: bool = True
) -> list[int]:
    """The prompt as token ids, the same as transformers' ``apply_chat_template(tokenize=True)``, with one difference:
    a control token's text inside a message stays text.

    To tell the two apart after rendering, a control token's text in a message is disguised: its first character is
    replaced by a private-use one that no message and no template contains. What then still reads as a control token
    was written by the template; the disguise comes off before the rest is encoded.

    Raises:
        ChatTemplateError: see `ChatTemplate.render`.
        InvalidInput: see `Tokenizer.encode`.
    """
    special = sorted(tokenizer.special_tokens, key=len, reverse=True)
    if not special:
        return tokenizer.encode(template.render(messages, add_generation_prompt=add_generation_prompt))
    disguise = _stand_ins(set().union(*special), [template.source, *(message.content for message in messages)])
    disguised = [Message(message.role, _disguise(message.content, special, disguise)) for message in messages]
    prompt = template.render(disguised, add_generation_prompt=add_generation_prompt)
    undo = {ord(stand_in): character for character, stand_in in disguise.items()}
    ids: list[int] = []
    for i, piece in enumerate(re.split(f"({'|'.join(map(re.escape, special))})", prompt)):
        if i % 2:
            ids.append(tokenizer.special_tokens[piece])
        elif piece:
            ids += tokenizer.encode(piece.translate(undo), special=False)
    return ids


def _stand_ins(characters: set[str], texts: Sequence[str]) -> dict[str, str]:
    """For each character one that occurs in none of the texts."""
    used = set().union(*texts)
    free = (chr(code) for code in PRIVATE_USE if chr(code) not in used)
    stand_ins = dict(zip(sorted(characters), free, strict=False))
    if len(stand_ins) < len(characters):
        raise ChatTemplateError("the messages use too many of Unicode's private characters")
    return stand_ins


def _disguise(content: str, special: Sequence[str], disguise: Mapping[str, str]) -> str:
    """The content with a stand-in for the first character of everything that reads as a control token, or that could
    become one together with the template's text before or after it."""
    pattern = "|".join(re.escape(token) for token in special)
    # A lookahead, so that tokens which overlap are each found.
    content = re.sub(f"(?={pattern})(.)", lambda found: disguise[found[1]], content, flags=re.DOTALL)
    # Templates often trim, so what touches the template's own text can be the first and the last visible character.
    begin, end = len(content) - len(content.lstrip()), len(content.rstrip())
    heads = {token[:size] for token in special for size in range(1, len(token))}
    tails = {token[size:] for token in special for size in range(1, len(token))}
    sizes = range(1, min(len(special[0]), end - begin + 1))
    starts = {end - size for size in sizes if content[end - size : end] in heads}
    starts |= {begin for size in sizes if content[begin : begin + size] in tails}
    for start in starts:
        content = content[:start] + disguise[content[start]] + content[start + 1 :]
    return content


def _join(pieces: Iterable[str]) -> str:
    parts, length = [], 0
    for piece in pieces:
        parts.append(piece)
        length += len(piece)
        if length > LONGEST_OUTPUT:
            raise ChatTemplateError(f"the prompt is longer than {LONGEST_OUTPUT} characters")
        budget.get().check_time()
    return "".join(parts)


class _Environment(ImmutableSandboxedEnvironment):
    """What transformers gives a template, and nothing that multiplies without bound."""

    intercepted_binops = frozenset(("+", "-", "*", "**", "%", "/", "//"))

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, loopcontrols],
            finalize=_finalize,
            optimized=False,  # constants are not folded while compiling, where no budget counts
        )
        self.filters["tojson"] = _to_json
        self.filters = {name: guarded_filter(name, self.filters[name]) for name in FILTERS}
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now
        self.globals.pop("lipsum", None)
        self.charged = charged

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree: nodes.Template = Instrument().visit(super()._parse(source, name, filename))
        return tree

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        return not (isinstance(obj, str) and attr in NO_METHODS) and super().is_safe_attribute(obj, attr, value)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        sizes = [weight(value) if hasattr(value, "__len__") else abs(value) for value in (left, right)]
        if operator in ("*", "**") and max(sizes) > LARGEST_NUMBER:
            raise TooMuch(f"the model's chat template computes with more than {LARGEST_NUMBER}")
        if operator == "*" and hasattr(left, "__len__") != hasattr(right, "__len__"):
            budget.get().charge(int(sizes[0] * sizes[1]))
        elif operator == "+":
            budget.get().charge(
                int(sum(size for size, value in zip(sizes, (left, right), strict=True) if hasattr(value, "__len__")))
            )
        elif operator == "%" and isinstance(left, str):
            raise SecurityError("the model's chat template formats with %, which is not supported")
        return charged(super().call_binop(context, operator, left, right))

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        if obj in (self.tick, self.charged, self.concat, self.passed, self.sliced):
            return obj(*args)
        check_call(obj if getattr(obj, "__name__", "") != "range" else None, args, kwargs)
        result = super().call(context, obj, *args, **kwargs)
        budget.get().charge(length(result))
        return result

    def wrap_str_format(self, value: Any) -> Any:
        if getattr(value, "__name__", "") in ("format", "format_map") and isinstance(
            getattr(value, "__self__", None), str
        ):
            raise SecurityError("the model's chat template uses str.format, which is not supported")
        return None

    def sliced(self, value: Any) -> Any:
        """After a slice."""
        budget.get().charge(length(value))
        return value

    def tick(self) -> None:
        """At the start of each round of a loop."""
        budget.get().charge(1)

    def passed(self, value: Any) -> Any:
        """After a comparison."""
        budget.get().charge(1)
        return value

    def concat(self, *parts: Any) -> str:
        """The operator ``~``."""
        budget.get().charge(sum(map(weight, parts)))
        return "".join(map(str, parts))


def _finalize(value: Any) -> Any:
    """Before a value is printed."""
    if not isinstance(value, str) and weight(value) > LONGEST_VALUE:
        raise TooMuch(f"the model's chat template prints more than {LONGEST_VALUE} characters at once")
    return value


class _Generation(Extension):
    """``{% generation %}…{% endgeneration %}`` marks an assistant's text for training; it changes no text."""

    tags = {"generation"}  # noqa: RUF012 (as inherited)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as it is: Jinja2's own filter escapes it for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)
