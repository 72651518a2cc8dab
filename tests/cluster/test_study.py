"""Goal: a study's cells are what they say: real compression of the chosen experts and of no other.

Method: a tiny model's original store, random windows, no tokenizer; sets and priors by hand; the
command once on the bundled model.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from cluster.eval_model import OpenVariant, opened
from cluster.eval_rows import RowFile
from cluster.eval_settings import Variant
from cluster.references import References
from cluster.study import StudyRow, layer_prior, study_windows
from cluster.study_cells import StudySettings, Treatment, cells, hot_experts, layer_groups
from cluster.study_page import heat_grid, heat_map, page
from cluster.study_source import Encoder
from cluster.texts import EvalText
from expert_store.codecs.bound import ErrorBound, largest_error
from expert_store.compress import compress
from expert_store.config import CompressionConfig
from expert_store.errors import StoreFormatError
from expert_store.format import parse_codes
from expert_store.prior import load_prior, save_prior
from expert_store.types import ExpertKey, RecordRequest
from kernels import ops
from tests.tiny_checkpoints import write_tiny_checkpoint

Run = Callable[..., tuple[int, str, str]]
WINDOWS = torch.randint(0, 128, (3, 25), generator=torch.Generator().manual_seed(0))
TEXT = EvalText("random", "its windows are made by hand")
FINE, MIDDLE, COARSE = "row:0.002", "row:0.2", "row:0.8"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenVariant]:
    folder = tmp_path_factory.mktemp("study")
    # Weights large enough that what the experts say matters.
    model = write_tiny_checkpoint("mixtral", folder / "model", layers=3, initializer_range=0.2)
    compress(model, folder / "store", CompressionConfig(recipe="original"), jobs=1)
    with opened(Variant("original", folder / "store")) as variant:
        yield variant


def run(
    original: OpenVariant, folder: Path, treatments: list[Treatment], rows: RowFile | None = None
) -> dict[str, StudyRow]:
    found = study_windows(
        original,
        [(TEXT, WINDOWS)],
        StudySettings(tuple(treatments)),
        rows=rows,
        references=References(folder / "references"),
    )
    return {str(row.cell): row for row in found}


def name(treatment: str, group: str = "all", heat: str = "all") -> str:
    return f"{treatment}, {group} layers, {heat} experts"


def test_hot_experts_take_half_and_no_more_than_they_need() -> None:
    assert hot_experts([5, 1, 9, 3]) == {2}
    assert hot_experts([5, 1, 8, 3]) == {2, 0}
    assert hot_experts([4, 4, 4, 4]) == {0, 1}
    assert hot_experts([0, 0]) == {0}
    assert hot_experts([7]) == {0}


def test_layers_fall_into_thirds_by_depth() -> None:
    groups = layer_groups([3, 1, 2, 5, 4, 6, 7])
    assert groups["first"] == (1,)
    assert (*groups["shallow"], *groups["middle"], *groups["deep"]) == groups["all"]
    assert {len(groups[third]) for third in ("shallow", "middle", "deep")} == {2, 3}
    assert set(layer_groups([4])) >= {"first", "all"}


def test_hot_and_cold_are_all_experts_and_empty_cells_are_left_out() -> None:
    tokens = {0: [9, 1, 1], 1: [5], 2: [1, 2, 3]}
    found = {(c.group, c.heat): c for c in cells(tokens, [Treatment("cuszp", COARSE)])}
    assert ("middle", "cold") not in found, "its only expert is hot"
    for (group, heat), cell in found.items():
        assert all(cell.targets.values())
        if heat == "all":
            parts = [found[group, part] for part in ("hot", "cold") if (group, part) in found]
            assert cell.num_experts == sum(part.num_experts for part in parts)
            assert {(la, e) for la in cell.targets for e in cell.targets[la]} == {
                (la, e) for part in parts for la in part.targets for e in part.targets[la]
            }


def test_larger_bounds_cost_more_and_a_tiny_one_nothing(
    original: OpenVariant, tmp_path: Path
) -> None:
    bounds = [Treatment("cuszp", bound) for bound in (FINE, MIDDLE, COARSE)]
    rows = run(original, tmp_path, [*bounds, Treatment("sz3", COARSE)])
    for group in ("first", "shallow", "middle", "deep", "all"):
        fine, middle, coarse = (
            rows[name(f"cuszp {bound}", group)].row for bound in (FINE, MIDDLE, COARSE)
        )
        assert 0 <= (fine.kl or 0) < 1e-4
        assert 10 * (fine.kl or 0) < (middle.kl or 0) < (coarse.kl or 0)
        assert (fine.agreement or 0) > 0.97
        assert fine.stored_bytes > middle.stored_bytes > coarse.stored_bytes
        assert fine.bits_per_weight_moved > coarse.bits_per_weight_moved
    both = [rows[name(f"{codec} {COARSE}")] for codec in ("cuszp", "sz3")]
    assert both[0].row.kl == pytest.approx(both[1].row.kl, rel=0.7)
    assert all(1 < (row.coded_bits or 0) < 8 for row in both)
    assert both[0].row.bits_per_weight_moved == pytest.approx(both[0].coded_bits or 0, rel=0.05)
    shares = [rows[name(f"cuszp {FINE}", "all", heat)].pair_share for heat in ("hot", "cold")]
    assert sum(shares) == pytest.approx(1)
    assert shares[0] >= 0.5
    assert rows[name(f"cuszp {FINE}")].pair_share == 1


def test_only_the_cells_experts_are_coded_and_within_the_bound(original: OpenVariant) -> None:
    source, bound = original.source, ErrorBound.parse(MIDDLE)
    chosen, other = ExpertKey(1, 2), ExpertKey(1, 3)
    shape = source.manifest.model.expert
    for codec in ("cuszp", "sz3"):
        coded = Encoder(source, codec, bound).source([chosen])
        served = {}
        for key in (chosen, other):
            (data,) = coded.fetch([RecordRequest(key, "codes")])
            info = coded.manifest.experts[key]
            assert data.numel() == info.codes.num_bytes
            served[key] = parse_codes(key, data, shape, info.form).mlp
        (plain,) = source.fetch([RecordRequest(chosen, "codes")])
        form = source.manifest.experts[chosen].form
        weights = parse_codes(chosen, plain, shape, form).mlp
        for mine, theirs in (
            (served[chosen].gate, weights.gate),
            (served[chosen].down, weights.down),
        ):
            weight_NK = ops.dequantize(theirs)
            share = largest_error(weight_NK, ops.dequantize(mine), bound.of(weight_NK))
            assert 0.5 < share <= 1
        assert coded.manifest.experts[other] == source.manifest.experts[other]
        assert coded.manifest.version != source.manifest.version


def test_rows_are_read_back_equal_and_nothing_is_measured_twice(
    original: OpenVariant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    treatments = [Treatment("cuszp", COARSE), Treatment("noise", "0.1")]
    first = run(original, tmp_path, treatments, RowFile(tmp_path / "rows.jsonl"))
    monkeypatch.setattr("cluster.study_bench.Bench._measured", None)
    again = run(original, tmp_path, treatments, RowFile(tmp_path / "rows.jsonl"))
    assert again == first


def test_the_same_cell_measured_again_is_the_same_and_the_model_is_left_alone(
    original: OpenVariant, tmp_path: Path
) -> None:
    treatments = [Treatment("cuszp", COARSE), Treatment("noise", "0.2"), Treatment("noise", "0")]
    first, again = (run(original, tmp_path, treatments) for _ in range(2))
    for cell, row in first.items():
        assert row.row.window_kl == again[cell].row.window_kl
        assert row.row.window_nats == again[cell].row.window_nats
    none = first[name("noise 0")].row
    assert (none.kl or 0) < 1e-6, "the experts of the cells before are no longer bound"
    assert (first[name("noise 0.2")].row.kl or 0) > 1e-4
    assert first[name("noise 0.2")].coded_bits is None


def test_the_prior_is_the_groups_kl_per_layer(original: OpenVariant, tmp_path: Path) -> None:
    rows = list(run(original, tmp_path, [Treatment("cuszp", COARSE)]).values())
    kl = {row.cell.group: row.row.kl or 0.0 for row in rows if row.cell.heat == "all"}
    prior = layer_prior(rows, [0, 1, 2])
    assert sum(prior.values()) == pytest.approx(3)
    assert prior[1] / prior[2] == pytest.approx(kl["middle"] / kl["deep"])
    assert prior[0] / prior[2] == pytest.approx(kl["shallow"] / kl["deep"])
    with pytest.raises(ValueError, match="finish the study"):
        layer_prior(rows[:4], [0, 1, 2])
    shown = page(rows, prior, title="Tiny", notes=["a note"])
    assert heat_map(rows) in shown
    assert "█" in shown
    assert f"| middle | all | {kl['middle']:.5f}" in shown
    grid = heat_grid(rows)
    assert grid.columns == (f"cuszp {COARSE}",)
    assert len(grid.rows) == len(rows)
    (drawn,) = grid.values[grid.rows.index("middle all")]
    assert 10**drawn == pytest.approx(kl["middle"])


def test_a_prior_is_read_for_its_model_alone(original: OpenVariant, tmp_path: Path) -> None:
    model, path = original.manifest.model, tmp_path / "prior.json"
    save_prior(path, model, {0: 1.5, 1: 0.5, 2: 1.0})
    assert load_prior(path, model) == {0: 1.5, 1: 0.5, 2: 1.0}
    save_prior(path, model, {0: 1.5, 1: 0.5})
    with pytest.raises(ValueError, match="moetier study"):
        load_prior(path, model)
    path.write_text('{"format": "something"}')
    with pytest.raises(StoreFormatError, match="format"):
        load_prior(path, model)
    with pytest.raises(StoreFormatError, match="cannot be read"):
        load_prior(tmp_path / "absent", model)


def test_settings_and_treatments_are_checked_at_the_door() -> None:
    for method, strength in (("cuszp", "tensor:0.1"), ("noise", "much"), ("noise", "-1")):
        with pytest.raises(ValueError, match="expected"):
            Treatment(method, strength)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="all different"):
        StudySettings((Treatment("cuszp", COARSE),) * 2)
    with pytest.raises(ValueError, match="windows"):
        StudySettings((Treatment("cuszp", COARSE),), windows=0)


def test_the_command_writes_rows_page_and_prior(moetier: Run, tmp_path: Path) -> None:
    arguments = ("--windows", 1, "--window-tokens", 16, "--bounds", "row:0.6", "--out", tmp_path)
    code, out, _ = moetier("study", "mixtral-mini", *arguments)
    assert code == 0
    assert "sensitivity by layer" in out
    assert "cuszp row:0.6" in out
    prior = json.loads((tmp_path / "prior.json").read_text())["layers"]
    assert sum(prior.values()) == pytest.approx(6)
    assert "█" in (tmp_path / "study.md").read_text()
    has_plots = find_spec("matplotlib") is not None
    assert (tmp_path / "study.svg").is_file() == has_plots
    code, out, _ = moetier("study", "mixtral-mini", *arguments, "--json")
    assert code == 0
    assert json.loads(out)["prior"] == pytest.approx(prior)
    code, _, error = moetier("study", "mixtral-mini", "--bounds", "row:x")
    assert code == 2
    assert "row:0.1" in error
