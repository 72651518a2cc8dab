"""Goal: every second of a step counts once, for the innermost part, and nothing stays wrapped.

Method: functions that call each other, with a clock that they advance themselves.
"""

from __future__ import annotations

import pytest

from benchmarks import stopwatch
from benchmarks.stopwatch import Stopwatch, Timed


class Clock:
    now = 0.0

    def perf_counter(self) -> float:
        return self.now


class Work:
    """outer takes 1 s, calls inner (2 s) twice, and 4 s more."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def outer(self, *, fail: bool = False) -> str:
        self.clock.now += 1
        self.inner()
        self.inner()
        self.clock.now += 4
        if fail:
            raise ValueError("on purpose")
        return "done"

    def inner(self) -> None:
        self.clock.now += 2


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> Work:
    clock = Clock()
    monkeypatch.setattr(stopwatch, "time", clock)
    return Work(clock)


TIMED = (Timed("out", Work, "outer"), Timed("in", Work, "inner"))


def test_a_part_has_its_own_seconds_only(work: Work) -> None:
    watch = Stopwatch()
    with watch.on(TIMED):
        assert work.outer() == "done"
    assert dict(watch.seconds) == {"out": 5.0, "in": 4.0}
    assert dict(watch.calls) == {"out": 1, "in": 2}


def test_an_error_passes_and_is_timed(work: Work) -> None:
    watch = Stopwatch()
    with watch.on(TIMED), pytest.raises(ValueError, match="on purpose"):
        work.outer(fail=True)
    assert dict(watch.seconds) == {"out": 5.0, "in": 4.0}


def test_nothing_stays_wrapped_and_reset_forgets(work: Work) -> None:
    watch, before = Stopwatch(), (Work.outer, Work.inner)
    with watch.on(TIMED):
        work.outer()
        watch.reset()
        work.inner()
    assert dict(watch.seconds) == {"in": 2.0}
    assert (Work.outer, Work.inner) == before
