"""Goal: seconds follow from bytes, counts and costs as the docstrings say; wrong costs are refused.

Method: sums by hand in round numbers, and properties over random layers.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpu_worker.cost_model import ExpertLoad, LayerCosts, LinkCost, NearCost, RunCost

MEGABYTE = 1e6
LINK = LinkCost(bytes_per_s=1000 * MEGABYTE, call_s=0.001, request_bytes=4_000_000)
DEVICE = RunCost(pair_s=0.0001, bytes_per_s=10_000 * MEGABYTE, expert_s=0.0002)
NEAR = NearCost(RunCost(pair_s=0.001), call_s=0.0005, act_bytes_per_s=100 * MEGABYTE)


def test_a_copy_takes_its_bytes_and_a_call_for_each_request() -> None:
    assert LINK.seconds(0) == 0
    assert LINK.seconds(1_000_000) == pytest.approx(0.001 + 0.001)
    assert LINK.num_calls(4_000_000) == 1
    assert LINK.seconds(10_000_000) == pytest.approx(3 * 0.001 + 0.010)
    assert LinkCost(1e6, call_s=2.0).seconds(5e6) == pytest.approx(2 + 5)


def test_an_expert_is_as_slow_as_its_bytes_or_its_arithmetic() -> None:
    assert DEVICE.seconds(0, 1e6) == 0
    assert DEVICE.seconds(1, 10e6) == pytest.approx(0.0002 + 0.001)  # bytes
    assert DEVICE.seconds(100, 10e6) == pytest.approx(0.0002 + 0.010)  # pairs
    assert DEVICE.scaled(3).seconds(100, 10e6) == pytest.approx(3 * DEVICE.seconds(100, 10e6))
    assert DEVICE.scaled(3).seconds(1, 10e6) == pytest.approx(3 * DEVICE.seconds(1, 10e6))


def test_near_data_spreads_over_workers_but_cuts_no_expert() -> None:
    loads = [ExpertLoad(num_pairs=n, run_bytes=0, act_bytes=100_000) for n in (1, 1, 4)]
    assert NEAR.seconds([]) == 0
    assert NEAR.seconds(loads) == pytest.approx(0.0005 + 0.006 + 0.003)
    two = NearCost(NEAR.run, call_s=0.0005, num_workers=2)
    assert two.seconds(loads) == pytest.approx(0.0005 + 0.004)  # not 0.003: the expert with 4
    assert two.seconds(loads[:2]) == pytest.approx(0.0005 + 0.001)


def test_a_layer_lasts_as_long_as_the_slowest_of_copies_device_and_near_data() -> None:
    costs = LayerCosts(LINK, DEVICE, NEAR, fixed_s=0.01)
    resident = ExpertLoad(num_pairs=10, run_bytes=0)  # 1.2 ms
    streamed = ExpertLoad(num_pairs=10, run_bytes=0, copy_bytes=1e6)  # 2 ms, then 1.2 ms
    remote = ExpertLoad(num_pairs=7, run_bytes=0)  # 7.5 ms
    assert costs.layer([resident]).total_s == pytest.approx(0.01 + 0.0012)
    # The resident one is computed while the other is copied.
    assert costs.layer([resident, streamed]).total_s == pytest.approx(0.01 + 0.002 + 0.0012)
    both = costs.layer([resident, streamed], [remote])
    assert (both.near_s, both.total_s) == (pytest.approx(0.0075), pytest.approx(0.0175))
    many = costs.layer([resident] * 5 + [streamed])  # the device is the slowest
    assert many.total_s == pytest.approx(0.01 + 6 * 0.0012)
    # Eight requests: all but the last eighth of the computing hides behind the copies.
    large = costs.layer([ExpertLoad(10, 0, copy_bytes=4e6)] * 8)
    assert large.tail_s == pytest.approx(0.0012)
    assert large.total_s == pytest.approx(0.01 + 8 * 0.005 + 0.0012)


loads = st.builds(
    ExpertLoad,
    num_pairs=st.integers(1, 64),
    run_bytes=st.floats(0, 1e8),
    copy_bytes=st.one_of(st.just(0.0), st.floats(1, 1e8)),
    act_bytes=st.floats(0, 1e6),
)


@settings(deadline=None)
@given(st.lists(loads, min_size=1, max_size=6), st.lists(loads, max_size=6), st.floats(0.01, 0.99))
def test_more_work_and_slower_links_never_end_sooner(
    local: list[ExpertLoad], near: list[ExpertLoad], slower: float
) -> None:
    costs = LayerCosts(LINK, DEVICE, NEAR)
    time = costs.layer(local, near)
    assert time.total_s >= max(time.link_s, time.device_s, time.near_s) > 0
    slow_link = LinkCost(LINK.bytes_per_s * slower, LINK.call_s, LINK.request_bytes)
    assert LayerCosts(slow_link, DEVICE, NEAR).layer(local, near).total_s >= time.total_s
    assert LayerCosts(LINK, DEVICE.scaled(2), NEAR).layer(local, near).total_s >= time.total_s
    assert costs.layer(local, [*near, local[0]]).near_s >= time.near_s


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: LinkCost(0), "bytes_per_s: got 0"),
        (lambda: LinkCost(math.nan), "bytes_per_s: got nan"),
        (lambda: LinkCost(1, call_s=-1), "call_s: got -1"),
        (lambda: RunCost(pair_s=math.inf), "pair_s: got inf"),
        (lambda: RunCost(0, bytes_per_s=-1), "bytes_per_s: got -1"),
        (lambda: RunCost(0, expert_s=math.nan), "expert_s: got nan"),
        (lambda: NearCost(RunCost(0), num_workers=0), "num_workers: got 0"),
        (lambda: NearCost(RunCost(0), act_bytes_per_s=0), "act_bytes_per_s: got 0"),
        (lambda: LayerCosts(LINK, DEVICE, fixed_s=-1), "fixed_s: got -1"),
    ],
)
def test_costs_that_cannot_be_are_refused(wrong: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        wrong()
