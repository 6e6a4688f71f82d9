"""What other rooms are told: a rollout moved, a kernel was quarantined, an alert was raised.

This room knows nobody above it. Whoever starts the process connects `listen` to where news should go.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from synapse.log import Logger

log = Logger("synapse.hotpath", through_logging=True)

Kind = Literal[
    "promoted",
    "rolled_back",
    "held",
    "quarantined",
    "killed",
    "suspended",
    "paused",
    "resumed",
    "cleared",
    "burned_in",
    "alert",
    "alert_over",
]
STOPS: frozenset[Kind] = frozenset({"held", "quarantined", "suspended"})
WARNINGS: frozenset[Kind] = STOPS | {"rolled_back", "killed", "alert"}


@dataclass(frozen=True, slots=True)
class News:
    """Something that happened to a hot path. `build` is the kernel's build, empty where it does not matter."""

    kind: Kind
    path: str
    build: str
    message: str


def stopped_hint(path: str) -> str:
    """What helps when the kernel of a hot path may answer nothing."""
    return f"the reference answers, which is slower; `synapse hotpath clear {path}` lets the kernel begin anew"


Listener = Callable[[News], None]
_listeners: list[Listener] = []


def listen(listener: Listener) -> Callable[[], None]:
    """Call `listener` with every piece of news, in the thread that found it. Returns what ends that."""
    _listeners.append(listener)
    return lambda: _listeners.remove(listener)


def tell(news: News) -> None:
    """Log a piece of news and pass it on. A listener that raises is logged and keeps nobody else from hearing it."""
    write = log.warning if news.kind in WARNINGS else log.info
    hint = {"hint": stopped_hint(news.path)} if news.kind in STOPS else {}
    write(f"hotpath.{news.kind}", path=news.path, build=news.build, message=news.message, **hint)
    for listener in list(_listeners):
        try:
            listener(news)
        except Exception:
            log.exception("hotpath.listener_failed", path=news.path, kind=news.kind)
