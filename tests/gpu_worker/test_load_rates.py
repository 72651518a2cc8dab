"""Goal: rates are what happened between two looks. Method: two hand-made snapshots and a clock."""

from __future__ import annotations

from gpu_worker.load_rates import MIN_WINDOW_S, LoadRates
from gpu_worker.messages import WorkerStats

BEFORE = WorkerStats("r", 1, 0, 0, steps=10, computed_tokens=100, output_tokens=20, busy_s=5.0)
AFTER = WorkerStats(
    "r",
    2,
    1,
    64,
    steps=30,
    computed_tokens=400,
    output_tokens=60,
    counters={"wait_s": 0.5},
    finished={"stop": 3, "queue_full": 1},
    busy_s=6.0,
)


def test_rates_are_differences_over_time() -> None:
    rates = LoadRates()
    assert set(rates.gauges(BEFORE, 50.0)) == {
        "moetier_running_sequences",
        "moetier_waiting_sequences",
        "moetier_waiting_tokens",
    }
    assert rates.gauges(AFTER, 52.0) == {
        "moetier_running_sequences": 2,
        "moetier_waiting_sequences": 1,
        "moetier_waiting_tokens": 64,
        "moetier_arrivals_per_s": 3.0,  # 4 ended and 3 are here, against 1
        "moetier_prompt_tokens_per_s": 130.0,
        "moetier_answer_tokens_per_s": 20.0,
        "moetier_steps_per_s": 10.0,
        "moetier_busy_share": 0.5,
        "moetier_wait_share": 0.5,
    }


def test_asked_again_at_once_the_last_rates_hold() -> None:
    rates = LoadRates()
    rates.gauges(BEFORE, 50.0)
    rates.gauges(AFTER, 52.0)
    again = rates.gauges(AFTER, 52.0 + MIN_WINDOW_S / 2)
    assert again["moetier_steps_per_s"] == 10.0
    assert rates.gauges(AFTER, 53.0)["moetier_steps_per_s"] == 0.0


def test_an_idle_worker_waits_for_nothing() -> None:
    rates = LoadRates()
    rates.gauges(BEFORE, 0.0)
    assert rates.gauges(BEFORE, 1.0)["moetier_wait_share"] == 0.0
