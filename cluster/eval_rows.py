"""What an evaluation finds: a row per variant and text, with its errors, as JSON and in a file.

Arithmetic over windows only; how a row is measured is `cluster/evaluate.py`.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Traffic:
    """What a token moves while `batch` sequences decode with one size of cache; bytes per token."""

    cache_percent: float  # of the store's codes
    batch: int
    cache_bytes: int
    moved_bytes: float  # expert records, as the transport delivered them
    device_bytes: float  # what crossed to the device: more where the host decodes first
    codes_bytes: float
    factors_bytes: float
    planned_bytes: float  # what the dispatch plans asked for; equals moved_bytes
    near_data_bytes: float  # activations to and from near data
    num_tokens: int


@dataclass(frozen=True, slots=True)
class EvalRow:
    """One variant on one text. Errors are standard errors over windows, None for a single one.

    `more_nats` is over the first variant's loss, window by window. `kl` (nats per token, from the
    original's next-token distribution) and `agreement` (share of positions with the original's
    likeliest token) are None where no original was given.
    """

    experts: str
    text: str
    perplexity: float
    nats: float
    nats_error: float | None
    more_nats: float | None
    more_nats_error: float | None  # of the paired difference, smaller than nats_error
    kl: float | None
    kl_error: float | None
    agreement: float | None
    agreement_error: float | None
    bits_per_weight_moved: float  # one sequence, no cache, against the weights of the k experts
    stored_bytes: int  # codes and factors on disk
    traffic: tuple[Traffic, ...]
    degraded_pairs: int
    restored_share: float  # of the pairs of the scored tokens
    skipped_share: float
    seconds: float
    window_nats: tuple[float, ...]
    window_kl: tuple[float, ...]  # empty without an original
    window_agreement: tuple[float, ...]

    def at(self, cache_percent: float, batch: int) -> Traffic:
        """The traffic of one cache size and batch. Raises KeyError when it was not measured."""
        for traffic in self.traffic:
            if (traffic.cache_percent, traffic.batch) == (cache_percent, batch):
                return traffic
        raise KeyError(f"{self.experts}: cache {cache_percent} %, batch {batch} was not measured")


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean and its standard error, which a single value does not have."""
    if len(values) < 2:
        return statistics.fmean(values), None
    return statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))


def paired_difference(mine: Sequence[float], theirs: Sequence[float]) -> tuple[float, float | None]:
    """Mean of mine minus theirs, pair by pair, and its standard error.

    Much smaller than that of two means when both vary alike, as losses over the same windows do.
    Raises ValueError when they are not of one length.
    """
    return mean_and_error([a - b for a, b in zip(mine, theirs, strict=True)])


def against(baseline: EvalRow, row: EvalRow) -> EvalRow:
    """The row with its loss over the baseline's; the baseline itself has none."""
    if row is baseline:
        return replace(row, more_nats=None, more_nats_error=None)
    more, error = paired_difference(row.window_nats, baseline.window_nats)
    return replace(row, more_nats=more, more_nats_error=error)


def pooled(rows: Sequence[EvalRow], baseline: Sequence[EvalRow] = ()) -> EvalRow:
    """One variant's rows on several texts as one, named "all": every window counts alike.

    `baseline` are the rows of the variant to be compared with, in the same order of texts.
    Raises ValueError for rows of different variants.
    """
    labels = {row.experts for row in rows}
    if len(labels) != 1:
        raise ValueError(f"rows: expected those of one variant, got {sorted(labels)}")
    window_nats = _chained(row.window_nats for row in rows)
    window_kl = _chained(row.window_kl for row in rows)
    window_agreement = _chained(row.window_agreement for row in rows)
    sizes = [len(row.window_nats) for row in rows]

    def weighted(name: str) -> float:
        total = sum(getattr(r, name) * n for r, n in zip(rows, sizes, strict=True))
        return float(total / sum(sizes))

    whole = replace(
        rows[0],
        text="all",
        **measures(window_nats, window_kl, window_agreement),
        more_nats=None,
        more_nats_error=None,
        bits_per_weight_moved=weighted("bits_per_weight_moved"),
        restored_share=weighted("restored_share"),
        skipped_share=weighted("skipped_share"),
        traffic=tuple(_mean_traffic(same) for same in zip(*(r.traffic for r in rows), strict=True)),
        degraded_pairs=sum(row.degraded_pairs for row in rows),
        seconds=sum(row.seconds for row in rows),
    )
    if not baseline:
        return whole
    more, error = paired_difference(window_nats, _chained(row.window_nats for row in baseline))
    return replace(whole, more_nats=more, more_nats_error=error)


def measures(
    window_nats: Sequence[float], window_kl: Sequence[float], window_agreement: Sequence[float]
) -> dict[str, Any]:
    """The fields of a row that follow from its windows; KL and agreement None without windows."""
    nats, nats_error = mean_and_error(window_nats)
    kl, kl_error = mean_and_error(window_kl) if window_kl else (None, None)
    same, same_error = mean_and_error(window_agreement) if window_agreement else (None, None)
    return {
        "perplexity": math.exp(nats),
        "nats": nats,
        "nats_error": nats_error,
        "kl": kl,
        "kl_error": kl_error,
        "agreement": same,
        "agreement_error": same_error,
        "window_nats": tuple(window_nats),
        "window_kl": tuple(window_kl),
        "window_agreement": tuple(window_agreement),
    }


def as_plain(row: EvalRow) -> dict[str, Any]:
    """The row for JSON."""
    return dataclasses.asdict(row)


def from_plain(data: Mapping[str, Any]) -> EvalRow:
    """The row that `as_plain` wrote. Raises TypeError or KeyError when it is another version's."""
    lists = {name: tuple(data[name]) for name in ("window_nats", "window_kl", "window_agreement")}
    traffic = tuple(Traffic(**point) for point in data["traffic"])
    return EvalRow(**{**data, **lists, "traffic": traffic})


class RowFile:
    """Rows kept in a JSON-lines file, so that a long experiment goes on where it stopped.

    A row is found again by its key: all that it depends on, as plain values. Each `add` is on disk
    when it returns. A last line that was cut off is dropped, with a warning. One process writes.
    Raises ValueError for a file that holds something else.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._rows: dict[str, EvalRow] = {}
        text = path.read_bytes() if path.exists() else b""
        whole, _, cut = text.rpartition(b"\n")
        if cut:
            logger.warning("%s: the last line was cut off and is measured again", path)
            with path.open("r+b") as file:
                file.truncate(len(text) - len(cut))
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                read = json.loads(line)
                self._rows[_canonical(read["key"])] = from_plain(read["row"])
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{path}:{number}: not a row of this version ({error}); give another file, or "
                    "remove this one to measure again"
                ) from error

    def __len__(self) -> int:
        return len(self._rows)

    def get(self, key: Mapping[str, Any]) -> EvalRow | None:
        """The row measured under that key, if it was."""
        return self._rows.get(_canonical(key))

    def add(self, key: Mapping[str, Any], row: EvalRow) -> None:
        """Keep a row; it replaces one with the same key."""
        self._rows[_canonical(key)] = row
        line = json.dumps({"key": key, "row": as_plain(row)}) + "\n"
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())


def _canonical(key: Mapping[str, Any]) -> str:
    return json.dumps(key, sort_keys=True)


def _chained(parts: Any) -> tuple[float, ...]:
    return tuple(value for part in parts for value in part)


def _mean_traffic(points: Sequence[Traffic]) -> Traffic:
    """The mean over texts, which were decoded for as many tokens each."""
    names = [name for name in Traffic.__dataclass_fields__ if name.endswith("_bytes")]
    means = {name: statistics.fmean(getattr(p, name) for p in points) for name in names}
    means["cache_bytes"] = points[0].cache_bytes
    return replace(points[0], **means, num_tokens=sum(point.num_tokens for point in points))  # type: ignore[arg-type]
