"""Goal: a lease runs out once, after the time since the last renewal and no sooner.

Method: real threads and short times; only orders are asserted, no durations.
"""

from __future__ import annotations

import threading
import time

import pytest

from expert_store.lease import Lease


def test_it_runs_out_when_nobody_renews_it() -> None:
    ended = threading.Event()
    Lease(0.05, ended.set)
    assert ended.wait(10)


def test_a_renewed_one_lasts() -> None:
    now_s, ended = [0.0], threading.Event()
    lease = Lease(0.2, ended.set, clock=lambda: now_s[0])
    for _ in range(10):
        now_s[0] += 0.15
        lease.renew()
        time.sleep(0.03)
    assert not ended.is_set()
    now_s[0] += 0.25
    assert ended.wait(10)


def test_a_closed_one_never_runs_out() -> None:
    ended = threading.Event()
    lease = Lease(0.05, ended.set)
    lease.close()
    assert not ended.wait(0.3)


def test_nonsense_is_refused() -> None:
    with pytest.raises(ValueError, match="seconds: got 0"):
        Lease(0, lambda: None)
