"""The `synapse` program: parses, runs, and turns whatever goes wrong into one line and an exit code."""

from __future__ import annotations

import gc
import io
import os
import re
import sys
from collections.abc import Sequence

import typer.main
from typer.exceptions import TyperException

from synapse.cli.app import PROGRAM, build_app
from synapse.cli.problems import (
    EXIT_INTERRUPTED,
    EXIT_INVALID,
    EXIT_OK,
    Problem,
    problem_of,
    show_problem,
    system_problem,
    unexpected_problem,
)
from synapse.cli.text import NotText
from synapse.errors import SynapseError

EXTRA = re.compile(r"unexpected extra arguments? *(?:\(s\))? *\((.*)\)")
COLLECT_AFTER = 50_000
"""Objects that are made before Python looks for garbage among them; its own default is 700."""


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code (docs/guide/cli.md lists them)."""
    _start_quickly()
    given = list(sys.argv[1:] if args is None else args)
    _write_what_can_be_written()
    try:
        code = _run(given)
        sys.stdout.flush()
    except BrokenPipeError:  # `synapse … | head` has read enough
        code = EXIT_OK
        _forget_stdout()
    except OSError as error:  # standard output is a file on a disk that is full
        _forget_stdout()
        problem = system_problem(error) or unexpected_problem(error)
        show_problem(problem, as_json=_asked_for_json(given))
        code = problem.exit_code
    return code


def _write_what_can_be_written() -> None:
    """In a locale that has not all of Unicode (`LC_ALL=POSIX`), write the rest as escapes instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _start_quickly() -> None:
    """A command lives for a third of a second, most of which is imports: they make objects, and nothing to collect.

    Pydantic would look through every installed package for plugins of its own.
    """
    gc.set_threshold(COLLECT_AFTER, *gc.get_threshold()[1:])
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")


def _run(given: list[str]) -> int:
    try:
        arguments = [_as_text(argument) for argument in given]
        returned = typer.main.get_command(build_app()).main(args=arguments, prog_name=PROGRAM, standalone_mode=False)
    except SynapseError as error:
        problem = problem_of(error)
    except TyperException as error:
        problem = _usage_problem(error)
    except typer.Abort:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        raise
    except SystemExit as leaving:  # from Typer's completion, and from a pipe that Typer or rich found closed
        _forget_stdout()
        if isinstance(leaving.__context__, BrokenPipeError):
            return EXIT_OK
        return leaving.code if isinstance(leaving.code, int) else EXIT_OK
    except OSError as error:
        problem = system_problem(error) or unexpected_problem(error)
    except Exception as error:  # the border of the program: nothing may reach the person as a traceback
        problem = unexpected_problem(error)
    else:
        if returned == EXIT_INTERRUPTED:
            print(file=sys.stderr)
        return returned if isinstance(returned, int) else EXIT_OK
    sys.stdout.flush()
    show_problem(problem, as_json=_asked_for_json(given))
    return problem.exit_code


def _as_text(argument: str) -> str:
    """An argument as UTF-8, whatever the locale says: Python passes bytes it cannot read on as halves of characters."""
    try:
        return os.fsencode(argument).decode("utf-8")
    except UnicodeDecodeError as error:
        shown = os.fsencode(argument).decode("utf-8", "replace")
        raise NotText(
            f"the argument {shown[:60]!r} is not UTF-8 text", hint="check how your terminal encodes"
        ) from error


def _asked_for_json(given: list[str]) -> bool:
    """Whether `--json` was given; known even when the command line could not be parsed."""
    options = given[: given.index("--")] if "--" in given else given
    return "--json" in options


def _usage_problem(error: TyperException) -> Problem:
    """A mistyped command line, in our words: what is wrong, the nearest option, where the help is."""
    command = getattr(getattr(error, "ctx", None), "command_path", PROGRAM)
    message = error.format_message().rstrip(".")
    hint = f"see `{command} --help`"
    option = getattr(error, "option_name", None)
    near = getattr(error, "possibilities", None)
    if option is not None and type(error).__name__ == "NoSuchOption":
        message = f"{command} has no option {option}"
        if near:
            hint = f"did you mean {' or '.join(sorted(near))}? {hint}"
    elif (extra := EXTRA.search(message)) is not None:
        message = f"{command} takes no further argument, found {extra[1]!r}"
        say = f'say something with -m "{extra[1]}"; ' if command == f"{PROGRAM} chat" else ""
        hint = f"{say}quote what has spaces; {hint}"
    else:
        message = message[:1].lower() + message[1:].replace("\n\t", " ")
    return Problem("usage", message, hint, EXIT_INVALID)


def _forget_stdout() -> None:
    """Point stdout at nothing, so that Python does not complain about it while it shuts down."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
