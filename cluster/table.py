"""Rows as a text table, for the commands. Knows no command and no meaning of a row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def format_table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str] | None = None) -> str:
    """A header, a rule and a line per row; columns in the given order, else the first row's.

    Numbers stand right, all else left; a missing value or None is "-". No rows give the header
    alone, and neither rows nor columns an empty text.
    """
    names = list(columns if columns is not None else (rows[0] if rows else ()))
    if not names:
        return ""
    cells = [[_shown(row.get(name)) for name in names] for row in rows]
    widths = [max(map(len, column)) for column in zip(names, *cells, strict=True)]
    right = [
        all(_is_number(row.get(name)) or row.get(name) is None for row in rows)
        and any(_is_number(row.get(name)) for row in rows)
        for name in names
    ]

    def line(texts: Sequence[str]) -> str:
        aligned = (
            text.rjust(width) if is_right else text.ljust(width)
            for text, width, is_right in zip(texts, widths, right, strict=True)
        )
        return "  ".join(aligned).rstrip()

    return "\n".join([line(names), line(["-" * width for width in widths]), *map(line, cells)])


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _shown(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 10_000 else f"{value:,.0f}"
    return f"{value:,}" if _is_number(value) else str(value)


def counted(number: int, noun: str) -> str:
    """A number with its noun, e.g. "1 thread" or "2 threads"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
