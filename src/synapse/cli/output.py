"""A command's result: tables and key/value pairs for a person, tab-separated lines in a pipe, JSON on request."""

from __future__ import annotations

import json
import shutil
import sys
import textwrap
from collections.abc import Sequence
from datetime import datetime
from enum import Enum
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from synapse.cli.text import printable, style_of

GAP = 2
SHORTEST_COLUMN = 8
LONGEST_CELL = 60
NARROWEST_TEXT = 16
KIB = 1024


def show_result(result: BaseModel, *, as_json: bool) -> None:
    """Print the result on stdout: JSON, a table when it is a list (`items`), key/value pairs otherwise."""
    if as_json:
        print(result.model_dump_json(indent=2))
        return
    rows = list_rows(result)
    if rows is None:
        show_pairs(result)
    elif rows:
        show_table(rows)
    else:
        print(style_of(sys.stderr).dim("nothing here yet"), file=sys.stderr)


def list_rows(result: BaseModel) -> list[dict[str, Any]] | None:
    """The rows of a list result, or None when the result is a single thing."""
    items = getattr(result, "items", None)
    if not isinstance(items, list):
        return None
    return [_fields(item) if isinstance(item, BaseModel) else {"value": item} for item in items]


def _fields(entity: BaseModel) -> dict[str, Any]:
    """The fields by name, one level deep; extra fields of an open model too."""
    shown = {name: getattr(entity, name) for name in type(entity).model_fields}
    return shown | (entity.model_extra or {})


def cell(name: str, value: Any) -> str:  # noqa: PLR0911 (one answer for each type)
    """One value as a person reads it: bytes as KB and MB, times local and without seconds, structures as JSON."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Enum):
        return str(value.value)
    if isinstance(value, int) and (name.endswith("_bytes") or name in ("size", "bytes")):
        return human_bytes(value)
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, datetime):
        return value.astimezone().strftime("%Y-%m-%d %H:%M")
    if isinstance(value, BaseModel):
        pairs = ((key, cell(key, part)) for key, part in _fields(value).items())
        return ", ".join(f"{key}={text}" for key, text in pairs if text)
    if isinstance(value, (list, tuple)) and all(isinstance(part, (str, int, float, Path)) for part in value):
        return ", ".join(cell("", part) for part in value)
    if isinstance(value, (list, tuple, dict)):
        return json.dumps(value, default=_plain, ensure_ascii=False)
    return printable(str(value))


def _plain(value: Any) -> Any:
    return value.model_dump(mode="json") if isinstance(value, BaseModel) else str(value)


def human_bytes(size: int) -> str:
    """Bytes in binary units with three digits: 144811968 → `138 MiB`."""
    amount = float(size)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if amount < KIB or unit == "GiB":
            break
        amount /= KIB
    return f"{amount:.0f} {unit}" if amount >= 100 or unit == "B" else f"{amount:.1f} {unit}"


def show_pairs(entity: BaseModel) -> None:
    """One thing: a line for every field that has a value; lists of things follow as their own tables."""
    fields = _fields(entity)
    tables = {n: v for n, v in fields.items() if isinstance(v, list) and v and isinstance(v[0], BaseModel)}
    pairs = [(name, cell(name, value)) for name, value in fields.items() if name not in tables]
    pairs = [(name, text) for name, text in pairs if text]
    width = max((len(name) for name, _ in pairs), default=0) + GAP
    style = style_of(sys.stdout)
    for name, text in pairs:
        first, *more = _lines(text, width)
        print(style.cyan(name) + " " * (width - len(name)) + first)
        for line in more:
            print(" " * width + line)
    for name, things in tables.items():
        print(f"\n{style.cyan(name)}")
        show_table([_fields(thing) for thing in things])


def _lines(text: str, indent: int) -> list[str]:
    """The lines of a value; on a terminal, long ones are broken between words."""
    lines = text.split("\n")
    if not sys.stdout.isatty():
        return lines
    room = max(shutil.get_terminal_size().columns - indent, NARROWEST_TEXT)
    return [part for line in lines for part in textwrap.wrap(line, room, replace_whitespace=False) or [""]]


def show_table(rows: Sequence[dict[str, Any]]) -> None:
    """Many things: a table that fits the terminal, or tab-separated lines when stdout is no terminal."""
    columns = [n for n in dict.fromkeys(n for row in rows for n in row) if any(cell(n, row.get(n)) for row in rows)]
    cells = [[" ".join(cell(name, row.get(name)).split()) for name in columns] for row in rows]
    numeric = [all(isinstance(row.get(n), (int, float)) or row.get(n) is None for row in rows) for n in columns]
    if sys.stdout.isatty():
        _show_rich_table(columns, cells, numeric)
    else:
        _show_plain_table(columns, cells)


def _show_plain_table(columns: list[str], cells: list[list[str]]) -> None:
    """One row a line, whole, the cells apart by tabs: `cut -f 2` and `awk -F '\\t'` find a column, an empty one too."""
    for line in ([name.upper() for name in columns], *cells):
        print("\t".join(line))


def _width(text: str) -> int:
    from rich.cells import cell_len

    return cell_len(text)


def fitting_columns(columns: list[str], cells: list[list[str]], width: int) -> int:
    """How many columns, from the left, fit a terminal this wide when long text may wrap."""
    used = 0
    for index, name in enumerate(columns):
        longest = max([_width(name), *(_width(line[index]) for line in cells)])
        used += max(SHORTEST_COLUMN, min(longest, NARROWEST_TEXT)) + GAP
        if used > width and index > 0:
            return index
    return len(columns)


def _show_rich_table(columns: list[str], cells: list[list[str]], numeric: list[bool]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(no_color=None)
    kept = fitting_columns(columns, cells, shutil.get_terminal_size().columns)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold cyan", padding=(0, 1))
    for name, right in zip(columns[:kept], numeric[:kept], strict=True):
        table.add_column(
            name.replace("_", " "), justify="right" if right else "left", overflow="fold", max_width=LONGEST_CELL
        )
    for line in cells:
        table.add_row(*(Text(text) for text in line[:kept]))
    console.print(table)
    if kept < len(columns):
        left_out = ", ".join(columns[kept:])
        print(style_of(sys.stderr).dim(f"not shown for lack of room: {left_out} (--json has all)"), file=sys.stderr)
