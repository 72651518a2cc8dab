"""Goal: an outage is two log lines, however many steps it lasts and however it flickers.

Method: steps told at times of a fake clock.
"""

from __future__ import annotations

import logging

import pytest

from gpu_worker.outage import QUIET_S, OutageLog


def test_a_line_at_each_end(caplog: pytest.LogCaptureFixture) -> None:
    now_s = 0.0
    outage = OutageLog("w", lambda: now_s)
    with caplog.at_level(logging.WARNING):
        outage.stepped(0)
        for moment_s in (1.0, 2.0, 3.0 + QUIET_S / 2):
            now_s = moment_s
            outage.stepped(4)
            outage.stepped(0)  # a step whose compensators were in the cache
            assert outage.is_on
        now_s += QUIET_S - 0.1
        outage.stepped(0)
        assert outage.is_on
        now_s += 0.2
        outage.stepped(0)
        outage.stepped(0)
        assert not outage.is_on
        begin, end = (record.getMessage() for record in caplog.records)
        assert "cannot be had" in begin
        assert f"12 pairs were degraded within {2.0 + QUIET_S / 2:.1f} s" in end
        outage.stepped(1)
    assert len(caplog.records) == 3, "a new outage is told again"
