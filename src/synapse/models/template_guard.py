"""What a chat template may spend: a budget of time and characters that it cannot get round.

A template is a program that came with the model. Python cannot interrupt one operation on a huge value, so none may
become huge: every operation that can make a value larger is charged for what it makes, and refused before it makes more
than is left. Each round of a loop, each call, filter and comparison looks at the clock. What cannot be charged, such as
padding and printf formats, does not exist here; no published template uses it.
"""

# ruff: noqa: N802 (what Jinja2 calls the visits of nodes)

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sized
from contextvars import ContextVar
from typing import Any

from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.visitor import NodeTransformer

LONGEST_VALUE = 2**22
"""Characters of a text, or items and characters of a list with all that is in it."""
MOST_WORK = 2**26
"""Characters that all operations of one rendering may make together."""
LARGEST_NUMBER = 100_000
"""What a template may multiply, indent or repeat by."""
FILTERS = frozenset(
    {
        "abs", "capitalize", "count", "d", "default", "dictsort", "e", "escape", "first", "float", "indent", "int",
        "items", "join", "last", "length", "list", "lower", "map", "max", "min", "reject", "rejectattr", "replace",
        "reverse", "round", "safe", "select", "selectattr", "sort", "string", "sum", "title", "tojson", "trim",
        "unique", "upper",
    }
)  # fmt: skip
DEEP = frozenset({"dictsort", "e", "escape", "join", "max", "min", "sort", "string", "sum", "tojson", "unique"})
"""Filters and methods that look at all that is in a list; the others only at its length."""
NO_METHODS = frozenset(
    {"center", "encode", "expandtabs", "format", "format_map", "ljust", "maketrans", "rjust", "translate", "zfill"}
)


class TooMuch(SecurityError):
    """A template used up its budget."""


class Budget:
    """What one rendering has left."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._deadline = time.monotonic() + seconds
        self._left = MOST_WORK

    def check_time(self) -> None:
        if time.monotonic() > self._deadline:
            raise TooMuch(f"the model's chat template took longer than {self._seconds:g} seconds")

    def charge(self, size: int) -> None:
        """Before or after something of that size is made."""
        if size > LONGEST_VALUE:
            raise TooMuch(f"the model's chat template computes with more than {LONGEST_VALUE} characters at once")
        self._left -= size
        if self._left < 0:
            raise TooMuch(f"the model's chat template computes more than {MOST_WORK} characters in all")
        self.check_time()


budget: ContextVar[Budget] = ContextVar("budget")


def weight(value: object, most: int = LONGEST_VALUE) -> int:
    """Characters and items of a value, each counted as often as it would be printed."""
    size, waiting = 0, [value]
    while waiting:
        each = waiting.pop()
        size += 1
        if isinstance(each, str):
            size += len(each)
        elif isinstance(each, Mapping):
            waiting += [*each.keys(), *each.values()]
        elif isinstance(each, list | tuple | set | frozenset):
            waiting += each
        elif isinstance(each, int) and not isinstance(each, bool):
            size += each.bit_length() // 3
        if size + len(waiting) > most:
            return most + 1
    return size


def charged(value: Any) -> Any:
    """The value, paid for."""
    budget.get().charge(weight(value))
    return value


def length(value: object) -> int:
    """Characters or items of a value, without what is in its items."""
    return len(value) if isinstance(value, Sized) else 1


def check_call(called: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], name: str = "") -> None:
    """Before a function, method or filter makes something of these arguments."""
    name = name or getattr(called, "__name__", "")
    values = [*args, *kwargs.values()]
    for value in values:
        if isinstance(value, int) and abs(value) > LARGEST_NUMBER and called is not None:
            raise TooMuch(f"the model's chat template computes with more than {LARGEST_NUMBER}")
    owner = getattr(called, "__self__", None)
    if isinstance(owner, str):
        values.insert(0, owner)
    size = sum(map(weight if name in DEEP else length, values))
    texts = [value for value in values if isinstance(value, str)]
    if name == "replace" and len(texts) >= 3:
        size += (texts[0].count(texts[1]) + 1) * len(texts[2])
    elif name == "join":  # the separator is the text that is not joined
        between, parts = (values[0], values[1:2]) if isinstance(owner, str) else (values[1:2], values[:1])
        size += max(1, sum(map(length, between))) * max(1, sum(map(length, parts)))
    elif name == "indent" and texts:
        numbers = [value for value in values if isinstance(value, int)]
        size += (texts[0].count("\n") + 1) * max([4, *numbers, *(len(text) for text in texts[1:])])
    elif name in ("split", "rsplit", "splitlines"):
        size *= 4
    budget.get().charge(size)


def guarded_filter(name: str, filter_: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that pays for what it reads and makes, with the marks by which Jinja2 passes it more arguments."""

    def run(*args: Any, **kwargs: Any) -> Any:
        values = args[1:] if hasattr(filter_, "jinja_pass_arg") else args
        check_call(filter_, values, kwargs, name)
        result = filter_(*args, **kwargs)
        budget.get().charge(length(result))
        return result

    run.__name__ = name
    if hasattr(filter_, "jinja_pass_arg"):
        setattr(run, "jinja_pass_arg", filter_.jinja_pass_arg)  # noqa: B010
    return run


class Instrument(NodeTransformer):
    """Puts the checks into a template's tree, where its names cannot reach them."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_call("tick", [], node), lineno=node.lineno))
        return node

    def _pay(self, node: nodes.Expr) -> nodes.Node:
        self.generic_visit(node)
        return _call("charged", [node], node)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _call("concat", node.nodes, node)

    def visit_List(self, node: nodes.List) -> nodes.Node:
        return self._pay(node)

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:
        return self._pay(node)

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        if node.ctx != "load":
            return node
        return self._pay(node)

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        return _call("passed", [node], node)

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        return _call("sliced", [node], node) if isinstance(node.arg, nodes.Slice) and node.ctx == "load" else node


def _call(name: str, args: list[nodes.Expr], at: nodes.Node) -> nodes.Call:
    function = nodes.EnvironmentAttribute(name, lineno=at.lineno)
    return nodes.Call(function, args, [], None, None, lineno=at.lineno)
