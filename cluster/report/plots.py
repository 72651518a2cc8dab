"""Figures as SVG text, the same bytes for the same numbers. The one module that draws.

Knows numbers and names only. Needs matplotlib, of the extra "report".
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

COLOURS = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#e69f00",
    "#56b4e9",
    "#000000",
    "#7f7f7f",
    "#8c564b",
    "#9467bd",
    "#bcbd22",
    "#17becf",
)
"""Okabe and Ito's, which colour-blind readers tell apart, and then more."""
MARKERS = "osD^vPX*<>hd"
MAX_CELL_TEXTS = 200
"""Heat maps with more cells than this carry no figures in them."""


@dataclass(frozen=True, slots=True)
class Dot:
    """A point of a scatter. `error` is half the interval of y."""

    x: float
    y: float
    error: float = 0.0
    hollow: bool = False


@contextmanager
def _drawing(width: float, height: float) -> Iterator[tuple[Figure, Axes]]:
    style: dict[Any, Any] = {
        "svg.hashsalt": "moetier",
        "svg.fonttype": "none",
        "font.family": "sans-serif",
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.color": "#e5e8eb",
        "axes.axisbelow": True,
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasSVG(figure)
        yield figure, figure.add_subplot()


def _svg(figure: Figure) -> str:
    """Without a date, a creator or anything else that differs between two runs."""
    out = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with matplotlib.rc_context({"svg.hashsalt": "moetier", "svg.fonttype": "none"}):
        figure.savefig(out, format="svg", metadata=nothing)
    return out.getvalue()


def scatter(
    groups: Mapping[str, Sequence[Dot]],
    *,
    x_label: str,
    y_label: str,
    joined: bool = False,
    log_y: bool = False,
    front: Sequence[tuple[float, float]] = (),
) -> str:
    """Dots by group, hollow ones and a stepped front where they are given.

    With `log_y` dots at or below 0 are left out: the caller says so.
    """
    with _drawing(8.2, 4.6) as (figure, axes):
        for number, (name, dots) in enumerate(groups.items()):
            colour = COLOURS[number % len(COLOURS)]
            marker = MARKERS[number % len(MARKERS)]
            shown = sorted(
                (dot for dot in dots if not log_y or dot.y > 0), key=lambda dot: (dot.x, dot.y)
            )
            if joined and len(shown) > 1:
                axes.plot(
                    [d.x for d in shown], [d.y for d in shown], color=colour, lw=0.8, alpha=0.6
                )
            for hollow in (False, True):
                _dots(axes, [dot for dot in shown if dot.hollow == hollow], colour, marker, log_y)
            axes.plot([], [], color=colour, marker=marker, linestyle="none", label=name)
        if front:
            steps = sorted(front)
            axes.step(
                [x for x, _ in steps],
                [y for _, y in steps],
                where="post",
                color="#333333",
                lw=0.8,
                ls=":",
                label="front",
                zorder=1,
            )
        if log_y:
            axes.set_yscale("log")
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        if len(groups) > 1 or front:
            axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
        return _svg(figure)


def _dots(axes: Axes, dots: Sequence[Dot], colour: str, marker: str, log_y: bool) -> None:
    """All solid or all hollow; on a logarithmic axis an interval stops short of 0."""
    if not dots:
        return
    xs, ys = [dot.x for dot in dots], [dot.y for dot in dots]
    fill = "white" if dots[0].hollow else colour
    axes.plot(xs, ys, marker, color=colour, markersize=5, markerfacecolor=fill, zorder=3)
    if any(dot.error for dot in dots):
        low = [min(dot.error, dot.y * 0.98) if log_y else dot.error for dot in dots]
        high = [dot.error for dot in dots]
        axes.errorbar(
            xs, ys, yerr=[low, high], color=colour, elinewidth=0.8, capsize=2, linestyle="none"
        )


def heat_map(
    values: Sequence[Sequence[float]],
    *,
    rows: Sequence[str],
    columns: Sequence[str],
    x_label: str,
    y_label: str,
    value_label: str,
) -> str:
    """A cell per value; NaN stays empty. Figures stand in the cells where they fit."""
    height = min(9.0, 1.2 + 0.24 * len(rows))
    with _drawing(min(11.0, 2.4 + 0.42 * len(columns)), max(2.0, height)) as (figure, axes):
        axes.grid(visible=False)
        image = axes.imshow(values, aspect="auto", cmap="viridis", interpolation="nearest")
        _ticks(axes, rows, columns)
        if len(rows) * len(columns) <= MAX_CELL_TEXTS:
            flat = [v for line in values for v in line if not math.isnan(v)]
            middle = (min(flat) + max(flat)) / 2 if flat else 0.0
            for y, line in enumerate(values):
                for x, value in enumerate(line):
                    if not math.isnan(value):
                        colour = "white" if value <= middle else "black"
                        axes.text(
                            x, y, f"{value:.3g}", ha="center", va="center", color=colour, fontsize=7
                        )
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        figure.colorbar(image, ax=axes, label=value_label, shrink=0.9)
        return _svg(figure)


def _ticks(axes: Axes, rows: Sequence[str], columns: Sequence[str]) -> None:
    every = max(1, math.ceil(len(columns) / 24))
    places = range(0, len(columns), every)
    axes.set_xticks(list(places), [columns[place] for place in places])
    every = max(1, math.ceil(len(rows) / 32))
    places = range(0, len(rows), every)
    axes.set_yticks(list(places), [rows[place] for place in places])


def curves(
    lines: Mapping[str, Sequence[float]], *, x_label: str, y_label: str, first: int = 1
) -> str:
    """One curve for each name, over 1, 2, 3, ..."""
    with _drawing(7.2, 3.6) as (figure, axes):
        for number, (name, values) in enumerate(lines.items()):
            colour = COLOURS[number % len(COLOURS)]
            xs = range(first, first + len(values))
            size = 3 if len(values) <= 32 else 0
            axes.plot(list(xs), list(values), color=colour, marker="o", ms=size, lw=1, label=name)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.set_ylim(bottom=0)
        if len(lines) <= len(COLOURS):
            axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
        return _svg(figure)


def timelines(
    panels: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]], *, x_label: str
) -> str:
    """A panel for each label of a y axis, one over another over the same time; in each a stepped
    line for each name, of the same colour in all of them."""
    names = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    with _drawing(8.2, 1.6 + 1.5 * len(panels)) as (figure, axes):
        axes.remove()
        grid = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
        for panel, (label, lines) in zip(grid, panels.items(), strict=True):
            for name, points in lines.items():
                colour = COLOURS[names.index(name) % len(COLOURS)]
                xs, ys = [x for x, _ in points], [y for _, y in points]
                panel.step(xs, ys, where="post", color=colour, lw=0.9, label=name)
            panel.set_ylabel(label)
            panel.set_ylim(bottom=0)
        grid[0].legend(frameon=False, fontsize=8, loc="lower left", bbox_to_anchor=(0, 1), ncols=3)
        grid[-1].set_xlabel(x_label)
        return _svg(figure)
