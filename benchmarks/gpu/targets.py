"""What the GPU kernels are to reach, beside what a run measured; nothing is shown for a red gate.

The targets stand here once; the report prints them first, whether anything was measured or not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from benchmarks.gpu.recorder import Row

NOT_RUN = "not run on a GPU"
NOT_MEASURED = "not measured in this run"


@dataclass(frozen=True, slots=True)
class Target:
    """At least `least` of one row: its share of the peer named there, or its value."""

    title: str
    what: str
    shape: str
    tokens: int
    least: float
    of: Literal["share", "value"]

    def measured(self, rows: Sequence[Row]) -> float | None:
        """What the rows say; None when none of them is the target's."""
        for row in rows:
            if (row.what, row.shape, row.tokens) == (self.what, self.shape, self.tokens):
                return row.share if self.of == "share" else row.p50
        return None


MIXTRAL_SHAPES = ("14336 x 4096", "4096 x 14336")
TARGETS = (
    *(
        Target(
            f"decode {bits} bits, packed bytes, share of a device copy",
            f"decode kernel {bits} bits",
            shape,
            1,
            0.75,
            "share",
        )  # fmt: skip
        for bits in (2, 3, 4)
        for shape in MIXTRAL_SHAPES
    ),
    *(
        Target(
            f"decode {bits} bits, times gemlite's (HQQ's Triton path) speed",
            f"decode {bits} bits: faster than gemlite",
            shape,
            1,
            1.0,
            "value",
        )  # fmt: skip
        for bits in (2, 4)
        for shape in MIXTRAL_SHAPES
    ),
)


def target_lines(rows: Sequence[Row], *, on_gpu: bool) -> list[str]:
    """Markdown: target and measured side by side. `rows` are those that may be shown."""
    lines = [
        "| target | shape | tokens | at least | measured | |",
        "| --- | --- | ---: | ---: | ---: | --- |",
    ]
    for target in TARGETS:
        value = target.measured(rows) if on_gpu else None
        if value is None:
            told, verdict = (NOT_MEASURED if on_gpu else NOT_RUN), ""
        else:
            told, verdict = f"{value:.2f}", "reached" if value >= target.least else "**missed**"
        lines.append(
            f"| {target.title} | {target.shape} | {target.tokens} | {target.least:.2f} | {told} | "
            f"{verdict} |"
        )
    return lines
