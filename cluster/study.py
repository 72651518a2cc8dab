"""A study: what coarse experts cost, by depth of their layer, by how hot they are, and by bound.

The companion paper's experiment (arXiv 2509.07727) with real compression in place of added noise;
noise can stand beside it. How a cell is measured is `cluster/study_bench.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cluster.environment import cache_folder
from cluster.eval_model import OpenVariant, opened
from cluster.eval_rows import EvalRow, RowFile, against, pooled
from cluster.eval_settings import Variant
from cluster.references import References
from cluster.study_bench import Bench
from cluster.study_cells import Cell, StudySettings, cells, layer_groups, share_of
from cluster.texts import EvalText
from expert_store.calibration import Calibration
from gpu_worker.scoring import cut_windows

LEAST_SHARE = 0.05
"""Of the mean over layers: no layer's prior is less, before all are scaled to 1 on average."""


@dataclass(frozen=True, slots=True)
class StudyRow:
    """A cell and what it costs; `row` is over all texts, its loss over the original's.

    `coded_bits` are the bits per weight of the cell's experts as stored, None for noise;
    `pair_share` is the share of all routed (token, expert) pairs that go to them.
    """

    cell: Cell
    row: EvalRow
    coded_bits: float | None
    pair_share: float


def study(
    store: Path,
    texts: Sequence[EvalText],
    settings: StudySettings,
    *,
    calibration: Calibration | None = None,
    rows: RowFile | None = None,
    references: References | None = None,
    begin: Callable[[int], None] = lambda num_cells: None,
) -> Iterator[StudyRow]:
    """A row per cell, as they are done; `store` holds the original weights.

    Experts are hot or cold by the calibration's tokens, without one by those of the texts. What
    `rows` holds is not measured again. `begin` is told how many cells there are.
    Raises ValueError when a text is too short or the calibration another model's, StoreError.
    """
    with opened(Variant("original", store)) as original:
        if calibration is not None:
            calibration.check_model(original.manifest.model)
        windows = [(text, windows_of(original, text, settings)) for text in texts]
        yield from study_windows(
            original,
            windows,
            settings,
            calibration=calibration,
            rows=rows,
            references=references,
            begin=begin,
        )


def study_windows(
    original: OpenVariant,
    windows: Sequence[tuple[EvalText, torch.Tensor]],
    settings: StudySettings,
    *,
    calibration: Calibration | None = None,
    rows: RowFile | None = None,
    references: References | None = None,
    begin: Callable[[int], None] = lambda num_cells: None,
) -> Iterator[StudyRow]:
    """As `study`, over windows [W, T + 1] of each text that were cut before."""
    references = references or References(cache_folder() / "references")
    bench = Bench(original, settings, references, rows)
    passages = [bench.passage(text, windows_WT) for text, windows_WT in windows]
    tokens = _summed([passage.tokens for passage in passages])
    heat: Mapping[int, Sequence[int]] = tokens
    if calibration is not None:
        heat = {layer: table.tokens_E for layer, table in calibration.info.tables.items()}
    planned = list(cells(heat, settings.treatments))
    begin(len(planned))
    base = _whole([passage.row for passage in passages])
    for cell in planned:
        whole = _whole([bench.row(cell, passage) for passage in passages])
        share = share_of(cell.targets, tokens)
        yield StudyRow(cell, against(base, whole), bench.coded_bits(cell, whole), share)


def windows_of(original: OpenVariant, text: EvalText, settings: StudySettings) -> torch.Tensor:
    """[W, T + 1] token ids. Raises ValueError when the text is too short for them."""
    if original.model.tokenizer is None:
        raise ValueError("this model has no tokenizer, so no text can be read with it")
    # verbose: the whole text is longer than the model's context, which is no reason to warn.
    ids = original.model.tokenizer(text.text, add_special_tokens=False, verbose=False)["input_ids"]
    width = min(settings.window_tokens, original.manifest.model.max_positions)
    try:
        return cut_windows(ids, num_windows=settings.windows, window_tokens=width)
    except ValueError as error:
        raise ValueError(f"{text.name}: {error}") from error


def layer_prior(rows: Sequence[StudyRow], layers: Sequence[int]) -> dict[int, float]:
    """How much each layer's experts matter at the same bound, 1 on average over the layers.

    The KL of a group (all its experts) is shared equally among its layers, and the first layer has
    its own; the mean over treatments of codecs, or of noise where there are none. Divergences of
    small errors add up over layers, so groups of any size can be compared. Raises ValueError when
    no treatment has a row for each group.
    """
    kl: dict[str, dict[str, float]] = {}
    for row in rows:
        if row.cell.heat == "all" and row.row.kl is not None:
            kl.setdefault(str(row.cell.treatment), {})[row.cell.group] = row.row.kl
    names = [str(row.cell.treatment) for row in rows if row.cell.treatment.method != "noise"]
    used = [kl[name] for name in dict.fromkeys(names)] or list(kl.values())
    groups = layer_groups(layers)
    if not used or any(groups.keys() - found.keys() for found in used):
        raise ValueError("rows: expected every layer group of each treatment, finish the study")
    shares = [_shares(found, groups) for found in used]
    return {layer: sum(one[layer] for one in shares) / len(shares) for layer in sorted(layers)}


def _shares(kl: Mapping[str, float], groups: Mapping[Any, Sequence[int]]) -> dict[int, float]:
    """One treatment's share of each layer, 1 on average."""
    thirds = {name: groups[name] for name in ("shallow", "middle", "deep") if name in groups}
    found = {layer: kl[name] / len(some) for name, some in thirds.items() for layer in some}
    (first,) = groups["first"]
    home, beside = next((name, some) for name, some in thirds.items() if first in some)
    if len(beside) > 1 and kl[home] > kl["first"]:
        rest = (kl[home] - kl["first"]) / (len(beside) - 1)
        found |= {layer: kl["first"] if layer == first else rest for layer in beside}
    mean = sum(found.values()) / len(found)
    # What few windows did not see still matters.
    found = {layer: max(value, LEAST_SHARE * mean) for layer, value in found.items()}
    mean = sum(found.values()) / len(found)
    return {layer: value / mean if mean else 1.0 for layer, value in found.items()}


def as_plain(row: StudyRow) -> dict[str, Any]:
    """The row for JSON."""
    cell = row.cell
    targets = {str(layer): sorted(experts) for layer, experts in sorted(cell.targets.items())}
    return {
        **dataclasses.asdict(cell.treatment),
        "group": cell.group,
        "heat": cell.heat,
        "targets": targets,
        "coded_bits": row.coded_bits,
        "pair_share": row.pair_share,
        "row": dataclasses.asdict(row.row),
    }


def _whole(rows: Sequence[EvalRow]) -> EvalRow:
    return rows[0] if len(rows) == 1 else pooled(rows)


def _summed(tables: Sequence[Mapping[int, Sequence[int]]]) -> dict[int, list[int]]:
    return {
        layer: [sum(column) for column in zip(*(table[layer] for table in tables), strict=True)]
        for layer in tables[0]
    }
