"""How far something can be trusted: the one lattice of Synapse.

Four grades form a chain, ``! < ? < ~ < ‽``. What is made from several parts has the grade of the least trusted one.
"""

from __future__ import annotations

from enum import IntEnum


class Evidence(IntEnum):
    """The grade of a value; a larger number is trusted less."""

    KNOWN = 0
    """``!`` What this system made or checked itself, or what a person typed to their own system."""
    UNCERTAIN = 1
    """``?`` What may be absent, or may have failed."""
    REPORTED = 2
    """``~`` What a model, the network, a sensor or somebody else's file says."""
    PARADOX = 3
    """``‽`` What was asserted across a boundary by hand."""

    @property
    def mark(self) -> str:
        """The sign that stands for it: one of ``! ? ~ ‽``."""
        return "!?~‽"[self]


def join(*parts: Evidence) -> Evidence:
    """The grade of what is made from `parts`: that of the least trusted. Of nothing it is `KNOWN`."""
    return max(parts, default=Evidence.KNOWN)
