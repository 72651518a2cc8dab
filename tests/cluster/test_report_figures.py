"""Goal: fronts, intervals, rank correlation and verdicts say what their words mean.

Method: properties over random points, cases worked by hand, lines made of hand-written windows.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.eval_rows import EvalRow, Traffic, measures
from cluster.report.figures import (
    Point,
    dominates,
    interval,
    on_front,
    paired,
    spearman,
    student_quantile,
)
from cluster.report.lines import Line, best_within, duel, front_of, verdict

POINT = Traffic(0.0, 1, 0, 500.0, 500.0, 400.0, 100.0, 500.0, 0.0, 64)
coordinates = st.integers(0, 6).map(float)
points = st.lists(st.builds(Point, coordinates, coordinates), max_size=12)


def row(text: str, kl: tuple[float, ...], bits: float = 2.5, **changes: Any) -> EvalRow:
    made = EvalRow(
        experts="some",
        text=text,
        **measures(tuple(3 + value for value in kl), kl, tuple(1 - value for value in kl)),
        more_nats=None,
        more_nats_error=None,
        bits_per_weight_moved=bits,
        stored_bytes=1000,
        traffic=(POINT,),
        degraded_pairs=0,
        restored_share=0.5,
        skipped_share=0.0,
        seconds=1.0,
    )
    return replace(made, **changes)


def line(label: str, *texts: tuple[float, ...], bits: float = 2.5) -> Line:
    rows = [row(f"text {number}", kl, bits) for number, kl in enumerate(texts)]
    return Line.of(label, "family", rows)


@given(points)
def test_a_point_is_on_the_front_exactly_when_nothing_dominates_it(found: list[Point]) -> None:
    kept = on_front(found)
    assert len(kept) == len(found)
    if found:
        assert any(kept)
    front = [point for point, on in zip(found, kept, strict=True) if on]
    for point, on in zip(found, kept, strict=True):
        # What is dominated at all is dominated by something that is itself on the front.
        assert on != any(dominates(other, point) for other in front)


@given(points)
def test_the_front_falls_as_the_cost_rises(found: list[Point]) -> None:
    kept = on_front(found)
    front = sorted({point for point, on in zip(found, kept, strict=True) if on})
    losses = [point.loss for point in front]
    assert losses == sorted(losses, reverse=True)
    assert len(set(losses)) == len(losses)


def test_spearman_by_hand() -> None:
    # Ranks 1 2.5 2.5 4 against 1 3 2 4: covariance 4.5, variances 4.5 and 5.
    assert spearman([1, 5, 5, 9], [10, 30, 20, 40]) == pytest.approx(4.5 / (4.5 * 5) ** 0.5)
    assert spearman([1, 2, 3], [1, 8, 27]) == pytest.approx(1)
    assert spearman([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert spearman([1, 1, 1], [1, 2, 3]) is None
    assert spearman([1], [2]) is None
    with pytest.raises(ValueError, match="2 and 1"):
        spearman([1, 2], [1])


@pytest.mark.parametrize(
    ("freedom", "table"), [(1, 12.706), (2, 4.303), (3, 3.182), (5, 2.571), (31, 2.040)]
)
def test_quantiles_are_student_s(freedom: int, table: float) -> None:
    assert student_quantile(freedom) == pytest.approx(table, rel=0.01)


def test_intervals_by_hand() -> None:
    found = interval([1.0, 2.0, 4.5])
    assert found.mean == 2.5
    assert found.half == pytest.approx(4.303 * (3.25 / 3) ** 0.5, rel=0.01)
    assert not found.is_certain
    alone = interval([3.0])
    assert (alone.low, alone.high, alone.is_certain) == (3.0, 3.0, False)
    assert paired((1.1, 5.2, 9.1), (1.0, 5.0, 9.0)).half < 0.2
    with pytest.raises(ValueError, match="none"):
        interval([])


BASE = line("best", (0.10, 0.12, 0.11), (0.20, 0.22, 0.21))
WORSE = ((0.15, 0.175, 0.16), (0.25, 0.275, 0.26))
BETTER = ((0.05, 0.065, 0.06), (0.15, 0.165, 0.16))
NOISE = ((0.05, 0.175, 0.11), (0.25, 0.17, 0.22))


@pytest.mark.parametrize(
    ("texts", "bits", "expected"),
    [
        (WORSE, 2.5, "kept"),
        (WORSE, 2.6, "kept"),  # without it: more bytes and still worse
        (WORSE, 2.49, "kept"),  # within what counts as equal
        (WORSE, 2.3, "not kept: unclear, the bytes differ"),
        (BETTER, 2.5, "not kept: better without"),
        (BETTER, 2.3, "not kept: better without"),
        (BETTER, 2.7, "not kept: unclear, the bytes differ"),
        (NOISE, 2.5, "not kept: no difference seen"),
    ],
)
def test_an_item_is_kept_only_when_it_wins_at_equal_bytes(
    texts: tuple[tuple[float, ...], ...], bits: float, expected: str
) -> None:
    assert verdict(duel(BASE, line("without", *texts, bits=bits))) == expected


def test_a_duel_is_won_only_for_no_more_bytes_and_beyond_chance() -> None:
    fair = duel(BASE, line("control", *WORSE))
    assert fair.wins
    assert (fair.texts_won, fair.num_texts) == (2, 2)
    assert fair.loss.mean == pytest.approx(0.0517, abs=1e-3)
    assert not duel(BASE, line("control", *WORSE, bits=2.3)).wins
    assert not duel(BASE, line("control", *NOISE)).wins
    assert not duel(BASE, line("control", *BETTER)).wins


def test_lines_of_other_texts_are_not_compared() -> None:
    with pytest.raises(ValueError, match="text 1"):
        duel(BASE, line("control", WORSE[0]))


def test_choosing_among_lines() -> None:
    cheap, dear = line("cheap", *WORSE, bits=2.0), line("dear", *BETTER, bits=3.0)
    silly = line("silly", *WORSE, bits=3.5)
    assert front_of([dear, silly, cheap]) == [cheap, dear]
    assert best_within(2.99, [cheap, dear]) == dear  # 3.0 counts as equal to 2.99
    assert best_within(2.5, [cheap, dear]) == cheap
    assert best_within(1.0, [cheap, dear]) is None
