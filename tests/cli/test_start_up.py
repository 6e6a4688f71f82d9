"""Commands that compute nothing start quickly: they import nothing that computes, and no slow library."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from synapse.commands import all_commands

COMPUTING = frozenset({"embedding/create", "embedding/compare", "kernels/verify"})
LOOKS_AT_KERNELS = frozenset(
    (
        *("ai-daemon/models", "ai-daemon/status", "ai-daemon/workers", "engine/stats"),
        *("events/stats", "events/dead", "hotpath/status", "hotpath/rank", "kernels/list"),
    )
)
"""They ask the engines, hot paths or the bus, which have NumPy and the kernels with them."""
SLOW = (
    *("alembic", "fastapi", "filelock", "gguf", "huggingface_hub", "jinja2", "llguidance", "numpy", "openfeature"),
    *("prometheus_client", "pydantic_settings", "rich.console", "safetensors", "sqlalchemy", "structlog"),
    *("tokenizers", "uvicorn"),
)
MOST_TIMES = 20
"""How much longer than `import sqlite3` a list may take: 13 to 15 times, quiet or busy; it was 75."""
LISTS = ("persona", "layer", "model", "key")
ROUNDS = 4

WALK = """
import contextlib, io, json, sys
from synapse.cli.main import main
for args in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as said:
        code = main(args)
    assert code in (0, 3), (args, code, said.getvalue())
    slow = [name for name in json.loads(sys.argv[2]) if name in sys.modules]
    assert not slow, (args, slow)
"""


def quick_commands() -> list[list[str]]:
    """Every command that changes nothing and computes nothing, with something for what it must be given."""
    lines = []
    for command in all_commands():
        if command.permission != "read" or command.name in COMPUTING | LOOKS_AT_KERNELS:
            continue
        required = [name for name, field in command.params.model_fields.items() if field.is_required()]
        given = ["Persona" if name == "collection" else "1" for name in required]
        lines.append([command.group, command.verb, *given])
    return [*lines, ["key", "create", "robot"], ["key", "revoke", "robot"], ["data", "delete", "Persona", "1"]]


def test_commands_that_compute_nothing_import_nothing_slow(persona_home: Path) -> None:
    lines = quick_commands()
    assert len(lines) > 15
    helps = [[line[0], line[1], "--help"] for line in lines]
    done = subprocess.run(
        [sys.executable, "-c", WALK, json.dumps([*lines, *helps]), json.dumps(SLOW)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_a_list_takes_a_small_multiple_of_what_opening_its_database_does(persona_home: Path, tmp_path: Path) -> None:
    """Processor time, the best of a few runs of each in turn: what else runs on the machine counts little."""
    programs = {"sqlite3": "import sqlite3"}
    programs |= {group: f"from synapse.cli.main import main; main(['{group}', 'list'])" for group in LISTS}
    compiled = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    compiled["PYTHONPYCACHEPREFIX"] = str(tmp_path)  # as an installed program finds itself from the second time on
    best = dict.fromkeys(programs, float("inf"))
    for _ in range(ROUNDS):
        for name, program in programs.items():
            best[name] = min(best[name], processor_seconds(program, compiled))
    times = {group: best[group] / best["sqlite3"] for group in LISTS}
    assert max(times.values()) < MOST_TIMES, (times, best)


def processor_seconds(program: str, environment: dict[str, str]) -> float:
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.DEVNULL, env=environment)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return used.ru_utime + used.ru_stime
