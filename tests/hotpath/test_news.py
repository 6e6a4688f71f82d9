"""News is logged and passed on."""

from __future__ import annotations

from structlog.testing import capture_logs

from synapse.hotpath.news import News, listen, tell

HELD = News("held", "total", "b1", "an answer did not agree")


def test_everybody_who_listens_hears_it_until_they_stop() -> None:
    heard: list[News] = []
    stop = listen(heard.append)
    tell(HELD)
    stop()
    tell(HELD)
    assert heard == [HELD]


def test_a_listener_that_fails_keeps_nobody_else_from_hearing_and_is_logged() -> None:
    def fails(news: News) -> None:
        raise RuntimeError("the bus is away")

    heard: list[News] = []
    stops = [listen(fails), listen(heard.append)]
    with capture_logs() as logs:
        tell(HELD)
    for stop in stops:
        stop()
    assert heard == [HELD]
    assert [(entry["event"], entry["log_level"]) for entry in logs] == [
        ("hotpath.held", "warning"),
        ("hotpath.listener_failed", "error"),
    ]
