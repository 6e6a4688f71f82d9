"""Hot paths: a readable reference and a native kernel side by side, picked per call and rolled out safely.

`@hotpath` ties the two together; see docs/guide/hotpaths.md.
"""

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
