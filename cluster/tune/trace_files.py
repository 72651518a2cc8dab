"""Traces from files: recorded by our own server, Mooncake's JSONL, Azure's LLM inference CSV.

- recorded: JSONL with arrival_s (seconds since 1970), prompt_tokens, answer_tokens; in any order,
  since a line is written when a request ends, and maybe in several files of one folder.
- mooncake: JSONL with timestamp (milliseconds), input_length, output_length
  (https://github.com/kvcache-ai/Mooncake, FAST25-release/traces).
- azure: CSV with TIMESTAMP, ContextTokens, GeneratedTokens
  (https://github.com/Azure/AzurePublicDataset, AzureLLMInferenceDataset 2023 and 2024).
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cluster.tune.trace import MAX_REQUESTS, Request, Trace

MAX_LINE_CHARS = 1 << 20
RECORDED_NAMES = "requests-*.jsonl"
"""The files that servers write into one folder, each its own."""

Row = tuple[float, int, int]  # seconds, prompt tokens, answer tokens


def read_trace(path: Path) -> Trace:
    """The trace in a file, or in a folder that servers recorded into; time begins at its first.

    Raises ValueError naming file and line for what is not one of the formats, for numbers that make
    no sense, and for a public trace that is not in the order of time; OSError as the file does.
    """
    if path.is_dir():
        files = sorted(path.glob(RECORDED_NAMES))
        if not files:
            raise ValueError(f"{path}: no file {RECORDED_NAMES} in it; record one, or give a file")
        rows = [row for file in files for row in _rows(file)]
        return _trace(path, sorted(rows))
    rows = list(_rows(path))
    is_recorded = _format_of(path)[1] is _of_recorded
    return _trace(path, sorted(rows) if is_recorded else rows)


def _trace(path: Path, rows: list[Row]) -> Trace:
    start_s = rows[0][0] if rows else 0.0
    if any(row[0] < start_s for row in rows):
        number = next(n for n, row in enumerate(rows, 1) if row[0] < start_s)
        raise ValueError(f"{path}: request {number} came before the first; sort it by time")
    return Trace(
        path.name,
        tuple(Request(at_s - start_s, prompt, answer) for at_s, prompt, answer in rows),
    )


def _rows(path: Path) -> Iterator[Row]:
    lines, read = _format_of(path)
    for number, fields in lines(path):
        if number > MAX_REQUESTS + 1:
            raise ValueError(f"{path}: more than {MAX_REQUESTS} requests; cut it")
        try:
            at_s, prompt, answer = read(fields)
            if not (math.isfinite(at_s) and at_s >= 0):
                raise ValueError(f"got the time {at_s}, expected a finite number >= 0")
            Request(0.0, prompt, answer)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            cause = f"no field {error}" if isinstance(error, KeyError) else error
            raise ValueError(f"{path}:{number}: {cause}") from error
        yield at_s, prompt, answer


def _format_of(
    path: Path,
) -> tuple[Callable[[Path], Iterator[tuple[int, Mapping[str, Any]]]], Callable[[Any], Row]]:
    """How to go through the file, and how to read what one line has."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            first = file.readline(MAX_LINE_CHARS)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a text file: {error}") from error
    if not first.strip():
        raise ValueError(f"{path}: empty, expected a request in each line")
    if first.lstrip().startswith("{"):
        _, fields = next(_json_lines(path))
        for name, read in (("arrival_s", _of_recorded), ("timestamp", _of_mooncake)):
            if name in fields:
                return _json_lines, read
    elif "TIMESTAMP" in first and "ContextTokens" in first:
        return _csv_lines, _of_azure
    raise ValueError(
        f"{path}: unknown format, its first line is {first.strip()[:80]!r}; expected JSONL with "
        "arrival_s (recorded here) or timestamp (Mooncake), or a CSV with TIMESTAMP and "
        "ContextTokens (Azure)"
    )


def _json_lines(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                fields = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}:{number}: not JSON: {error}") from error
            if not isinstance(fields, dict):
                raise ValueError(f"{path}:{number}: got {line[:40]!r}, expected an object")
            yield number, fields


def _csv_lines(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        yield from enumerate(csv.DictReader(file), 2)


def _of_recorded(fields: Mapping[str, Any]) -> Row:
    # A request that was refused or lost had no answer; it came all the same.
    answer = max(_whole(fields["answer_tokens"]), 1)
    return float(fields["arrival_s"]), _whole(fields["prompt_tokens"]), answer


def _of_mooncake(fields: Mapping[str, Any]) -> Row:
    answer = max(_whole(fields["output_length"]), 1)
    return float(fields["timestamp"]) / 1000, _whole(fields["input_length"]), answer


def _of_azure(fields: Mapping[str, Any]) -> Row:
    # Seven digits of a second, where Python reads six; times are in UTC.
    text = fields["TIMESTAMP"].strip().removesuffix("Z").removesuffix("+00:00")
    whole, _, part = text.partition(".")
    at = datetime.fromisoformat(whole).replace(tzinfo=UTC).timestamp()
    at += float(f"0.{part}") if part else 0.0
    answer = max(_whole(fields["GeneratedTokens"]), 1)
    return at, _whole(fields["ContextTokens"]), answer


def _whole(value: Any) -> int:
    number = float(value)
    if isinstance(value, bool) or number != int(number):
        raise ValueError(f"got {value!r}, expected a whole number of tokens")
    return int(number)
