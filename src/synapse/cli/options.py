"""From the fields of a command's pydantic model to arguments and options of the terminal, and back to the model.

Typer only splits the command line; every value reaches pydantic as the text that was typed, so that a value is
checked in one place and an error names the option, what was expected and what was found. Fields whose value has a
structure (models, dictionaries, lists of them) are given as JSON text, as `@FILE`, or as `-` for standard input.
"""

from __future__ import annotations

import enum
import inspect
import json
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from pydantic import AliasChoices, BaseModel, ValidationError
from pydantic.fields import FieldInfo

from synapse.cli.text import read_stdin
from synapse.commands import Argument
from synapse.errors import InvalidInput

Kind = Literal["text", "flag", "json"]

SCALARS: dict[type, str] = {str: "text", int: "int", float: "float", Path: "path"}
BOUNDS = (("ge", "at least"), ("gt", "above"), ("le", "at most"), ("lt", "below"))
LARGEST_SHOWN_BOUND = 10**9
SHOWN_ERRORS = 3


@dataclass(frozen=True, slots=True)
class Form:
    """How one field is typed: as text, as a flag or as JSON, once or repeated."""

    kind: Kind
    metavar: str
    repeated: bool = False
    choices: tuple[str, ...] = ()


def form_of(annotation: Any) -> Form:  # noqa: PLR0911 (one answer for each type)
    """The form of a field with this annotation. What has no plain text form is JSON."""
    annotation = _without_wrapping(annotation)
    origin = get_origin(annotation)
    if annotation is bool:
        return Form("flag", "")
    if origin in (list, tuple, set, frozenset):
        args = [a for a in get_args(annotation) if a is not Ellipsis]
        inner = form_of(args[0]) if len(args) == 1 else None
        if inner is not None and inner.kind == "text" and not inner.repeated:
            return Form("text", inner.metavar, True, inner.choices)
        return Form("json", "json")
    if origin is Literal:
        return _choice(get_args(annotation))
    if isinstance(annotation, type) and annotation is not Any:
        if issubclass(annotation, enum.Enum):
            return _choice([member.value for member in annotation])
        for scalar, metavar in SCALARS.items():
            if issubclass(annotation, scalar):
                return Form("text", metavar)
        if issubclass(annotation, (BaseModel, dict)):
            return Form("json", "json")
        return Form("text", annotation.__name__.lower())
    return Form("json", "json")


def _choice(values: Any) -> Form:
    choices = tuple(str(value) for value in values)
    return Form("text", "|".join(choices), False, choices)


def _without_wrapping(annotation: Any) -> Any:
    """The annotation without `Annotated[…]` and without `| None`."""
    while True:
        origin = get_origin(annotation)
        if origin is Annotated:
            annotation = get_args(annotation)[0]
        elif origin in (Union, types.UnionType):
            rest = [a for a in get_args(annotation) if a is not type(None)]
            if len(rest) != 1:
                return annotation
            annotation = rest[0]
        else:
            return annotation


def is_positional(field: FieldInfo) -> bool:
    """Whether the field is marked with `Argument()`."""
    return any(isinstance(mark, Argument) for mark in field.metadata)


def option_name(name: str) -> str:
    """`max_tokens` → `--max-tokens`."""
    return "--" + name.replace("_", "-")


def option_names(name: str, field: FieldInfo) -> list[str]:
    """The options of a field: its own, and those of its other names (`AliasChoices`)."""
    others = field.validation_alias.choices if isinstance(field.validation_alias, AliasChoices) else []
    return list(dict.fromkeys(option_name(each) for each in (name, *others) if isinstance(each, str)))


def display_name(name: str, field: FieldInfo) -> str:
    """The name a person knows the field by: `NAME` by position, `--name` as an option."""
    return name.upper().replace("_", "-") if is_positional(field) else option_name(name)


Completer = Callable[[str], list[str]]


def signature_of(
    model: type[BaseModel], completer_of: Callable[[str], Completer | None] = lambda field: None
) -> inspect.Signature:
    """The signature that makes Typer offer one parameter for every field of the model, and `--json`.

    `completer_of` says what the shell completes a field with, where its type does not.
    """
    parameters = [_parameter(name, field, completer_of(name)) for name, field in model.model_fields.items()]
    json_option = typer.Option("--json", help="Print the result as JSON, and an error as JSON on stderr.")
    parameters.append(_keyword("as_json", Annotated[bool, json_option], False))
    return inspect.Signature(sorted(parameters, key=lambda p: p.default is not inspect.Parameter.empty))


def _keyword(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _parameter(name: str, field: FieldInfo, completer: Completer | None) -> inspect.Parameter:
    form = form_of(field.annotation)
    base: Any = bool if form.kind == "flag" else (list[str] if form.repeated else str)
    settings: dict[str, Any] = {"help": _help(field, form), "show_default": False}
    if form.choices:
        settings["autocompletion"] = lambda: list(form.choices)
    elif completer is not None:
        settings["autocompletion"] = completer
    if is_positional(field):
        settings["metavar"] = name.upper().replace("_", "-") + ("..." if form.repeated else "")
        declaration = typer.Argument(**settings)
    elif form.kind == "flag":
        switch = option_name(name)
        plain = field.default is False
        declaration = typer.Option(switch if plain else f"{switch}/--no-{switch[2:]}", **settings)
    else:
        declaration = typer.Option(*option_names(name, field), metavar=f"<{form.metavar}>", **settings)
    if field.is_required():
        return _keyword(name, Annotated[base, declaration], inspect.Parameter.empty)
    return _keyword(name, Annotated[base | None, declaration], None)


def _help(field: FieldInfo, form: Form) -> str:
    described = [field, *_fields_inside(field.annotation)]
    notes = _bounds([mark for each in described for mark in each.metadata])
    if form.repeated and not is_positional(field):
        notes.append("repeatable")
    default = field.default.value if isinstance(field.default, enum.Enum) else field.default
    if not field.is_required() and default not in (None, "", False) and field.default_factory is None:
        notes.append(f"default: {_shown(default)}")
    description = next((each.description for each in described if each.description), "")
    text = f"{description[:1].upper()}{description[1:]}"
    return f"{text} ({', '.join(notes)})".strip() if notes else text


def _bounds(marks: Sequence[Any]) -> list[str]:
    """`0 to 2`, or one note for each end; limits that nobody reaches are not worth a line."""
    found = {key: getattr(mark, key) for mark in marks for key, _ in BOUNDS if hasattr(mark, key)}
    found = {key: bound for key, bound in found.items() if abs(bound) < LARGEST_SHOWN_BOUND}
    if found.keys() == {"ge", "le"}:
        return [f"{found['ge']:g} to {found['le']:g}"]
    return [f"{words} {found[key]:g}" for key, words in BOUNDS if key in found]


def _fields_inside(annotation: Any) -> list[FieldInfo]:
    """What `Field(…)` says inside of `Annotated[…] | None`."""
    inside = [part for part in get_args(annotation) if get_origin(part) is Annotated]
    return [FieldInfo.from_annotation(part) for part in inside]


def _shown(default: Any) -> str:
    if default is True:
        return "on"
    if isinstance(default, (list, tuple)):
        return ", ".join(str(part) for part in default)
    return str(default)


def read_params(model: type[BaseModel], values: Mapping[str, Any]) -> BaseModel:
    """The model from what was typed; a field that was not given keeps its default.

    Raises:
        InvalidInput: a value is not what its field takes.
    """
    given: dict[str, Any] = {}
    for name, value in values.items():
        if value is None:
            continue
        field = model.model_fields[name]
        form = form_of(field.annotation)
        key = field.validation_alias if isinstance(field.validation_alias, str) else field.alias or name
        given[key] = _parsed(display_name(name, field), value) if form.kind == "json" else value
    try:
        return model.model_validate(given)
    except ValidationError as error:
        raise InvalidInput("; ".join(_explained(model, error)), hint="--help shows what each option takes") from error


def _parsed(name: str, text: str) -> Any:
    """A JSON value given as text, as `@FILE`, or as `-` for standard input."""
    source = text
    if text == "-":
        source = read_stdin()
    elif text.startswith("@"):
        try:
            source = Path(text[1:]).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidInput(f"{name}: cannot read the file {text[1:]}: {error}") from error
    try:
        return json.loads(source)
    except json.JSONDecodeError as error:
        raise InvalidInput(
            f"{name} takes JSON, but {_short(source)} is not: {error}",
            hint='put it in single quotes, for example \'{"key": "value"}\'; @FILE reads a file and - standard input',
        ) from error


def _explained(model: type[BaseModel], error: ValidationError) -> list[str]:
    """One sentence for each of the first errors: the option, what was expected, what was found."""
    lines = []
    for detail in error.errors(include_url=False)[:SHOWN_ERRORS]:
        name, *inside = [str(part) for part in detail["loc"]] or [""]
        field = model.model_fields.get(name)
        where = display_name(name, field) if field else name
        if inside and not (field and form_of(field.annotation).repeated):
            where += " " + ".".join(inside)
        message = detail["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
        message = message.removeprefix("Input ")
        if detail["type"] == "string_pattern_mismatch":  # nobody reads a regular expression
            about = field.description if field and field.description else "text of another form"
            message = f"takes {about}"
        found = "" if detail["type"] == "missing" else f", found {_short(detail['input'])}"
        lines.append(f"{where}: {message}{found}" if where else f"{message}")
    return lines


def _short(value: Any, limit: int = 60) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)
    text = " ".join(text.split())
    return f"'{text[: limit - 1]}…'" if len(text) > limit else f"'{text}'"
