"""Which engine answers, and why when it is not the native one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Answering:
    """Who computes the steps of an engine, as of now.

    Attributes:
        reason: why it is the reference; empty for the native engine.
        hint: what to do about that; empty where nothing is to be done.
    """

    backend: Literal["native", "reference"]
    reason: str = ""
    hint: str = ""

    def __str__(self) -> str:
        if self.backend == "native":
            return "the native engine answers"
        return f"the reference engine answers, which is many times slower: {self.reason}"


NATIVE = Answering("native")
ASKED_FOR = Answering("reference", "the setting backend says so", "set SYNAPSE_BACKEND=auto")
