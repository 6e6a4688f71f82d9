"""Hot paths: a readable reference and a native kernel side by side, picked per call and rolled out safely.

`@hotpath` ties the two together; see docs/guide/hotpaths.md. What is named here is loaded when it is first used: who
only wants to hear the news of hot paths loads none of them.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from synapse.hotpath.call import HotPath
    from synapse.hotpath.news import News, listen
    from synapse.hotpath.paths import PATHS, Readiness, hotpath, ready
    from synapse.hotpath.rollout.plan import STAGES, Plan, Stage
    from synapse.kernels.native import FoundBuild, NativeSide, python_forced

__all__ = [
    "PATHS",
    "STAGES",
    "FoundBuild",
    "HotPath",
    "NativeSide",
    "News",
    "Plan",
    "Readiness",
    "Stage",
    "hotpath",
    "listen",
    "python_forced",
    "ready",
]

_PLACES = {
    "synapse.hotpath.call": ("HotPath",),
    "synapse.hotpath.news": ("News", "listen"),
    "synapse.hotpath.paths": ("PATHS", "Readiness", "hotpath", "ready"),
    "synapse.hotpath.rollout.plan": ("STAGES", "Plan", "Stage"),
    "synapse.kernels.native": ("FoundBuild", "NativeSide", "python_forced"),
}


def __getattr__(name: str) -> Any:
    for module, names in _PLACES.items():
        if name in names:
            return getattr(import_module(module), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
