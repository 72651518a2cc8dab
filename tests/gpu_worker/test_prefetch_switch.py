"""Goal: fetching ahead goes on where steps were faster with it, stops where they were not, and is
tried again later. Method: made-up seconds; nothing here waits."""

from __future__ import annotations

import pytest

from gpu_worker.prefetch_switch import HOLD_STEPS, MAX_HOLD_STEPS, TRIAL_STEPS, PrefetchSwitch


def play(switch: PrefetchSwitch, steps: int, rows: int, *, on_s: float, off_s: float) -> list[bool]:
    choices = []
    for _ in range(steps):
        is_on = switch.is_on(rows)
        choices.append(is_on)
        switch.observe(rows, on_s if is_on else off_s, was_on=is_on)
    return choices


@pytest.mark.parametrize(("on_s", "off_s"), [(1.0, 2.0), (2.0, 1.0)])
def test_after_a_fair_trial_the_faster_way_is_kept(on_s: float, off_s: float) -> None:
    switch = PrefetchSwitch("adaptive")
    trial = play(switch, 2 * TRIAL_STEPS, 8, on_s=on_s, off_s=off_s)
    assert sum(trial) == TRIAL_STEPS
    held = play(switch, HOLD_STEPS, 8, on_s=on_s, off_s=off_s)
    assert set(held) == {on_s < off_s}


def test_it_is_tried_again_and_a_changed_link_changes_it() -> None:
    switch = PrefetchSwitch("adaptive")
    play(switch, 2 * TRIAL_STEPS + HOLD_STEPS, 1, on_s=1, off_s=2)
    again = play(switch, 2 * TRIAL_STEPS, 1, on_s=3, off_s=2)
    assert sum(again) == TRIAL_STEPS
    assert not any(play(switch, HOLD_STEPS, 1, on_s=3, off_s=2))


def test_a_confirmed_decision_lasts_longer_up_to_a_limit() -> None:
    switch, lengths = PrefetchSwitch("adaptive"), []
    for _ in range(9):
        play(switch, 2 * TRIAL_STEPS, 1, on_s=1, off_s=2)
        length = 0
        while switch.is_on(1) and length < 2 * MAX_HOLD_STEPS:
            switch.observe(1, 1.0, was_on=True)
            length += 1
            if switch._arms[1].hold == 0:
                break
        lengths.append(length)
    assert lengths[:3] == [HOLD_STEPS, 2 * HOLD_STEPS, 4 * HOLD_STEPS]
    assert max(lengths) == MAX_HOLD_STEPS


def test_sizes_of_step_decide_for_themselves() -> None:
    switch = PrefetchSwitch("adaptive")
    play(switch, 2 * TRIAL_STEPS, 1, on_s=1, off_s=2)
    play(switch, 2 * TRIAL_STEPS, 100, on_s=2, off_s=1)
    assert switch.is_on(1)
    assert not switch.is_on(100)
    assert not switch.is_on(127)


@pytest.mark.parametrize(("mode", "expected"), [("always", True), ("never", False)])
def test_always_and_never_learn_nothing(mode: str, expected: bool) -> None:
    switch = PrefetchSwitch(mode)  # type: ignore[arg-type]
    assert set(play(switch, 99, 4, on_s=9, off_s=1)) == {expected}
