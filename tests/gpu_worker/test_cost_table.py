"""Goal: costs follow what is measured, quickly where it lasts, hardly where it happened once, and
forget what is no longer measured.

Method: a made-up link, device and worker with known costs, measured with noise and outliers.
"""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpu_worker.cost_model import ExpertLoad, LayerCosts, LayerTime, LinkCost, NearCost, RunCost
from gpu_worker.cost_table import (
    LEAST_FIXED_S,
    MAX_NEAR_FACTOR,
    CopyTime,
    CostTable,
    after_copy,
    slower,
)

TRUE = LinkCost(bytes_per_s=1e8, call_s=0.002)
START = LayerCosts(
    LinkCost(1e9, call_s=0.0005), RunCost(1e-5), NearCost(RunCost(1e-4)), fixed_s=1e-4
)
LOADS = [ExpertLoad(num_pairs=4, run_bytes=1e6), ExpertLoad(num_pairs=1, run_bytes=1e6)]


def copy(link: LinkCost, num_bytes: int, num_calls: int = 1, noise: float = 1.0) -> CopyTime:
    seconds = num_calls * link.call_s + num_bytes / link.bytes_per_s
    return CopyTime(num_bytes, num_calls, seconds * noise)


def test_both_parts_of_the_link_s_cost_are_found_from_small_and_large_copies() -> None:
    draw, table = random.Random(5), CostTable(START)
    for _ in range(300):
        num_bytes = draw.choice([1_000, 5_000_000])
        noise = draw.uniform(0.8, 1.25) * (20 if draw.random() < 0.02 else 1)
        table.copied(copy(TRUE, num_bytes, noise=noise))
    link = table.costs().link
    assert link.bytes_per_s == pytest.approx(TRUE.bytes_per_s, rel=0.25)
    assert link.call_s == pytest.approx(TRUE.call_s, rel=0.25)


def test_a_link_cut_to_a_tenth_is_believed_after_a_dozen_copies_and_one_bad_copy_is_not() -> None:
    table = CostTable(LayerCosts(LinkCost(1e8), RunCost(0.0)))
    table.copied(CopyTime(1_000_000, 1, seconds=1.0))  # 100 times too long
    assert table.costs().link.bytes_per_s > 0.75 * 1e8
    for _ in range(12):
        table.copied(copy(LinkCost(1e7), 1_000_000))
    assert table.costs().link.bytes_per_s == pytest.approx(1e7, rel=0.25)


@given(st.floats(1e3, 1e12), st.floats(0, 1.0), st.integers(1, 10**9), st.floats(1e-9, 1e4))
def test_a_cost_moves_towards_what_was_seen_and_stays_a_cost(
    bytes_per_s: float, call_s: float, num_bytes: int, seconds: float
) -> None:
    before = LinkCost(bytes_per_s, call_s)
    seen = CopyTime(num_bytes, 1, seconds)
    after = after_copy(before, seen)
    expected_s = before.seconds(num_bytes)
    if expected_s == 0:
        assert after == before
    elif seconds > expected_s:
        assert after.seconds(num_bytes) >= expected_s * (1 - 1e-9)
    else:
        assert after.seconds(num_bytes) <= expected_s * (1 + 1e-9)


def test_near_data_is_learned_as_a_whole_and_losing_it_makes_it_dear() -> None:
    table, true = CostTable(START), slower(NearCost(RunCost(1e-4)), 3)
    for _ in range(20):
        table.ran_near(LOADS, true.seconds(LOADS))
    near = table.costs().near
    assert near is not None
    assert near.seconds(LOADS) == pytest.approx(true.seconds(LOADS), rel=0.05)
    for _ in range(10):
        table.lost_near()
    dearer = table.costs().near
    assert dearer is not None
    assert dearer.seconds(LOADS) > 10 * near.seconds(LOADS)


def test_a_worker_lost_for_good_stays_a_cost_that_can_be_reckoned_with() -> None:
    """Where near data runs every pair, whatever it costs, each layer loses it once more."""
    table = CostTable(START)
    for _ in range(5000):
        table.lost_near()
    table.end_step()
    table.end_step()  # nothing was measured: back towards the start
    near = table.costs().near
    assert near is not None
    assert START.near is not None
    assert near.seconds(LOADS) <= MAX_NEAR_FACTOR * START.near.seconds(LOADS)


def test_layers_that_took_less_than_predicted_for_long_do_not_end_learning() -> None:
    table = CostTable(START)
    for _ in range(5000):
        costs = table.costs()
        table.ran_layer(LayerTime(link_s=1.0, fixed_s=costs.fixed_s), 0.5, busy_s=None)
    assert table.costs().fixed_s == LEAST_FIXED_S
    for _ in range(100):
        costs = table.costs()
        table.ran_layer(LayerTime(fixed_s=costs.fixed_s), 0.001, busy_s=None)
    assert table.costs().fixed_s == pytest.approx(0.001, rel=0.05)


def test_what_is_not_measured_goes_back_to_its_start_value_and_what_is_does_not() -> None:
    table = CostTable(START)
    for _ in range(20):
        table.lost_near()
        table.copied(copy(TRUE, 5_000_000))
    learned = table.costs().link.bytes_per_s
    table.end_step()  # both were measured in this step
    assert table.costs().link.bytes_per_s == learned
    for _ in range(500):
        table.copied(copy(table.costs().link, 5_000_000))
        table.end_step()
    costs = table.costs()
    assert costs.link.bytes_per_s == pytest.approx(learned, rel=0.01)
    assert costs.near is not None
    assert START.near is not None
    assert costs.near.seconds(LOADS) == pytest.approx(START.near.seconds(LOADS), rel=0.2)


@pytest.mark.parametrize("true_device_s", [0.0031, 0.0000002])
def test_device_and_fixed_time_are_learned_so_that_layers_take_what_is_predicted(
    true_device_s: float,
) -> None:
    """A hundred pairs on the device, a copy beside it, and half a millisecond besides."""
    table, link_s, fixed_s = CostTable(START), 0.004, 0.0005
    for _ in range(300):
        costs = table.costs()
        device_s = costs.device.seconds(100, 0)
        time = LayerTime(link_s=link_s, device_s=device_s, tail_s=device_s, fixed_s=costs.fixed_s)
        layer_s = link_s + true_device_s + fixed_s
        table.ran_layer(time, layer_s, busy_s=true_device_s + fixed_s)
    assert time.total_s == pytest.approx(layer_s, rel=0.05)
    if true_device_s > fixed_s:
        assert device_s == pytest.approx(true_device_s, rel=0.2)


def test_a_layer_of_which_the_device_s_time_is_not_known_teaches_only_what_is_fixed() -> None:
    table = CostTable(START)
    table.ran_layer(LayerTime(device_s=0.01, fixed_s=START.fixed_s), 1.0, busy_s=None)
    assert table.costs().device == START.device
    assert table.costs().fixed_s > START.fixed_s
    table.ran_layer(LayerTime(), 1.0, busy_s=1.0)  # nothing was predicted: nothing is learned


def test_a_copy_is_no_faster_than_the_device_takes_it() -> None:
    table = CostTable(START, device_bytes_per_s=1e6)
    assert table.costs().link.bytes_per_s == 1e6
    for _ in range(60):
        table.copied(copy(LinkCost(1e5), 5_000_000))
    assert table.costs().link.bytes_per_s == pytest.approx(1e5, rel=0.1)
