"""Rows of an evaluation as people read them: tables, and a sentence of what was measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cluster.eval_rows import EvalRow
from cluster.eval_settings import EvalSettings
from cluster.table import counted, format_table


def as_cells(row: EvalRow) -> dict[str, Any]:
    """One line of the table of quality; bytes are those of the first cache size and batch."""
    first = row.traffic[0]
    error = None if row.nats_error is None else row.perplexity * row.nats_error
    return {
        "experts": row.experts,
        "text": row.text,
        "perplexity": _with_error(row.perplexity, error, ".2f"),
        "more nats": _with_error(row.more_nats, row.more_nats_error, "+.4f"),
        "KL": _with_error(row.kl, row.kl_error, ".4f"),
        "agree %": None if row.agreement is None else f"{100 * row.agreement:.1f}",
        "bits/weight moved": f"{row.bits_per_weight_moved:.2f}",
        "expert KB/token": round(first.moved_bytes / 1000, 1),
        "near-data KB/token": round(first.near_data_bytes / 1000, 1),
        "stored MB": round(row.stored_bytes / 1e6, 1),
        "cache MB": round(first.cache_bytes / 1e6, 1),
    }


def traffic_cells(row: EvalRow) -> dict[str, Any]:
    """One line of the table of bytes: KB per token at every cache size and batch."""
    points = {
        f"cache {t.cache_percent:g} %, batch {t.batch}": round(t.moved_bytes / 1000, 1)
        for t in row.traffic
    }
    return {"experts": row.experts, "text": row.text, **points}


def tables(rows: Sequence[EvalRow]) -> str:
    """Quality, without the columns in which nobody has anything, and bytes where there are more."""
    cells = [as_cells(row) for row in rows]
    columns = [name for name in cells[0] if any(line[name] is not None for line in cells)]
    quality = format_table(cells, columns)
    if len(rows[0].traffic) < 2:
        return quality
    moved = format_table([traffic_cells(row) for row in rows])
    return f"{quality}\n\nExpert KB moved per token:\n{moved}"


def conditions(settings: EvalSettings) -> str:
    """What the tables were measured with, in sentences."""
    batches = ", ".join(str(batch) for batch in settings.batch)
    shares = ", ".join(f"{percent:g}" for percent in settings.cache_percent)
    return (
        f"Quality over {counted(settings.windows, 'window')} of "
        f"{counted(settings.window_tokens, 'token')}; KB moved per token while sequences decode "
        f"{counted(settings.decode_tokens, 'token')} each in batches of {batches} (counted "
        f"after {counted(settings.warm_up, 'step')}), expert cache {shares} % of a line's own "
        'codes; "more nats" is the loss over the first line on the same windows; bits moved are '
        "those of a lone sequence without cache, per weight of the experts it uses."
    )


def _with_error(value: float | None, error: float | None, form: str) -> str | None:
    if value is None:
        return None
    shown = format(value, form)
    return shown if error is None else f"{shown} ± {format(error, form.lstrip('+'))}"
