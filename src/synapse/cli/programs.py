"""What the terminal offers beside the registry's commands: `chat`, `demo`, `up`, `down` and a few more.

Each imports what it needs when it runs.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import typer

from synapse import __version__

Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, and an error as JSON on stderr.")]


def _show_version(value: bool) -> None:
    if value:
        print(f"synapse {__version__}")
        raise typer.Exit


def root(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    pass


def _complete_chat(incomplete: str) -> list[str]:
    from synapse.cli.completion import completer

    complete = completer("chat", "", "name")
    return complete(incomplete) if complete else []


def chat(
    *,
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME", autocompletion=_complete_chat, help="The persona to talk to, or a model without one."
        ),
    ],
    message: Annotated[str | None, typer.Option("--message", "-m", help="Say this and print the answer.")] = None,
    resume: Annotated[bool, typer.Option("--continue", "-c", help="Go on with the latest conversation.")] = False,
    conversation: Annotated[str | None, typer.Option(metavar="ID", help="Go on with this conversation.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 always takes the likeliest token.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Longest answer, in tokens.")] = None,
    seed: Annotated[int | None, typer.Option(help="Same seed, same answer.")] = None,
    as_json: Json = False,
) -> None:
    """Talk to a persona: at a prompt, or once with -m or piped text.

    Piped text is the message, or follows the one given with -m. What is said to a persona is kept as a conversation.
    """
    from synapse.cli.chat.program import ChatRequest, run_chat

    given = {"temperature": temperature, "max_tokens": max_tokens, "seed": seed}
    sampling = {setting: value for setting, value in given.items() if value is not None}
    run_chat(ChatRequest(name, message, resume, conversation, sampling, as_json))


def version(as_json: Json = False) -> None:
    """Print the version."""
    facts: dict[str, Any] = {"synapse": __version__, "python": platform.python_version(), "system": platform.platform()}
    if as_json:
        print(json.dumps(facts))
    else:
        print("\n".join(f"{name} {value}" for name, value in facts.items()))


def up(
    host: Annotated[str | None, typer.Option(help="Address to listen on; only loopback until a key exists.")] = None,
    port: Annotated[int | None, typer.Option(min=0, max=65535, help="Port to listen on; 0 picks a free one.")] = None,
    detach: Annotated[
        bool, typer.Option("--detach", "-d", help="Run apart from this terminal; come back when it is ready.")
    ] = False,
    systemd: Annotated[bool, typer.Option("--systemd", help="Instead, print a unit for systemd.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print an error as JSON on stderr.")] = False,
) -> None:
    """Start the server: an OpenAI-compatible API in which personas are models."""
    from synapse.cli.serving import run_up, show_unit

    if systemd:
        show_unit()
    else:
        run_up(host, port, detach=detach, as_json=as_json)


def down(as_json: Json = False) -> None:
    """Stop the server of this home when the answers in progress are done."""
    from synapse.cli.serving import run_down

    run_down(as_json=as_json)


def status(as_json: Json = False) -> None:
    """Show how the server of this home is; the same as `synapse daemon status`."""
    _run("ai-daemon/status", as_json=as_json)


def ps(as_json: Json = False) -> None:
    """List the models that the server of this home has open; the same as `synapse daemon models`."""
    _run("ai-daemon/models", as_json=as_json)


def _run(name: str, *, as_json: bool) -> None:
    from synapse.cli.run import run_command
    from synapse.commands import find_command

    run_command(find_command(name), {}, as_json=as_json)


def demo(as_json: Json = False) -> None:
    """Three personas with three different layers answer one question in one batch."""
    from synapse.cli.demo import run_demo

    run_demo(as_json=as_json)


def tail(
    pattern: Annotated[
        str, typer.Option("--pattern", "-p", help="Topics: words joined by dots, * for any word, ** for the rest.")
    ] = "**",
    since: Annotated[
        str | None, typer.Option(metavar="TIME", help="From so long ago (10m, 2h, 1d) or from a time on.")
    ] = None,
    lines: Annotated[
        int | None, typer.Option("--lines", "-n", min=0, help="At most so many; by default 20, or all with --since.")
    ] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with what comes, until Ctrl-C.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object a line.")] = False,
) -> None:
    """Print the newest events of this home, whichever process they come from."""
    from synapse.cli.tail import run_tail

    run_tail({"pattern": pattern, "since": since, "lines": lines, "follow": follow}, as_json=as_json)


PROGRAMS = (chat, demo, up, down, status, ps, version)
GROUP_PROGRAMS: Mapping[str, tuple[Callable[..., None], ...]] = {"events": (tail,)}
"""Programs that stand among the commands of a group."""
