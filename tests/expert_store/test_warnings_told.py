"""Goal: what goes wrong with every call fills no log, and how often it went wrong is told.

Method: a clock of the test, the records that logging made, and threads that warn at once.
"""

from __future__ import annotations

import logging
import threading

import pytest

from expert_store.warnings_told import MAX_NAMES, TELL_AGAIN_S, WarningsTold

LOGGER = logging.getLogger("told")


class Clock:
    now_s = 5.0

    def __call__(self) -> float:
        return self.now_s


def test_each_is_told_once_a_minute_with_its_count(caplog: pytest.LogCaptureFixture) -> None:
    told = WarningsTold(LOGGER, clock := Clock())
    for _ in range(4):
        told.warn("a", "%s is lost", "a")
        told.warn("b", "%d%% lost", 100)
    assert caplog.messages == ["a is lost", "100% lost"]
    clock.now_s += TELL_AGAIN_S - 1
    told.warn("a", "%s is lost", "a")
    assert len(caplog.messages) == 2
    clock.now_s += 1
    told.warn("a", "%s is lost", "a")
    told.warn("a", "%s is lost", "a")
    assert caplog.messages[2:] == ["a is lost (4 more in the 60 s before)"]
    clock.now_s += 10 * TELL_AGAIN_S
    told.warn("a", "%s is lost", "a")
    assert caplog.messages[3:] == ["a is lost (1 more in the 600 s before)"]


def test_no_more_names_are_kept_than_allowed(caplog: pytest.LogCaptureFixture) -> None:
    told = WarningsTold(LOGGER, Clock())
    for name in range(MAX_NAMES + 1):
        told.warn(name, "%d", name)
    caplog.clear()
    told.warn(MAX_NAMES, "still known")
    told.warn(1, "still known")
    told.warn(0, "forgotten")
    assert caplog.messages == ["forgotten"]


def test_threads_tell_it_once(caplog: pytest.LogCaptureFixture) -> None:
    told = WarningsTold(LOGGER, clock := Clock())
    start = threading.Barrier(4)

    def warn() -> None:
        start.wait()
        for _ in range(500):
            told.warn("a", "lost")

    threads = [threading.Thread(target=warn) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    clock.now_s += TELL_AGAIN_S
    told.warn("a", "lost")
    assert caplog.messages == ["lost", "lost (1999 more in the 60 s before)"]
