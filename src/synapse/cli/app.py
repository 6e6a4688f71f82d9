"""The tree of commands: what the registry has, as `synapse GROUP VERB`, beside the programs of the terminal.

Nothing of a group is imported until one of its commands is asked for, so `synapse --help` is quick.
"""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import typer
import typer.core
import typer.main

from synapse.cli import programs
from synapse.cli.text import style_of
from synapse.errors import InvalidInput
from synapse.groups import GROUPS

if TYPE_CHECKING:
    from typer._click import Command as AnyCommand
    from typer._click import Context as ParseContext
    from typer._click import HelpFormatter

    from synapse.commands import Command

PROGRAM = "synapse"
HEADING = re.compile(r"^(Usage|[A-Z][a-z ]+):", re.MULTILINE)
HELP_OPTIONS = {"help_option_names": ["--help", "-h"]}


class UnknownCommand(InvalidInput):
    """There is no group or verb of that name."""

    code = "unknown_command"


class HelpfulCommand(typer.core.TyperCommand):
    """A command whose help has its headings in bold on a terminal."""

    def get_help(self, ctx: ParseContext) -> str:
        return _with_bold_headings(super().get_help(ctx))

    def collect_usage_pieces(self, ctx: ParseContext) -> list[str]:
        return [piece.replace("{", "").replace("}", "") for piece in super().collect_usage_pieces(ctx)]

    def format_options(self, ctx: ParseContext, formatter: HelpFormatter) -> None:
        """Arguments without a type, which is in their help where it matters, then the options."""
        sections: dict[str, list[tuple[str, str]]] = {"Arguments": [], "Options": []}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None and parameter.param_type_name == "argument":
                sections["Arguments"].append((record[0].partition(" ")[0], record[1].removesuffix("  [required]")))
            elif record is not None:
                sections["Options"].append(record)
        for heading, rows in sections.items():
            if rows:
                with formatter.section(heading):
                    formatter.write_dl(rows)


class HelpfulGroup(typer.core.TyperGroup):
    """A group that shows its help when nothing follows, and names the nearest command when one is mistyped."""

    def get_help(self, ctx: ParseContext) -> str:
        return _with_bold_headings(super().get_help(ctx))

    def parse_args(self, ctx: ParseContext, args: list[str]) -> list[str]:
        return super().parse_args(ctx, args if args or ctx.resilient_parsing else ["--help"])

    def format_commands(self, ctx: ParseContext, formatter: HelpFormatter) -> None:
        """The commands under their headings, each with its whole summary."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for name in self.list_commands(ctx):
            command = self.get_command(ctx, name)
            if command is not None:
                heading = getattr(command, "rich_help_panel", None)
                summary = (command.short_help or command.help or "").partition("\n")[0]
                sections.setdefault(heading if isinstance(heading, str) else "Commands", []).append((name, summary))
        for heading, rows in sections.items():
            with formatter.section(heading):
                formatter.write_dl(rows)

    def resolve_command(self, ctx: ParseContext, args: list[str]) -> tuple[str | None, AnyCommand | None, list[str]]:
        name = args[0]
        if not name.startswith("-") and not ctx.resilient_parsing and self.get_command(ctx, name) is None:
            names = self.list_commands(ctx)
            near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
            hint = f"did you mean `{ctx.command_path} {near[0]}`?" if near else f"there are {', '.join(names)}"
            raise UnknownCommand(f"{ctx.command_path} has no command {name!r}", hint=hint)
        return super().resolve_command(ctx, args)


def _with_bold_headings(text: str) -> str:
    style = style_of(sys.stdout)
    return HEADING.sub(lambda match: style.bold(match[0]), text)


class RegistryGroup(HelpfulGroup):
    """One group of the registry. Its room is imported when the group is first looked into."""

    def list_commands(self, ctx: ParseContext) -> list[str]:
        from synapse.commands import load_group

        return [*(command.verb for command in load_group(_group(self.name))), *self._programs()]

    def get_command(self, ctx: ParseContext, cmd_name: str) -> AnyCommand | None:
        """The one that is asked for: making all those of a group takes longer than most of them run."""
        if cmd_name not in self.commands:
            from synapse.commands import load_group

            found = {command.verb: command for command in load_group(_group(self.name))}
            if cmd_name in self._programs():  # which may show what a command of the same name gives
                self.add_command(_typer_program(self._programs()[cmd_name]), cmd_name)
            elif cmd_name in found:
                self.add_command(_typer_command(found[cmd_name]), cmd_name)
        return self.commands.get(cmd_name)

    def _programs(self) -> dict[str, Callable[..., None]]:
        return {program.__name__: program for program in programs.GROUP_PROGRAMS.get(str(self.name), ())}


def _group(name: str | None) -> str:
    """The group of the registry that the terminal calls so."""
    return next((group for group, about in GROUPS.items() if about.terminal == name), str(name))


def _typer_program(program: Callable[..., None]) -> AnyCommand:
    """The Typer command of a program of the terminal."""
    app = typer.Typer(rich_markup_mode=None, add_completion=False, context_settings=HELP_OPTIONS)
    app.command(cls=HelpfulCommand)(program)
    return typer.main.get_command(app)


def _typer_command(command: Command) -> AnyCommand:
    """The Typer command that runs a command of the registry."""
    from synapse.cli.completion import completer
    from synapse.cli.options import signature_of
    from synapse.cli.run import run_command

    def callback(*, as_json: bool, **values: Any) -> None:
        run_command(command, values, as_json=as_json)

    complete = partial(completer, command.group, command.verb)
    vars(callback)["__signature__"] = signature_of(command.params, complete)
    callback.__annotations__.clear()
    app = typer.Typer(rich_markup_mode=None, add_completion=False, context_settings=HELP_OPTIONS)
    text = f"{command.summary}\n\n{command.description}".strip()
    app.command(command.verb, cls=HelpfulCommand, help=text, short_help=command.summary)(callback)
    return typer.main.get_command(app)


def build_app() -> typer.Typer:
    """The whole command line. Its help is plain text, which is quick to draw and reads well in any width."""
    app = typer.Typer(
        name=PROGRAM,
        cls=HelpfulGroup,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings=HELP_OPTIONS,
        help="Many AI personas on one modest machine.",
        epilog="`synapse GROUP --help` lists a group's commands. Every command takes --json.",
    )
    app.callback()(programs.root)
    for program in programs.PROGRAMS:
        app.command(cls=HelpfulCommand)(program)
    for name, about in GROUPS.items():
        group = typer.Typer(cls=RegistryGroup, rich_markup_mode=None, context_settings=HELP_OPTIONS)
        app.add_typer(group, name=about.terminal or name, help=about.summary, rich_help_panel="Groups")
    return app
