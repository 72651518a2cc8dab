"""Goal: the fault and soak reports count what happened. Method: outcomes and samples by hand."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path

import pytest

from benchmarks.faults import page
from benchmarks.faults.catalogue import ALL, Fault
from benchmarks.faults.outcomes import (
    Figures,
    Outcome,
    Times,
    dump,
    figures,
    has_alternative,
    load,
    tokens_per_s,
)
from benchmarks.faults.run import Result
from benchmarks.faults.samples import Sample, role_of, slope, trends
from benchmarks.soak import GROWS_MB_PER_H, Run, grows
from benchmarks.soak import page as soak_page
from cluster.processes import Process

TIMES = Times(from_s=0.0, fault_s=10.0, whole_s=14.0, to_s=20.0)


def answer(number: int, started_s: float, ended_s: float | None, **more: object) -> Outcome:
    first_s = None if ended_s is None else started_s
    return Outcome(number, "stream", 0, started_s, ended_s, first_s, **more)  # type: ignore[arg-type]


def test_only_what_was_under_way_since_the_fault_is_counted() -> None:
    outcomes = [
        answer(1, 1.0, 9.0, tokens=16, text="a", longest_wait_s=2.0, wait_from_s=3.0),
        answer(2, 9.0, 12.0, tokens=3, text="a", longest_wait_s=1.5, wait_from_s=9.5),
        answer(3, 11.0, 13.0, tokens=2, text="a", error="500"),
        answer(4, 15.0, 16.0, tokens=4, text="b"),
        answer(5, 15.0, 17.0, tokens=4, text="b", degraded=True),
        answer(6, 19.0, None),
        answer(7, 21.0, 22.0, error="500"),
    ]
    found = figures(outcomes, TIMES, "nothing", {0: "a"})
    assert (found.sent, found.failed, found.failed_with_alternative) == (5, 2, 2)
    assert (found.degraded, found.changed) == (1, 1), "a degraded answer may differ"
    assert (found.wait_before_s, found.wait_s) == (2.0, 1.5)
    assert found.full_quality_s == 10.0, "request 6 never ended"
    assert found.tokens_per_s_before == pytest.approx((16 + 1) / 10)
    assert found.tokens_per_s_during == pytest.approx((2 + 2) / 4)
    assert found.tokens_per_s_after == pytest.approx(8 / 6)
    assert found.errors == "1 x 500; 1 x did not end"


def test_quality_is_full_when_all_stands_and_the_last_failed_request_has_ended() -> None:
    whole = figures([answer(1, 9.0, 11.0)], TIMES, "nothing", {0: ""})
    assert whole.full_quality_s == 4.0
    late = figures([answer(1, 9.0, 15.0, degraded=True)], TIMES, "nothing", {0: ""})
    assert late.full_quality_s == 5.0
    never = figures([], dataclasses.replace(TIMES, whole_s=None), "nothing", {0: ""})
    assert never.full_quality_s is None


def test_a_wait_into_which_the_fault_fell_is_of_the_fault() -> None:
    outcome = answer(1, 8.0, 13.0, longest_wait_s=4.0, wait_from_s=9.0)
    found = figures([outcome], TIMES, "nothing", {0: ""})
    assert (found.wait_before_s, found.wait_s) == (0.0, 4.0)


def test_what_a_fault_may_end() -> None:
    streaming = answer(1, 9.0, 11.0, error="gone")
    waiting = dataclasses.replace(streaming, first_token_s=None)
    whole = dataclasses.replace(streaming, kind="unary")
    later = dataclasses.replace(streaming, started_s=10.5)
    for outcome, spared in (
        (streaming, {"started streams", "in flight"}),
        (waiting, {"in flight"}),
        (whole, {"in flight"}),
        (later, set()),
    ):
        for kind in ("nothing", "started streams", "in flight"):
            assert has_alternative(outcome, 10.0, kind) == (kind not in spared)  # type: ignore[arg-type]


def test_tokens_lie_evenly_between_the_first_and_the_last() -> None:
    outcomes = [answer(1, 0.0, 4.0, tokens=8), answer(2, 3.0, None, tokens=5)]
    assert tokens_per_s(outcomes, 1.0, 3.0) == 2.0
    assert tokens_per_s(outcomes, 4.0, 4.0) == 0.0


def test_a_file_that_is_being_written_is_read_up_to_its_last_whole_line(tmp_path: Path) -> None:
    path = tmp_path / "outcomes.jsonl"
    begun, ended = answer(1, 0.0, None), answer(1, 0.0, 4.0, tokens=8)
    path.write_text(dump(begun) + dump(ended) + dump(answer(2, 1.0, 2.0))[:-5])
    assert load(path) == [ended]


SEEN = Figures(
    sent=9,
    failed=1,
    failed_with_alternative=0,
    degraded=0,
    changed=0,
    wait_before_s=0.5,
    wait_s=0.9,
    full_quality_s=3.0,
    tokens_per_s_before=30.0,
    tokens_per_s_during=20.0,
    tokens_per_s_after=29.5,
    errors="",
)
STRICT = Fault("x", "x", lambda _: None, wait_target_s=1.0, keeps_throughput=True)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({}, []),
        ({"failed_with_alternative": 1}, ["1 failed that could be answered"]),
        ({"changed": 2}, ["2 answers changed"]),
        ({"wait_s": 1.0}, ["waited 1.00 s, target below 1 s"]),
        ({"full_quality_s": None}, ["not whole again"]),
        ({"tokens_per_s_after": 27.0}, ["tokens/s -10.0%, target above -2%"]),
    ],
)
def test_a_missed_target_is_written_as_missed(change: dict[str, object], told: list[str]) -> None:
    seen = dataclasses.replace(SEEN, **change)  # type: ignore[arg-type]
    assert page.missed(Result(STRICT, seen)) == told


def test_rows_are_kept_from_run_to_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "CSV", tmp_path / "faults.csv")
    monkeypatch.setattr(page, "PAGE", tmp_path / "faults.md")
    rows = {f.key: page.row(Result(f, SEEN)) for f in ALL[:2]}
    text = page.write(rows, [f.key for f in ALL])
    assert page.read(page.CSV) == rows
    assert (tmp_path / "faults.md").read_text() == text
    assert text.index(ALL[0].name) < text.index(ALL[1].name)


def test_every_fault_has_its_own_key() -> None:
    assert len({fault.key for fault in ALL}) == len(ALL)


def samples(bytes_per_s: float, noise_bytes: float, seconds: int) -> list[Sample]:
    choose = random.Random(0)
    return [
        Sample(t, "h", Process(1, 1), "r", round(1e8 + t * bytes_per_s + n), 5 + t // 300, 3)
        for t in range(0, seconds, 5)
        for n in [choose.gauss(0, noise_bytes)]
    ]


def test_a_leak_is_told_from_noise() -> None:
    leaks = GROWS_MB_PER_H * 2e6 / 3600
    (growing,) = trends(samples(leaks, 1e4, 1200), least_s=600)
    assert growing.bytes_per_h == pytest.approx(leaks * 3600, rel=0.1)
    assert grows(growing)
    assert growing.num_files == (5, 8)
    full = samples(2 * leaks, 1e4, 600)
    most = full[-1].own_bytes
    filled = [
        *full,
        *(dataclasses.replace(s, time_s=s.time_s + 600, own_bytes=most) for s in full),
    ]
    (steady,) = trends(filled, least_s=600)
    assert steady.bytes_per_h > GROWS_MB_PER_H * 1e6
    assert not grows(steady), "a pool that filled up"
    (steady,) = trends(samples(0.0, 1e6, 1200), least_s=600)
    assert not grows(steady)
    assert not trends(samples(leaks, 0.0, 300), least_s=600), "too short to say"


def test_a_slope_has_the_error_of_its_points() -> None:
    exact, none = slope([0.0, 1.0, 2.0], [1.0, 3.0, 5.0])
    assert (exact, none) == (pytest.approx(2.0), pytest.approx(0.0))
    assert slope([0.0, 1.0, 2.0, 3.0], [0.0, 1.0, 0.0, 1.0])[1] > 0.1


@pytest.mark.parametrize(
    ("command", "role"),
    [
        ("ray::ServeReplica:moetier:GpuWorker.generate ", "GPU worker"),
        ("ray::StoreActor", "store"),
        ("ray::IDLE", "IDLE"),
        ("/x/ray/core/src/ray/raylet/raylet --raylet_socket_name=/tmp/s", "raylet"),
        ("/usr/bin/python -u /x/ray/dashboard/agent.py --node-ip-address=1", "agent.py"),
        ("/usr/bin/python3 -m benchmarks.faults.client http://a", "benchmarks.faults.client"),
        ("", "?"),
    ],
)
def test_what_a_process_is_for(command: str, role: str) -> None:
    assert role_of(command) == role


def test_the_soak_page_tells_what_grew_and_what_was_left() -> None:
    found = trends(samples(1e5, 1e4, 1200), least_s=600)
    run = Run(20, 7, trends=found, left=["process 5 still runs"], seconds=1200)
    run.outcomes = [answer(1, 0.0, 4.0, tokens=8), answer(2, 0.0, 4.0, error="500")]
    text = soak_page(run)
    assert "| grows |" in text
    assert "- process 5 still runs" in text
    assert "2 requests, 1 failed" in text
    assert "1 x 500" in text
