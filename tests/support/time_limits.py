"""Tests with hypothesis on a loaded machine: no deadline for a single example, and a time limit that says what it is.

The time limit of pytest-timeout fails a test by an exception that hypothesis takes for a failing example: it tries it
again, succeeds, and reports a flaky test instead. Here the same limit raises what hypothesis lets pass.
"""

from __future__ import annotations

import signal
from typing import Any, NoReturn

import hypothesis
import pytest


class TookTooLong(BaseException):
    """The time limit of a test passed. Not an Exception: neither the test nor hypothesis shall catch it."""


def use_patient_profile() -> None:
    """Judge examples by what they show, not by how long they take to make or to run."""
    hypothesis.settings.register_profile(
        "patient", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow], print_blob=True
    )
    hypothesis.settings.load_profile("patient")


def _is_hypothesis_test(item: pytest.Item) -> bool:
    return bool(hypothesis.is_hypothesis_test(getattr(item, "obj", None)))


@pytest.hookimpl(tryfirst=True)
def pytest_timeout_set_timer(item: pytest.Item, settings: Any) -> bool | None:
    """Set the timer of a test with hypothesis; the others have pytest-timeout's own."""
    if settings.method != "signal" or not _is_hypothesis_test(item):
        return None

    def expired(number: int, frame: Any) -> NoReturn:
        raise TookTooLong(f"the test took longer than its {settings.timeout:g} seconds")

    signal.signal(signal.SIGALRM, expired)
    signal.setitimer(signal.ITIMER_REAL, settings.timeout)
    return True


@pytest.hookimpl(tryfirst=True)
def pytest_timeout_cancel_timer(item: pytest.Item) -> bool | None:
    """Take the timer back."""
    if not _is_hypothesis_test(item):
        return None
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    return True
