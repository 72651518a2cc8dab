"""Goal: rows keep their numbers through JSON and files, pool and compare as arithmetic says, and an
experiment goes on where it was stopped, at whatever byte.

Method: rows made by hand; files cut at every byte of the last line.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster.eval_rows import (
    EvalRow,
    RowFile,
    Traffic,
    against,
    as_plain,
    from_plain,
    mean_and_error,
    measures,
    paired_difference,
    pooled,
)
from cluster.eval_settings import EvalSettings
from cluster.eval_tables import conditions, tables

POINT = Traffic(25.0, 8, 1000, 500.0, 550.0, 400.0, 100.0, 500.0, 0.0, 64)


def row(text: str = "one", nats: tuple[float, ...] = (1.0, 2.0, 4.5), **changes: Any) -> EvalRow:
    made = EvalRow(
        experts="2-bit",
        text=text,
        **measures(nats, tuple(n / 10 for n in nats), tuple(1 - n / 10 for n in nats)),
        more_nats=None,
        more_nats_error=None,
        bits_per_weight_moved=2.5,
        stored_bytes=12345,
        traffic=(POINT, replace(POINT, batch=1, moved_bytes=900.0)),
        degraded_pairs=0,
        restored_share=0.5,
        skipped_share=0.0,
        seconds=1.5,
    )
    return replace(made, **changes)


def test_measures_are_means_with_their_errors() -> None:
    made = row()
    assert made.nats == 2.5
    assert made.perplexity == pytest.approx(math.exp(2.5))
    assert made.nats_error == pytest.approx(math.sqrt(3.25 / 3))
    assert made.kl == pytest.approx(0.25)
    assert made.agreement == pytest.approx(0.75)
    alone = measures((3.0,), (), ())
    assert (alone["nats"], alone["nats_error"], alone["kl"]) == (3.0, None, None)
    assert mean_and_error([2.0]) == (2.0, None)


def test_a_paired_difference_is_far_surer_than_two_means() -> None:
    mine, theirs = (1.1, 5.2, 9.1), (1.0, 5.0, 9.0)
    more, error = paired_difference(mine, theirs)
    assert more == pytest.approx(0.4 / 3)
    assert error is not None
    assert error < 0.05 < mean_and_error(mine)[1]  # type: ignore[operator]
    with pytest.raises(ValueError, match="longer"):
        paired_difference((1.0,), (1.0, 2.0))


def test_a_row_is_held_against_the_baseline_s_windows() -> None:
    baseline = row()
    worse = against(baseline, row(nats=(1.5, 2.5, 5.0)))
    assert worse.more_nats == pytest.approx(0.5)
    assert worse.more_nats_error == pytest.approx(0.0)
    assert against(baseline, baseline).more_nats is None


def test_pooling_counts_every_window_alike() -> None:
    baseline = [row("one"), row("two", (3.0,))]
    rows = [row("one", (2.0, 3.0, 5.5)), row("two", (4.0,), seconds=3.0)]
    whole = pooled(rows, baseline)
    assert whole.text == "all"
    assert whole.nats == pytest.approx(14.5 / 4)
    assert whole.more_nats == pytest.approx(1.0)
    assert whole.seconds == 4.5
    assert whole.traffic[0].moved_bytes == 500.0
    assert whole.traffic[0].num_tokens == 128
    assert len(whole.window_kl) == 4
    assert pooled(rows).more_nats is None
    with pytest.raises(ValueError, match="one variant"):
        pooled([row(), row(experts="3-bit")])


def test_rows_survive_json() -> None:
    made = row()
    assert from_plain(json.loads(json.dumps(as_plain(made)))) == made
    assert made.at(25.0, 1).moved_bytes == 900.0
    with pytest.raises(KeyError, match="cache 50"):
        made.at(50.0, 1)


def test_a_file_gives_back_what_was_added_and_only_for_the_same_key(tmp_path: Path) -> None:
    path = tmp_path / "new" / "rows.jsonl"
    first = RowFile(path)
    first.add({"store": "a", "share": 0.5}, row())
    first.add({"store": "b", "share": 0.5}, row("two"))
    again = RowFile(path)
    assert len(again) == 2
    assert again.get({"share": 0.5, "store": "a"}) == row()
    assert again.get({"store": "a", "share": 0.25}) is None
    again.add({"store": "a", "share": 0.5}, row("three"))
    assert RowFile(path).get({"store": "a", "share": 0.5}) == row("three")


def test_a_file_cut_at_any_byte_loses_only_its_last_row(tmp_path: Path) -> None:
    whole = tmp_path / "whole.jsonl"
    rows = RowFile(whole)
    rows.add({"n": 1}, row())
    start = whole.stat().st_size
    rows.add({"n": 2}, row("two"))
    data = whole.read_bytes()
    for end in range(start, len(data), 97):
        path = tmp_path / "cut.jsonl"
        path.write_bytes(data[:end])
        cut = RowFile(path)
        assert cut.get({"n": 1}) == row()
        assert cut.get({"n": 2}) is None
        cut.add({"n": 2}, row("two"))
        assert path.read_bytes() == data


@pytest.mark.parametrize("line", ["{}", "not json", '{"key": {}, "row": {"text": "x"}}'])
def test_a_file_of_something_else_is_refused(tmp_path: Path, line: str) -> None:
    path = tmp_path / "rows.jsonl"
    RowFile(path).add({"n": 1}, row())
    with path.open("a") as file:
        file.write(line + "\n")
    with pytest.raises(ValueError, match=r"rows.jsonl:2: not a row of this version"):
        RowFile(path)


def test_tables_show_only_what_there_is() -> None:
    text = tables([row(), against(row(), row(nats=(2.0, 3.0, 4.0)))])
    assert "more nats" in text
    assert "cache 25 %, batch 8" in text
    assert "0.2500 ± 0.1041" in text
    plain = replace(row(), kl=None, kl_error=None, agreement=None, traffic=(POINT,))
    lone = tables([plain])
    assert "KL" not in lone
    assert "agree" not in lone
    assert "more nats" not in lone
    assert "batch 8" not in lone
    assert "32 windows of 256 tokens" in conditions(EvalSettings())
