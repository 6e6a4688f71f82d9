"""News of the hot paths as messages: `hotpath.promoted`, `hotpath.quarantined`, `hotpath.alert` and so on.

The room of the hot paths lies below this one and knows nothing of it: `recording` connects the two.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import get_args

from synapse.callosum.payloads import Payload, event
from synapse.callosum.publish.publishing import publish
from synapse.hotpath.news import WARNINGS, Kind, News, listen

URGENT = 7


class HotPathNews(Payload):
    """Something that happened to a hot path; `build` is empty where it does not matter."""

    path: str
    build: str
    message: str


for _kind in get_args(Kind):
    event(f"hotpath.{_kind}")(HotPathNews)


def publish_news(news: News) -> None:
    """Publish a piece of news, what somebody should look at with a higher priority."""
    payload = HotPathNews(path=news.path, build=news.build, message=news.message)
    publish(f"hotpath.{news.kind}", payload, priority=URGENT if news.kind in WARNINGS else 4)


_lock = threading.Lock()
_followers = 0
_unlisten: Callable[[], None] | None = None


def follow_news() -> Callable[[], None]:
    """Publish all news from now on, each once however many follow. Returns what ends that for this follower."""
    global _followers, _unlisten  # noqa: PLW0603 - one list of listeners a process
    with _lock:
        _followers += 1
        if _unlisten is None:
            _unlisten = listen(publish_news)
    return _unfollow


def _unfollow() -> None:
    global _followers, _unlisten  # noqa: PLW0603
    with _lock:
        _followers -= 1
        if not _followers and _unlisten is not None:
            _unlisten()
            _unlisten = None
