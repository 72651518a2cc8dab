"""What coarse experts cost, by depth of layer, heat of expert and error bound: `moetier study`.

`python -m benchmarks.study [MODEL] [TEXT ...]` takes text files or folders of *.txt; by default the
six held-out domains of ../shared/mini/eval where they are there, else the built-in text. Rows are
kept in the cache folder, so that a stopped run goes on.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from benchmarks.record import RESULTS, provenance
from cluster.commands.study import DEFAULT_BOUNDS, notes
from cluster.environment import cache_folder
from cluster.eval_rows import RowFile
from cluster.models import find_model
from cluster.stores import original_store
from cluster.study import StudyRow, layer_prior, study
from cluster.study_cells import StudySettings, Treatment
from cluster.study_page import page
from cluster.texts import BUILT_IN_NOTE, EvalText, read_texts
from expert_store.format import load_manifest
from expert_store.sources import DEFAULT_MODEL

HELD_OUT = Path(__file__).resolve().parents[2] / "shared" / "mini" / "eval"
NOISE = ("0.03", "0.1")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default=DEFAULT_MODEL)
    parser.add_argument("text", nargs="*", type=Path, help="text files or folders of *.txt")
    parser.add_argument("--windows", type=int, default=4, help="of each text")
    parser.add_argument("--window-tokens", type=int, default=128)
    args = parser.parse_args(argv)
    held_out = not args.text and HELD_OUT.is_dir()
    texts = read_texts([HELD_OUT] if held_out else args.text)
    settings = settings_of(args.windows, args.window_tokens)
    store = original_store(find_model(args.model))
    model = load_manifest(store).model
    rows = measured(store, texts, settings)
    told = [provenance(), *notes(settings, [text.name for text in texts])]
    if not held_out and not args.text:
        told.append(BUILT_IN_NOTE)
    prior = layer_prior(rows, sorted(model.moe_layers))
    title = f"{model.name}: what coarse experts cost, by depth, heat and error bound"
    report = RESULTS / f"study-{model.name}.md"
    report.write_text(page(rows, prior, title=title, notes=told), encoding="utf-8")
    print(f"wrote {report}")
    return 0


def settings_of(windows: int, window_tokens: int) -> StudySettings:
    """The treatments of this benchmark, on so many windows of each text."""
    treatments = [Treatment("cuszp", bound) for bound in DEFAULT_BOUNDS]
    treatments += [Treatment("noise", energy) for energy in NOISE]
    return StudySettings(tuple(treatments), windows, window_tokens)


def measured(store: Path, texts: Sequence[EvalText], settings: StudySettings) -> list[StudyRow]:
    """Every cell; what is kept in the cache folder is not measured again."""
    name = load_manifest(store).model.name
    rows = []
    for row in study(
        store, texts, settings, rows=RowFile(cache_folder() / "studies" / f"{name}.jsonl")
    ):
        rows.append(row)
        print(f"{row.cell}: KL {row.row.kl:.5f}, {row.row.seconds:.1f} s", flush=True)
    return rows


if __name__ == "__main__":
    raise SystemExit(main())
