"""`moetier study`: what error-bounded experts cost, by depth of layer, heat of expert and bound."""

from __future__ import annotations

import argparse
import json
import sys
from importlib.util import find_spec
from pathlib import Path

from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar

from cluster.eval_rows import RowFile
from cluster.models import find_model
from cluster.progress import store_progress
from cluster.stores import original_store
from cluster.study import StudyRow, as_plain, layer_prior, study
from cluster.study_cells import StudySettings, Treatment
from cluster.study_page import as_text, heat_grid, page
from cluster.texts import BUILT_IN, read_texts
from expert_store.calibration import Calibration
from expert_store.format import load_manifest
from expert_store.prior import save_prior
from expert_store.types import ModelInfo

HELP = """Measure what coarse experts cost: error bounds x layer groups x hot or cold experts.

The experts of each cell are really compressed and decoded by the codec, as a store would have them;
all others stay the original bfloat16. A layer's hot experts are the most used ones that take half
of its routed tokens. Reports loss, KL divergence from the original and agreement with it, and the
bits of the cell's experts. With --out, FOLDER gets rows.jsonl (from which a stopped study goes on),
study.md with a heat map, prior.json for `moetier compress --prior`: how much each layer matters,
and, where matplotlib is installed (moetier[report]), study.svg."""

DEFAULT_BOUNDS = ("row:0.1", "row:0.3", "row:0.6")
WINDOWS, WINDOW_TOKENS = 16, 256


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", metavar="MODEL", help="checkpoint folder, Hub id, or a model by name"
    )
    parser.add_argument(
        "--text",
        action="extend",
        nargs="+",
        type=Path,
        default=[],
        metavar="PATH",
        help=f"text files or folders of *.txt (default: {BUILT_IN}, inside CPython)",
    )
    parser.add_argument(
        "--codec",
        nargs="+",
        choices=("cuszp", "sz3"),
        default=["cuszp"],
        help="(default: cuszp; both keep the same bound, so their quality is nearly the same)",
    )
    parser.add_argument(
        "--bounds",
        nargs="+",
        default=list(DEFAULT_BOUNDS),
        metavar="MODE:VALUE",
        help="largest error of a weight: row:0.1 is a tenth of its row's root mean square; also "
        f"group: and absolute: (default: {' '.join(DEFAULT_BOUNDS)})",
    )
    parser.add_argument(
        "--noise",
        nargs="+",
        default=[],
        metavar="ENERGY",
        help="the paper's variant beside it: instead of compression, noise of this energy relative "
        "to that of the experts' weighted sum",
    )
    parser.add_argument(
        "--calibration",
        type=Path,
        metavar="FOLDER",
        help="says which experts are hot (default: the texts' own routing does)",
    )
    parser.add_argument("--windows", type=int, default=WINDOWS, metavar="N", help="of each text")
    parser.add_argument("--window-tokens", type=int, default=WINDOW_TOKENS, metavar="N")
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write rows, page and prior")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Measure and print. Raises ValueError and StoreError, which the CLI turns into exit codes."""
    disable_progress_bar()
    treatments = [Treatment(codec, bound) for codec in args.codec for bound in args.bounds]
    treatments += [Treatment("noise", energy) for energy in args.noise]
    settings = StudySettings(tuple(treatments), args.windows, args.window_tokens, args.seed)
    texts = read_texts(args.text)
    calibration = None if args.calibration is None else Calibration(args.calibration)
    kept = None if args.out is None else RowFile(args.out / "rows.jsonl")
    with store_progress() as report:
        store = original_store(find_model(args.model), report)
    model = load_manifest(store).model
    # disable=None: tqdm's word for "only on a terminal".
    with tqdm(desc="study", unit="cell", file=sys.stderr, disable=None, leave=False) as bar:
        rows = []
        for row in study(
            store, texts, settings, calibration=calibration, rows=kept, begin=bar.reset
        ):
            rows.append(row)
            bar.update()
    prior = layer_prior(rows, sorted(model.moe_layers))
    if args.out is not None:
        write(args.out, rows, model, prior, notes=notes(settings, [text.name for text in texts]))
    if args.json:
        found = {"rows": [as_plain(row) for row in rows], "prior": prior}
        print(json.dumps(found, indent=2))
    else:
        print(as_text(rows, prior))
    return 0


def notes(settings: StudySettings, texts: list[str]) -> list[str]:
    """What was measured, in a sentence."""
    return [
        f"{settings.windows} windows of {settings.window_tokens} tokens of each of: "
        f"{', '.join(texts)}. Noise is drawn with seed {settings.seed}."
    ]


def write(
    folder: Path,
    rows: list[StudyRow],
    model: ModelInfo,
    prior: dict[int, float],
    *,
    notes: list[str],
) -> None:
    """The page, the prior and, where it can be drawn, the heat map."""
    folder.mkdir(parents=True, exist_ok=True)
    title = f"{model.name}: what coarse experts cost by depth, heat and error bound"
    (folder / "study.md").write_text(page(rows, prior, title=title, notes=notes), encoding="utf-8")
    save_prior(folder / "prior.json", model, prior)
    if find_spec("matplotlib") is not None:
        (folder / "study.svg").write_text(draw(rows), encoding="utf-8")


def draw(rows: list[StudyRow]) -> str:
    """The heat map as SVG."""
    # The one import that only some can do: the package is optional and large.
    from cluster.report.plots import heat_map

    grid = heat_grid(rows)
    return heat_map(
        grid.values,
        rows=grid.rows,
        columns=grid.columns,
        x_label="what is done to the experts",
        y_label="layers, experts",
        value_label="log10 KL, nats per token",
    )
