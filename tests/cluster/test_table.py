"""Goal: rows come out as an aligned table. Method: exact text of small cases."""

from __future__ import annotations

from cluster.table import counted, format_table

ROWS = [{"what": "codes", "bytes": 12345, "ok": True}, {"what": "a", "bytes": None, "ok": False}]


def test_numbers_right_text_left_nothing_as_dash() -> None:
    assert format_table(ROWS).splitlines() == [
        "what    bytes  ok",
        "-----  ------  -----",
        "codes  12,345  True",
        "a           -  False",
    ]


def test_columns_choose_and_order() -> None:
    assert format_table(ROWS, ["bytes", "other"]).splitlines()[2] == "12,345  -"


def test_no_rows() -> None:
    assert format_table([]) == ""
    assert format_table([], ["a"]).splitlines()[0] == "a"


def test_one_is_singular() -> None:
    assert [counted(n, "thread") for n in (0, 1, 2)] == ["0 threads", "1 thread", "2 threads"]
