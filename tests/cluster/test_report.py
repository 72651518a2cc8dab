"""Goal: a page tells its rows' figures, stands alone, and is the same page when made again.

Method: the command on two small stores end to end, its HTML read by Python's parser and its
pictures as XML; pages and plots of values made by hand.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from cluster import cli
from cluster.eval_rows import from_plain
from cluster.report.page import Picture, Section, Table, html_page, inline, markdown
from cluster.report.plots import Dot, heat_map, scatter
from cluster.report.store_sections import skew_of_traces

VOID = {"meta", "br", "img", "link"}
LOADING = {"src", "href", "xlink:href", "data", "srcset", "action"}


class Reader(HTMLParser):
    """Collects words and what would be loaded; fails on tags that do not nest."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.words: list[str] = []
        self.loaded: list[str] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._note(attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._note(attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    def _note(self, attrs: list[tuple[str, str | None]]) -> None:
        self.loaded += [value or "" for name, value in attrs if name in LOADING]
        self.ids += [value or "" for name, value in attrs if name == "id"]


def read(page: str) -> Reader:
    reader = Reader()
    reader.feed(page)
    reader.close()
    assert reader.open == []
    return reader


def test_the_command_end_to_end(
    moetier: Callable[..., tuple[int, str, str]], mini_cache: Path, tmp_path: Path
) -> None:
    """One store, three lines: the original, the codes alone, the codes with compensators."""
    store, rows = mini_cache / "stores" / "mixtral-mini", tmp_path / "rows.jsonl"
    asked = ["report", store, "--windows", 2, "--window-tokens", 16, "--rows", rows]
    code, out, err = moetier(*asked, "--out", tmp_path / "one")
    assert code == 0, err
    assert out.splitlines() == [str(tmp_path / "one" / f"report.{end}") for end in ("md", "html")]
    page = (tmp_path / "one" / "report.html").read_text()
    reader = read(page)
    assert all(link.startswith(("#", "data:")) for link in reader.loaded)
    assert len(set(reader.ids)) == len(reader.ids)
    kept = [from_plain(json.loads(line)["row"]) for line in rows.read_text().splitlines()]
    assert {row.experts for row in kept} == {
        "original bf16",
        "mixtral-mini",
        "mixtral-mini, codes alone",
    }
    text = (tmp_path / "one" / "report.md").read_text()
    for row in kept:
        for figure in (f"{row.perplexity:.3f}", f"{row.bits_per_weight_moved:.3f}"):
            assert figure in text
            assert figure in reader.words
    for picture in (tmp_path / "one" / "report").iterdir():
        ElementTree.parse(picture)
        assert f"report/{picture.name}" in text

    # Again, of the rows that were kept: byte for byte the same, pictures included.
    assert moetier(*asked, "--out", tmp_path / "two")[0] == 0
    files = sorted(path for path in (tmp_path / "one").rglob("*") if path.is_file())
    assert len(files) > 5
    for path in files:
        again = tmp_path / "two" / path.relative_to(tmp_path / "one")
        assert again.read_bytes() == path.read_bytes()


def test_without_matplotlib_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    for name in [n for n in sys.modules if n.startswith("cluster.report")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "cluster.commands.report", raising=False)

    class Missing:
        def find_spec(self, name: str, path: object = None, target: object = None) -> None:
            if name == "matplotlib":
                raise ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib")

    monkeypatch.setattr(sys, "meta_path", [Missing(), *sys.meta_path])
    assert cli.main(["report", str(tmp_path), "--out", str(tmp_path)]) == 2
    assert "pip install 'moetier[report]'" in capsys.readouterr().err


def test_stores_of_the_same_name_or_twice(
    moetier: Callable[..., tuple[int, str, str]], mini_cache: Path, tmp_path: Path
) -> None:
    store = mini_cache / "stores" / "mixtral-mini"
    code, _, err = moetier("report", store, store, "--out", tmp_path)
    assert code == 2
    assert "every store once" in err


def test_cells_are_escaped_and_columns_without_figures_left_out() -> None:
    table = Table.of([{"a": "x<y|z", "b": None, "c": None}, {"a": "1", "b": "2", "c": None}])
    assert table.columns == ("a", "b")
    section = Section("T & U", ("a < b", table))
    assert "x&lt;y|z" in html_page("page", [section])
    assert "T &amp; U" in html_page("page", [section])
    assert "| x<y\\|z | - |" in markdown("page", [section], "pictures")
    with pytest.raises(ValueError, match="a cell for each"):
        Table(("a", "b"), (("1",),))


def test_pictures_of_one_page_share_no_id() -> None:
    svg = scatter({"a": [Dot(1, 2, 0.5), Dot(2, 1, hollow=True)]}, x_label="x", y_label="y")
    pictures = [Picture(name, svg, f"the picture {name}") for name in ("one", "two")]
    ids = read(html_page("page", [Section("s", tuple(pictures))])).ids
    assert ids
    assert len(set(ids)) == len(ids)
    assert 'aria-label="the picture one"' in inline(pictures[0])
    with pytest.raises(ValueError, match="Two Words"):
        Picture("Two Words", svg, "")


def test_plots_say_their_numbers_and_are_the_same_every_time() -> None:
    def cells() -> str:
        return heat_map(
            [[2.25, float("nan")], [3.5, 4.0]],
            rows=["0", "1"],
            columns=["0", "1"],
            x_label="expert",
            y_label="layer",
            value_label="bits",
        )

    assert cells() == cells()
    texts = [element.text for element in ElementTree.fromstring(cells()).iter() if element.text]
    assert {"2.25", "3.5", "4", "expert", "layer", "bits"} <= set(texts)
    assert "nan" not in texts


def test_skew_of_a_trace_by_hand() -> None:
    import torch

    from gpu_worker.replay import LayerTrace

    ids = torch.tensor([[[0, 1], [0, 2], [0, 1]]], dtype=torch.int32)
    weights = torch.tensor([[[0.75, 0.25], [0.25, 0.75], [0.5, 0.5]]])
    (skew,) = skew_of_traces({3: LayerTrace(ids, weights)}, {3: 4})
    assert skew.layer == 3
    assert skew.use_E == pytest.approx((3 / 6, 2 / 6, 1 / 6, 0))
    assert skew.weight_K == pytest.approx((2 / 3, 1 / 3))
