"""Check the examples in the documentation: `python -m scripts.check_docs [FILE …]`.

In README.md and docs/, every line that starts with `$ ` in a console block is run, file by file, in a fresh home that
has the default models; every python block that imports something is run too. An example that exits with anything but 0
fails the check. `synapse up` starts a server for the rest of the file. Of `make demo` what it runs is run, so that what
it leaves in the home is there for what follows. Other lines for the shell of the reader's own project (`make`, `git`,
`pip`) are left alone: CI runs those.

In other blocks, which may name files and ids of the reader's own, every line that starts with `synapse` must name a
command that exists and options that it has.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer.main

from synapse.cli.app import build_app
from tests.support.default_model import default_encoder_path, default_model_path

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^ *```(\w*)\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
SHELL_WORDS = {"|", ">", ">>", "<", "&&", ";", "&"}
NOT_RUN = ("make", "git", "pip", "cd")
MADE = {"make demo": "synapse demo"}
"""What a line runs, once everything is installed."""
TIMEOUT = 300


@dataclass(frozen=True)
class Example:
    """One command or program, and the line of the file it stands in."""

    kind: str
    text: str
    line: int


def examples(page: str) -> Iterator[Example]:
    """The examples of a page, in order. A line of a shell that ends in a backslash goes on in the next."""
    for block in BLOCK.finditer(page):
        kind, body = block.groups()
        line = page.count("\n", 0, block.start()) + 2
        if kind == "python":
            if re.search(r"^(import|from) ", body, re.MULTILINE):
                yield Example(kind, body, line)
        else:
            prompt = r"\$ " if kind == "console" else r"(?=synapse )"
            for command in re.finditer(rf"^ *{prompt}((?:.*\\\n)*.*)$", body, re.MULTILINE):
                words = command[1].split("#")[0].strip()
                text = MADE.get(words, command[1])
                if text.split()[0] not in NOT_RUN:
                    place = line + body.count("\n", 0, command.start())
                    yield Example("console" if kind == "console" else "usage", text, place)


def misuse(text: str) -> str | None:
    """What is wrong with a `synapse` command line, without running it."""
    words = shlex.split(text.replace("\\\n", " "), comments=True)
    words = words[1 : next((i for i, word in enumerate(words) if word in SHELL_WORDS), len(words))]
    command: Any = typer.main.get_command(build_app())
    context = command.make_context("synapse", [], resilient_parsing=True)
    while words and hasattr(command, "get_command") and not words[0].startswith("-"):
        name = words.pop(0)
        command = command.get_command(context, name)
        if command is None:
            return f"there is no command {name!r}"
    options = {"--help", *(option for parameter in command.params for option in parameter.opts)}
    unknown = [word for word in words if re.match(r"--|-\w$", word) and word.split("=")[0] not in options]
    return f"there is no option {unknown[0]}" if unknown else None


def run_page(path: Path, environment: dict[str, str]) -> list[str]:
    """Run a page's examples; what failed, as lines to print."""
    failures: list[str] = []
    servers: list[subprocess.Popen[bytes]] = []
    with tempfile.TemporaryDirectory() as work:
        try:
            for example in examples(path.read_text()):
                where = f"{path.relative_to(ROOT)}:{example.line}"
                if example.kind == "usage":
                    if problem := misuse(example.text):
                        failures.append(f"{where}: {problem}: {example.text}")
                    continue
                if example.text.startswith("synapse up"):
                    servers.append(start_server(example.text, environment, work))
                    continue
                command = (
                    [sys.executable, "-c", example.text] if example.kind == "python" else ["bash", "-c", example.text]
                )
                done = subprocess.run(
                    command, env=environment, cwd=work, capture_output=True, text=True, timeout=TIMEOUT, check=False
                )
                print(f"{where}: {example.text.splitlines()[0][:100]} -> {done.returncode}")
                if done.returncode:
                    failures.append(f"{where}: exit {done.returncode}\n{done.stdout[-1000:]}{done.stderr[-2000:]}")
        finally:
            for server in servers:
                server.terminate()
                server.wait(30)
    return failures


def start_server(command: str, environment: dict[str, str], work: str) -> subprocess.Popen[bytes]:
    """Start a server and wait until it is ready."""
    server = subprocess.Popen(command.split(), env=environment, cwd=work)
    url = f"http://127.0.0.1:{environment['SYNAPSE_PORT']}/ready"
    for _ in range(300):
        try:
            with urllib.request.urlopen(url, timeout=2):
                return server
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            if server.poll() is not None:
                break
            time.sleep(0.2)
    raise SystemExit(f"{command} did not become ready")


def main() -> None:
    pages = [Path(name).absolute() for name in sys.argv[1:]] or [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]
    models = [default_model_path().parent, default_encoder_path()]
    failures: list[str] = []
    for page in pages:
        with tempfile.TemporaryDirectory() as home:
            for model in models:
                shutil.copytree(model, Path(home) / "models" / model.name)
            bin_folder = Path(sys.executable).parent
            environment = {
                **{name: value for name, value in os.environ.items() if not name.startswith("SYNAPSE_")},
                "SYNAPSE_HOME": home,
                "SYNAPSE_PORT": "8377",
                "PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}",
            }
            failures += run_page(page, environment)
    print("\n".join(failures))
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
