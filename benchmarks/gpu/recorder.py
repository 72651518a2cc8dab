"""What a step finds, written line by line, so that a step that is killed leaves what it had.

A check belongs to a group; a measured row names the group that must be green for it to be shown.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that is right or wrong. `error` and `limit` where it is a comparison of numbers."""

    group: str
    name: str
    passed: bool
    detail: str = ""
    error: float | None = None
    limit: float | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """One measurement: percentiles of `rounds` times; None where nothing was measured (tiny).

    rate is what the median means (GB/s, TFLOP/s, tokens/s); share is the rate over that of
    `share_of`, measured in the same rounds. gates: the groups that must be green.
    """

    what: str
    shape: str
    tokens: int
    gates: tuple[str, ...]
    p20: float | None
    p50: float | None
    p80: float | None
    unit: str
    rate: float | None = None
    rate_unit: str = ""
    share: float | None = None
    share_of: str = ""
    rounds: int = 0
    note: str = ""


@dataclass(frozen=True, slots=True)
class Note:
    """A sentence or a block of text for the report."""

    text: str


Finding = Check | Row | Note
KINDS = {"check": Check, "row": Row, "note": Note}


class Recorder:
    """Appends findings to a file, a JSON object a line. In a tiny run rows lose their numbers."""

    def __init__(self, path: Path, *, tiny: bool) -> None:
        self._path = path
        self._tiny = tiny

    def check(
        self,
        group: str,
        name: str,
        passed: bool,
        *,
        detail: str = "",
        error: float | None = None,
        limit: float | None = None,
    ) -> None:
        self._write("check", Check(group, name, bool(passed), detail, error, limit))

    def compare(self, group: str, name: str, error: float, limit: float) -> None:
        """A check that an error is below its limit; NaN never passes."""
        self.check(group, name, error < limit, error=error, limit=limit)

    @contextmanager
    def section(self, group: str) -> Iterator[None]:
        """What raises inside turns `group` red and is told there; what comes after still runs."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 - recorded as a failed check
            # The first lines say what is wrong; Triton's last ones point at the kernel's line.
            told = f"{type(error).__name__}: {error}"
            short = told if len(told) < 900 else f"{told[:300]} ... {told[-600:]}"
            self.check(group, "runs to its end", False, detail=" ".join(short.split()))

    def note(self, text: str) -> None:
        self._write("note", Note(text))

    def row(
        self,
        what: str,
        seconds: Sequence[float],
        *,
        shape: str,
        tokens: int,
        gates: Sequence[str],
        rate_of_s: float = 0.0,
        rate_unit: str = "",
        share_of: tuple[str, float] | None = None,
        note: str = "",
    ) -> float:
        """Record times; rate_of_s / seconds is the rate. Returns the median's rate, or 0."""
        p20, p50, p80 = quantiles(seconds)
        rate = rate_of_s / p50
        name, other = share_of or ("", 0.0)
        self._write(
            "row",
            Row(
                what=what,
                shape=shape,
                tokens=tokens,
                gates=tuple(gates),
                p20=self._number(p20 * 1e6),
                p50=self._number(p50 * 1e6),
                p80=self._number(p80 * 1e6),
                unit="us",
                rate=self._number(rate) if rate_of_s else None,
                rate_unit=rate_unit,
                share=self._number(rate / other) if other else None,
                share_of=name,
                rounds=len(seconds),
                note="interpreter: not a measurement" if self._tiny else note,
            ),
        )
        return rate

    def value(
        self, what: str, value: float, unit: str, *, shape: str, tokens: int, gates: Sequence[str]
    ) -> None:
        """Record one number that is not a time, such as bytes per token or a share hidden."""
        note = "interpreter: not a measurement" if self._tiny else ""
        kept = self._number(value)
        self._write(
            "row",
            Row(what, shape, tokens, tuple(gates), None, kept, None, unit, rounds=1, note=note),
        )

    def _number(self, value: float) -> float | None:
        return None if self._tiny else float(f"{value:.5g}")

    def _write(self, kind: str, finding: Finding) -> None:
        line = json.dumps({"kind": kind, **asdict(finding)})
        with self._path.open("a") as file:
            file.write(line + "\n")


def read_findings(path: Path) -> list[Finding]:
    """What was recorded; a last line that was cut when its step was killed is left out."""
    if not path.is_file():
        return []
    findings: list[Finding] = []
    for line in path.read_text().splitlines(keepends=True):
        if not line.endswith("\n"):
            break
        fields = json.loads(line)
        kind = KINDS[fields.pop("kind")]
        if kind is Row:
            fields["gates"] = tuple(fields["gates"])
        findings.append(kind(**fields))
    return findings


def quantiles(values: Sequence[float]) -> tuple[float, float, float]:
    """p20, p50 and p80."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    tenths = statistics.quantiles(values, n=10, method="inclusive")
    return tenths[1], tenths[4], tenths[7]
