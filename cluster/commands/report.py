"""`moetier report`: one page about stores, in Markdown and HTML: fronts, domains, allocation."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from transformers.utils.logging import disable_progress_bar

from cluster.eval_rows import EvalRow, RowFile
from cluster.eval_settings import EvalSettings, Variant
from cluster.eval_tables import conditions
from cluster.evaluate import evaluate
from cluster.models import find_model
from cluster.progress import store_progress
from cluster.report.lines import Line, duel
from cluster.report.page import Section, write_page
from cluster.report.routing import skew_of_store
from cluster.report.sections import (
    claims_section,
    comparison_section,
    domain_section,
    front_section,
    traffic_section,
)
from cluster.report.store_sections import (
    LayerSkew,
    allocation_section,
    kurtosis_section,
    skew_of_tables,
    skew_section,
)
from cluster.stores import folder, original_store
from cluster.texts import BUILT_IN, BUILT_IN_NOTE, EvalText, read_texts
from expert_store.calibration import Calibration
from expert_store.format import load_manifest
from expert_store.types import Manifest

HELP = """One page about STOREs of one model: what they lose for the bytes that they move.

Writes report.md and report.html (which needs no other file and no network) into --out: the Pareto
front of KL and loss against bits moved with intervals, tables by text, bytes by cache and batch,
bits and ranks by layer and expert, router skew, kurtosis against error. The original's bf16 experts
are measured along; a copy of them, as large as the model, is kept in the cache folder."""

ORIGINAL = "original bf16"
DEFAULTS = EvalSettings()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", nargs="+", metavar="STORE", help="folder of a store")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FOLDER", help="where the page is written"
    )
    parser.add_argument(
        "--original",
        metavar="MODEL",
        help="folder or Hub id of the model (default: the one that the stores were made of)",
    )
    parser.add_argument(
        "--text",
        action="append",
        type=Path,
        default=[],
        metavar="FILE",
        help=f"a text file or a folder of *.txt; repeatable (default: {BUILT_IN})",
    )
    parser.add_argument(
        "--calibration",
        type=Path,
        metavar="FOLDER",
        help="take router skew from what `moetier calibrate` wrote, not from the first text",
    )
    parser.add_argument("--windows", type=int, default=DEFAULTS.windows, metavar="N")
    parser.add_argument("--window-tokens", type=int, default=DEFAULTS.window_tokens, metavar="N")
    parser.add_argument(
        "--rows",
        type=Path,
        metavar="FILE",
        help="keep every row in this JSON-lines file, and do not measure again what it holds",
    )
    parser.add_argument("--seed", type=int, help="windows from random places (default: fixed)")


def run(args: argparse.Namespace) -> int:
    """Measure, write, say where. Raises ValueError and StoreError, which the CLI prints."""
    disable_progress_bar()
    stores = _named(args.store)
    manifests = {name: load_manifest(store) for name, store in stores.items()}
    model = _one_model(manifests)
    settings, texts = _settings(args), read_texts(args.text)
    calibration = None if args.calibration is None else Calibration(args.calibration)
    if calibration is not None:
        calibration.check_model(next(iter(manifests.values())).model)
    with store_progress() as progress:
        original = original_store(find_model(args.original or model), progress)
    kept = None if args.rows is None else RowFile(args.rows)
    lines = measured_lines(stores, manifests, original, texts, settings, kept)
    if calibration is not None:
        skews, origin = skew_of_tables(calibration.info.tables), "the calibration's text"
    else:
        skews, origin = skew_of_store(original, texts[0], settings), f"the text {texts[0].name}"
    sections = report_sections(lines, manifests, skews, origin, texts, settings)
    for page in write_page(args.out, "report", f"{model}: quality per byte moved", sections):
        print(page)
    return 0


def measured_lines(
    stores: Mapping[str, Path],
    manifests: Mapping[str, Manifest],
    original: Path,
    texts: Sequence[EvalText],
    settings: EvalSettings,
    kept: RowFile | None = None,
) -> list[Line]:
    """The original, every store as it is meant to run, and its codes alone where it has more."""
    variants, families = [Variant(ORIGINAL, original)], {ORIGINAL: "original"}
    for name, store in stores.items():
        manifest = manifests[name]
        if manifest.recipe.is_original:
            continue
        variants.append(Variant(name, store))
        families[name] = manifest.recipe.name
        if manifest.recipe.top_n and any(info.factors for info in manifest.experts.values()):
            variants.append(Variant(codes_alone(name), store, top_n=0))
            families[codes_alone(name)] = f"{manifest.recipe.name}, codes alone"
    rows: dict[str, list[EvalRow]] = {variant.label: [] for variant in variants}
    for row in evaluate(variants, texts, settings, original=original, rows=kept):
        rows[row.experts].append(row)
    baseline = rows[ORIGINAL]
    return [
        Line.of(label, families[label], own, () if label == ORIGINAL else baseline)
        for label, own in rows.items()
    ]


def codes_alone(name: str) -> str:
    return f"{name}, codes alone"


def report_sections(
    lines: Sequence[Line],
    manifests: Mapping[str, Manifest],
    skews: Sequence[LayerSkew],
    origin: str,
    texts: Sequence[EvalText],
    settings: EvalSettings,
) -> list[Section]:
    """The whole page, in order."""
    by_label = {line.label: line for line in lines}
    about = [conditions(settings).replace("the first line", "the original")]
    if any(text.name == BUILT_IN for text in texts):
        about.append(BUILT_IN_NOTE)
    sections = [Section("What was measured", tuple(about)), front_section(lines)]
    own = [by_label[name] for name in manifests if name in by_label]
    if len(own) > 1:
        duels = [duel(other, own[0]) for other in own[1:]]
        sections.append(comparison_section(duels, f"Every store held against {own[0].label}"))
    restored = [line for line in own if codes_alone(line.label) in by_label]
    if restored:
        plain = [by_label[codes_alone(line.label)] for line in restored]
        sections.append(claims_section(lines[0], plain, restored))
    sections += [domain_section(lines), traffic_section(lines)]
    low_bit = {name: m for name, m in manifests.items() if not m.recipe.is_original}
    for number, (name, manifest) in enumerate(low_bit.items()):
        sections.append(allocation_section(name, str(number), manifest))
    if low_bit:
        sections.append(kurtosis_section(low_bit))
    sections.append(skew_section(skews, origin))
    return sections


def _named(paths: Sequence[str]) -> dict[str, Path]:
    """Stores by the last part of their paths, or by all of it where two end alike."""
    stores = [folder(path) for path in paths]
    ends = [store.resolve().name for store in stores]
    names = [
        end if ends.count(end) == 1 else str(store) for end, store in zip(ends, stores, strict=True)
    ]
    if len(set(names)) < len(names):
        raise ValueError(f"STORE: got {paths}, expected every store once")
    return dict(zip(names, stores, strict=True))


def _one_model(manifests: Mapping[str, Manifest]) -> str:
    models = {manifest.model.name for manifest in manifests.values()}
    if len(models) > 1:
        raise ValueError(f"STORE: got stores of {sorted(models)}, expected those of one model")
    return models.pop()


def _settings(args: argparse.Namespace) -> EvalSettings:
    """Batches and decoded tokens as far as the windows go."""
    decoded = min(DEFAULTS.decode_tokens, args.window_tokens)
    fields = dataclasses.replace(
        DEFAULTS,
        windows=args.windows,
        window_tokens=args.window_tokens,
        decode_tokens=decoded,
        warm_up=min(DEFAULTS.warm_up, decoded // 2),
        batch=tuple(size for size in DEFAULTS.batch if size <= args.windows) or (1,),
        seed=args.seed,
    )
    return fields
