"""What a report compares: a variant with its rows on all texts, and verdicts between two of them.

Knows no store and no page.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cluster.eval_rows import EvalRow, pooled
from cluster.report.figures import Interval, Point, on_front, paired

EQUAL_BYTES = 0.01
"""Bytes moved count as equal up to this share: routing on a text is not that of the calibration."""


@dataclass(frozen=True, slots=True)
class Line:
    """One variant. `rows` are in order of texts, `whole` is all their windows together."""

    label: str
    family: str  # what is drawn in one colour: a recipe, a control
    rows: tuple[EvalRow, ...]
    whole: EvalRow

    @staticmethod
    def of(
        label: str, family: str, rows: Sequence[EvalRow], baseline: Sequence[EvalRow] = ()
    ) -> Line:
        """`baseline` are the original's rows on the same texts; none for the original itself."""
        return Line(label, family, tuple(rows), pooled(rows, baseline))

    @property
    def bits(self) -> float:
        """Per expert weight moved."""
        return self.whole.bits_per_weight_moved

    @property
    def point(self) -> Point:
        """Bits moved and KL, or the loss where no KL was measured."""
        return Point(self.bits, self.whole.nats if self.whole.kl is None else self.whole.kl)


@dataclass(frozen=True, slots=True)
class Duel:
    """One line held against another, window by window: `loss` and `bits` are theirs minus mine."""

    mine: Line
    theirs: Line
    loss: Interval  # KL in nats per token, or loss where no KL was measured
    bits: float
    texts_won: int  # by mine, of num_texts
    num_texts: int

    @property
    def equal_bytes(self) -> bool:
        return abs(self.bits) <= EQUAL_BYTES * self.mine.bits

    @property
    def cheaper(self) -> bool:
        """Whether mine moves no more bytes than theirs, up to what counts as equal."""
        return self.bits >= 0 or self.equal_bytes

    @property
    def wins(self) -> bool:
        """Mine loses less for no more bytes, and the interval excludes chance."""
        return self.cheaper and self.loss.is_certain and self.loss.mean > 0


def windows_of(row: EvalRow) -> tuple[float, ...]:
    """What two lines are compared by: KL where it was measured, else the loss."""
    return row.window_kl or row.window_nats


def duel(mine: Line, theirs: Line) -> Duel:
    """Raises ValueError when the two were not measured on the same windows of the same texts."""
    names, others = ([row.text for row in line.rows] for line in (mine, theirs))
    if names != others:
        raise ValueError(f"{mine.label} is of texts {names}, but {theirs.label} of {others}")
    by_text = [
        paired(windows_of(b), windows_of(a)) for a, b in zip(mine.rows, theirs.rows, strict=True)
    ]
    return Duel(
        mine=mine,
        theirs=theirs,
        loss=paired(windows_of(theirs.whole), windows_of(mine.whole)),
        bits=theirs.bits - mine.bits,
        texts_won=sum(text.mean > 0 for text in by_text),
        num_texts=len(by_text),
    )


def verdict(ablation: Duel) -> str:
    """Whether the item that `theirs` lacks is kept: only when it wins at equal bytes."""
    loss = ablation.loss
    if not loss.is_certain:
        return "not kept: no difference seen"
    better_with = loss.mean > 0
    if better_with and ablation.cheaper:
        return "kept"
    if not better_with and (ablation.bits <= 0 or ablation.equal_bytes):
        return "not kept: better without"
    return "not kept: unclear, the bytes differ"


def front_of(lines: Sequence[Line]) -> list[Line]:
    """The lines that no other dominates, by falling loss."""
    kept = on_front([line.point for line in lines])
    return sorted((line for line, on in zip(lines, kept, strict=True) if on), key=lambda i: i.bits)


def best_within(bits: float, lines: Sequence[Line]) -> Line | None:
    """The line of least loss that moves at most so many bits, up to what counts as equal."""
    fitting = [line for line in lines if line.bits <= bits * (1 + EQUAL_BYTES)]
    return min(fitting, key=lambda line: line.point.loss, default=None)
