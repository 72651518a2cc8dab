"""Quality per byte moved: every recipe, control, policy and ablation on one model, as one page.

`python -m benchmarks.quality_per_byte --model smol-moe --calibration FOLDER` makes the stores it
needs in the cache folder, measures, keeps rows so that it goes on where it stopped, and writes
benchmarks/results/quality-per-byte-MODEL.md and .html. With `--budget-minutes` it stops in time
and writes the page of what there is, the most important variants come first; `--budget-minutes 0`
measures nothing and writes the page of the rows that are kept.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from pathlib import Path

from transformers.utils.logging import disable_progress_bar

from benchmarks.record import RESULTS, provenance
from cluster.environment import cache_folder
from cluster.eval_rows import RowFile
from cluster.eval_settings import EvalSettings
from cluster.eval_tables import conditions
from cluster.models import find_model
from cluster.texts import BUILT_IN, BUILT_IN_NOTE, read_texts
from expert_store.calibration import Calibration
from expert_store.checkpoint import Checkpoint

HELD_OUT = Path(__file__).resolve().parents[2] / "shared" / "mini" / "eval"
DEFAULTS = EvalSettings()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser)
    args = parser.parse_args(argv)
    try:
        # First, so that a machine without matplotlib learns it before hours of measuring.
        from benchmarks.per_byte import page as pages
        from cluster.report.page import write_page
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        parser.error("matplotlib is not installed; run pip install 'moetier[report]'")
    from benchmarks.per_byte.experiments import chosen, experiments
    from benchmarks.per_byte.runner import Runner
    from benchmarks.study import measured as study_rows
    from benchmarks.study import settings_of as study_settings
    from cluster.report.routing import skew_of_store
    from cluster.report.store_sections import skew_of_tables
    from cluster.stores import original_store

    disable_progress_bar()
    model = find_model(args.model)
    held_out = not args.text and HELD_OUT.is_dir()
    texts, settings = read_texts([HELD_OUT] if held_out else args.text), settings_of(args)
    info = Checkpoint(model).model_info
    wanted = experiments(info.top_k, args.calibration, args.alike)
    if args.only or args.labels is not None:
        lines = [] if args.labels is None else args.labels.read_text().splitlines()
        wanted = chosen(wanted, args.only, [line for line in lines if line])
    rows = args.rows or cache_folder() / "rows" / f"quality-per-byte-{info.name}.jsonl"
    rows.parent.mkdir(parents=True, exist_ok=True)
    minutes = math.inf if args.budget_minutes is None else args.budget_minutes
    runner = Runner(
        model=model,
        texts=texts,
        settings=settings,
        rows=RowFile(rows),
        deadline=time.monotonic() + 60 * minutes,
        remake=args.remake,
        jobs=args.jobs,
        say=lambda text: print(text, flush=True),
    )
    results = {result.experiment.label: result for result in runner.run(wanted)}
    if args.calibration is not None:
        skews, origin = skew_of_tables(Calibration(args.calibration).info.tables), "the calibration"
    else:
        skews = skew_of_store(original_store(model), texts[0], settings)
        origin = f"the text {texts[0].name}"
    about = [provenance(), conditions(settings).replace("the first line", "the original")]
    about.append(f"Texts: {', '.join(text.name for text in texts)}.")
    if any(text.name == BUILT_IN for text in texts):
        about.append(BUILT_IN_NOTE)
    study = []
    if args.study_windows:
        cut = study_settings(args.study_windows, args.window_tokens)
        study = study_rows(original_store(model), texts, cut)
    made = pages.sections(results, runner.left, skews, origin, about, study)
    title = f"{info.name}: quality per byte moved"
    for path in write_page(args.out, f"quality-per-byte-{info.name}", title, made):
        print(f"wrote {path}")
    return 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    def option(flag: str, text: str, **kwargs: object) -> None:
        parser.add_argument(flag, help=text, **kwargs)  # type: ignore[arg-type]

    option("--model", "smol-moe, mixtral-mini or a folder", required=True)
    option("--calibration", "what `moetier calibrate` wrote; best needs it", type=Path)
    option("--alike", "what `moetier calibrate --alike` wrote, to leave an item out", type=Path)
    option("--text", "text file or folder of *.txt", type=Path, action="append", default=[])
    option("--windows", "of each text", type=int, default=DEFAULTS.windows)
    option("--window-tokens", "of each window", type=int, default=DEFAULTS.window_tokens)
    option("--only", "labels that begin so; repeatable", action="append", default=[])
    option("--labels", "file of labels, a line each, of which all are measured", type=Path)
    option("--remake", "make the stores of labels that begin so again", metavar="PREFIX")
    option("--budget-minutes", "begin no new measurement after so many", type=float)
    option(
        "--study-windows",
        "of each text for the study by depth and heat (0: none)",
        type=int,
        default=0,
    )
    option("--rows", "JSON-lines file of rows (default: in the cache folder)", type=Path)
    option("--out", "folder of the page", type=Path, default=RESULTS)
    option("--jobs", "experts compressed at a time (default: one per core)", type=int)


def settings_of(args: argparse.Namespace) -> EvalSettings:
    """As many sequences and decoded tokens as there are windows and tokens."""
    decoded = min(DEFAULTS.decode_tokens, args.window_tokens)
    return EvalSettings(
        windows=args.windows,
        window_tokens=args.window_tokens,
        decode_tokens=decoded,
        warm_up=min(DEFAULTS.warm_up, decoded // 2),
        batch=tuple(size for size in DEFAULTS.batch if size <= args.windows) or (1,),
    )


if __name__ == "__main__":
    raise SystemExit(main())
