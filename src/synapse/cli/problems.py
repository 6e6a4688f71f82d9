"""How an error looks in the terminal: one line, a hint, an exit code; with `--json` one JSON object instead."""

from __future__ import annotations

import errno
import json
import os
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path

from synapse import errors
from synapse.cli.text import printable, style_of

EXIT_OK = 0
EXIT_INTERNAL = 1
EXIT_INVALID = 2
EXIT_NOT_FOUND = 3
EXIT_CONFLICT = 4
EXIT_UNAVAILABLE = 5
EXIT_CORRUPT = 6
EXIT_OVERLOADED = 7
EXIT_FORBIDDEN = 8
EXIT_INTERRUPTED = 130

EXIT_CODES: dict[type[errors.SynapseError], int] = {
    errors.InvalidInput: EXIT_INVALID,
    errors.TooLarge: EXIT_INVALID,
    errors.NotFound: EXIT_NOT_FOUND,
    errors.Conflict: EXIT_CONFLICT,
    errors.Unavailable: EXIT_UNAVAILABLE,
    errors.Corrupt: EXIT_CORRUPT,
    errors.Overloaded: EXIT_OVERLOADED,
    errors.TimedOut: EXIT_OVERLOADED,
    errors.Unauthorized: EXIT_FORBIDDEN,
    errors.Forbidden: EXIT_FORBIDDEN,
    errors.InternalError: EXIT_INTERNAL,
}


@dataclass(frozen=True, slots=True)
class Problem:
    """An error as the terminal tells it."""

    code: str
    message: str
    hint: str | None
    exit_code: int

    def json(self) -> str:
        """`{"code": …, "message": …, "hint": …}` on one line."""
        return json.dumps({"code": self.code, "message": self.message, "hint": self.hint}, ensure_ascii=False)


def problem_of(error: errors.SynapseError) -> Problem:
    """The problem for an error of Synapse's own tree; its kind decides the exit code."""
    code = next((EXIT_CODES[kind] for kind in type(error).__mro__ if kind in EXIT_CODES), EXIT_INTERNAL)
    return Problem(error.code, error.message, error.hint, code)


def system_problem(error: OSError) -> Problem | None:
    """The problem for what the operating system refused, when its cause lies outside of Synapse; None otherwise."""
    where = f": {error.filename}" if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return Problem(
            "disk_full", f"there is no room left on the disk{where}", "make room and try again", EXIT_UNAVAILABLE
        )
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        hint = "use another folder, for example with SYNAPSE_HOME, or change who may read and write there"
        return Problem("not_permitted", f"the system refuses this{where}: {error.strerror}", hint, EXIT_UNAVAILABLE)
    return None


def unexpected_problem(error: BaseException) -> Problem:
    """The problem for an error that nobody foresaw; its traceback is kept in the home folder."""
    name = type(error).__name__
    message = f"something went wrong inside Synapse: {name}: {error}" if str(error) else f"unexpected {name}"
    if os.environ.get("SYNAPSE_DEBUG"):
        traceback.print_exception(error, file=sys.stderr)
        return Problem("internal_error", message, None, EXIT_INTERNAL)
    kept = _keep_traceback(error)
    where = f"the traceback is in {kept}" if kept else "run it again with SYNAPSE_DEBUG=1 to see the traceback"
    return Problem("internal_error", message, where, EXIT_INTERNAL)


def _keep_traceback(error: BaseException) -> Path | None:
    """Write the traceback to `logs/last-error.txt` in the home folder; None when nothing can be written there."""
    from synapse.config import load_settings

    try:
        path = load_settings().folder("logs") / "last-error.txt"
        path.write_text("".join(traceback.format_exception(error)), encoding="utf-8")
    except (OSError, errors.SynapseError):
        return None
    return path


def show_problem(problem: Problem, *, as_json: bool) -> None:
    """Print it on stderr: for a person one `error:` line and a `hint:` line, red only on a terminal."""
    if as_json:
        print(problem.json(), file=sys.stderr)
        return
    style = style_of(sys.stderr)
    message = printable(" ".join(problem.message.split()))
    print(f"{style.red('error:')} {message}", file=sys.stderr)
    if problem.hint:
        print(f"{style.dim('hint:')} {printable(problem.hint)}", file=sys.stderr)
