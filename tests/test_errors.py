"""Every error of the tree reaches another process as it is."""

from __future__ import annotations

import importlib
import pickle
import pkgutil
from collections.abc import Iterator
from typing import Any

import pytest

import synapse
from synapse.errors import SynapseError

NOT_IMPORTED = ("synapse.store.migrations.",)
"""Alembic runs these."""


def tree(kind: type[SynapseError]) -> Iterator[type[SynapseError]]:
    yield kind
    for child in kind.__subclasses__():
        yield from tree(child)


def every_error() -> list[type[SynapseError]]:
    for module in pkgutil.walk_packages(synapse.__path__, "synapse."):
        if not module.name.startswith(NOT_IMPORTED) and not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    return sorted({kind for kind in tree(SynapseError) if kind.__module__.startswith("synapse.")}, key=str)


def made(kind: type[SynapseError]) -> SynapseError:
    """One with all that an error can carry, made without knowing what its class asks for."""
    error = kind.__new__(kind, "expected this, found that")
    SynapseError.__init__(error, "expected this, found that", hint="do so", param="prompt", waited={"place": 1.5})
    error.__dict__["kept"] = b"what a class adds"
    return error


def test_every_error_pickles_with_all_that_it_says() -> None:
    errors = every_error()
    assert len(errors) > 40
    for kind in errors:
        error = made(kind)
        error.__cause__ = OSError("a reason that stays behind")
        again = pickle.loads(pickle.dumps(error))  # noqa: S301 (our own)
        assert type(again) is kind
        assert (str(again), again.__dict__) == (str(error), error.__dict__)
        assert again.args == error.args


@pytest.mark.parametrize(
    "details", [{}, {"param": "tools"}, {"reason": "rank", "limit": 3}], ids=["plain", "param", "facts"]
)
def test_an_error_whose_class_asks_for_more_pickles_too(details: dict[str, Any]) -> None:
    class Demanding(SynapseError):
        def __init__(self, limit: int, *, unit: str) -> None:
            super().__init__(f"at most {limit} {unit}", hint="ask for less", **details)
            self.limit = limit

    globals()["Demanding"] = Demanding
    Demanding.__qualname__ = "Demanding"
    again = pickle.loads(pickle.dumps(Demanding(3, unit="tokens")))  # noqa: S301 (our own)
    assert (again.message, again.hint, again.details, again.limit) == ("at most 3 tokens", "ask for less", details, 3)
