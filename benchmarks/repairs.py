"""What repairs a quantised matrix, at equal bytes: rank, planes, mixes, MiLo, joint choices.

FFN matrices of SmolLM2-135M (layers 1, 10, 20, 28). The repairs see second moments of calibration
windows; errors are those on held-out windows of the same texts. `python -m benchmarks.repairs`
collects moments (cached in --cache), measures and writes benchmarks/results/repairs.md.

Legend: N rows, K cols, T tokens.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from benchmarks import repairs_page
from benchmarks.record import RESULTS
from expert_store.forms import BlockKind
from expert_store.matrix.feedback import quantize_feedback
from expert_store.matrix.grid import quantize_grid
from expert_store.matrix.hqq import quantize_hqq
from expert_store.matrix.joint import quantize_jointly, quantize_milo
from expert_store.matrix.low_rank import FactorForm, RankFinder, weighted_svd
from expert_store.matrix.moments import Moment, MomentSum
from expert_store.matrix.paper import svd_repairs
from expert_store.matrix.planes import plane_repair
from expert_store.matrix.repair import Repair, best_within, repairs_of_kinds
from expert_store.matrix.weighting import Weighting
from kernels.reference import dequantize
from kernels.types import Grid, QuantizedMatrix
from models.smol.base import load_base
from models.smol.fetch import fetch_base

ROOT = Path(__file__).resolve().parents[1]
TEXTS = ROOT.parent / "shared" / "mini" / "eval"
LAYERS = (1, 10, 20, 28)
WINDOW, STRIDE, WINDOWS = 256, 1000, 12  # tokens; even windows calibrate, odd ones are held out
FIRST = 4  # tokens of a window left out: the first one's activations are a world of their own
RANKS = (1, 2, 4, 10)  # blocks of 16
SHARES = (0.3, 0.5, 0.8)


@dataclass(frozen=True)
class Subject:
    """One matrix, what the repairs know of its inputs, and what the judge knows."""

    name: str
    weight_NK: torch.Tensor
    known: Weighting
    held_out: Moment


@dataclass(frozen=True)
class Made:
    """Codes and blocks to judge, alone and after some numbers of blocks."""

    section: str
    label: str
    codes: QuantizedMatrix
    blocks: Sequence[Repair] = ()
    cuts: Sequence[int] | None = None  # None: all blocks


def subjects(gguf: Path, cache: Path) -> list[Subject]:
    """The twelve matrices; moments are collected once and kept in `cache`."""
    base = load_base(gguf)
    file = cache / "repairs-moments.pt"
    if not file.exists():
        cache.mkdir(parents=True, exist_ok=True)
        torch.save(collect(base), file)
    moments = torch.load(file, weights_only=True)
    found = []
    for layer in LAYERS:
        for projection in ("gate", "up", "down"):
            part = f"{layer}.{'mid' if projection == 'down' else 'in'}"
            known = Moment(moments[f"known.{part}"]).shrunk_to_diagonal(moments["count"])
            found.append(
                Subject(
                    f"{layer}.{projection}",
                    base.mlp(layer, projection),
                    Weighting.of(known),
                    Moment(moments[f"held_out.{part}"]),
                )
            )
    return found


def collect(base) -> dict[str, torch.Tensor | int]:
    """Second moments of the FFNs' inputs, by layer, side and set of windows."""
    model = AutoModelForCausalLM.from_config(base.config).eval()
    model.load_state_dict(base.weights, strict=False)
    model.tie_weights()
    sums: dict[str, MomentSum] = {}
    current = [""]

    def watch(module, part: str) -> None:
        def add(_, inputs) -> None:
            x_TK = inputs[0].flatten(0, -2)[FIRST:]
            key = f"{current[0]}.{part}"
            sums.setdefault(key, MomentSum(x_TK.shape[1])).add(x_TK)

        module.register_forward_pre_hook(add)

    for layer in LAYERS:
        watch(model.model.layers[layer].mlp.gate_proj, f"{layer}.in")
        watch(model.model.layers[layer].mlp.down_proj, f"{layer}.mid")
    with torch.no_grad():
        for path in sorted(TEXTS.glob("*.txt")):
            ids = base.tokenizer(path.read_text())["input_ids"]
            for i in range(WINDOWS):
                current[0] = "held_out" if i % 2 else "known"
                model(torch.tensor([ids[i * STRIDE : i * STRIDE + WINDOW]]))
            print(path.name, flush=True)
    moments = {key: each.moment().values for key, each in sums.items()}
    return moments | {"count": sums[f"known.{LAYERS[0]}.in"].count}


def variants(subject: Subject) -> Iterator[Made]:
    weight_NK, known = subject.weight_NK, subject.known
    moment = known.moment
    assert moment is not None
    grids: tuple[Grid, ...] = ("symmetric", "affine")
    bases: dict[str, QuantizedMatrix] = {}
    for bits in (2, 3, 4):
        bases[f"hqq {bits} affine"] = quantize_hqq(weight_NK, bits)
        for grid in grids:
            bases[f"grid, no moment, {bits} {grid}"] = quantize_grid(weight_NK, bits, grid=grid)
            bases[f"grid {bits} {grid}"] = quantize_grid(weight_NK, bits, grid=grid, moment=moment)
            bases[f"feedback {bits} {grid}"] = quantize_feedback(
                weight_NK, bits, grid=grid, moment=moment
            )
    for label, codes in bases.items():
        yield Made("codes", label, codes)
    yield from rank_forms(subject, bases["feedback 2 symmetric"])
    for label in ("feedback 2 symmetric", "grid 2 symmetric", "hqq 2 affine"):
        codes = bases[label]
        residual_NK = weight_NK - dequantize(codes)
        blocks = ranks(residual_NK, known, FactorForm())
        yield Made("rank", label, codes, blocks, RANKS)
        blocks = ranks(residual_NK, Weighting.of(), FactorForm())
        yield Made("rank", f"{label}, factors know no moment", codes, blocks, RANKS)
    codes = bases["hqq 2 affine"]
    blocks = svd_repairs(weight_NK - dequantize(codes), 16 * RANKS[-1], 3)
    yield Made("rank", "the paper's: hqq 2 affine, SVD, factors by hqq 3", codes, blocks, RANKS)
    codes = bases["feedback 3 symmetric"]
    blocks = ranks(weight_NK - dequantize(codes), known, FactorForm())
    yield Made("rank", "feedback 3 symmetric", codes, blocks, RANKS)
    for label in ("feedback 2 symmetric", "grid 2 symmetric", "feedback 3 symmetric"):
        codes = bases[label]
        residual_NK = weight_NK - dequantize(codes)
        signs = plane_repair(residual_NK, known, feedback=False)
        yield Made("plane", f"{label} + plane of signs", codes, [signs] if signs else [])
        made = repairs_of_kinds(residual_NK, known, ["plane", "plane"])
        yield Made("plane", f"{label} + planes", codes, made, (1, 2))
        if label != "feedback 3 symmetric":
            made = repairs_of_kinds(residual_NK, known, ["plane"] + ["rank"] * 10)
            yield Made("plane", f"{label} + plane, then rank", codes, made, (3, 11))
            made = repairs_of_kinds(residual_NK, known, ["rank", "rank", "plane"])
            yield Made("plane", f"{label} + rank, then plane", codes, made)
    yield from milos(subject)
    yield from joints(subject)


def milos(subject: Subject) -> Iterator[Made]:
    def by_hqq(target_NK: torch.Tensor) -> QuantizedMatrix:
        return quantize_hqq(target_NK, 2)

    def by_feedback(target_NK: torch.Tensor) -> QuantizedMatrix:
        assert subject.known.moment is not None
        return quantize_feedback(target_NK, 2, grid="symmetric", moment=subject.known.moment)

    for num in (2, 4):
        for label, quantize, weighting, form in (
            ("MiLo: hqq 2 affine, 3-bit factors", by_hqq, Weighting.of(), FactorForm(3, "affine")),
            ("likewise by feedback 2 symmetric", by_feedback, subject.known, FactorForm()),
        ):
            for rounds in (0, 8):
                milo = quantize_milo(
                    subject.weight_NK,
                    quantize,
                    num,
                    weighting=weighting,
                    factors=form,
                    rounds=rounds,
                )
                name = f"{label}, {'alternating' if rounds else 'once'}"
                yield Made("milo", name, milo.codes, milo.blocks)


def ranks(residual_NK: torch.Tensor, weighting: Weighting, form: FactorForm) -> list[Repair]:
    return repairs_of_kinds(residual_NK, weighting, ["rank"] * RANKS[-1], factors=form)


def rank_forms(subject: Subject, codes: QuantizedMatrix) -> Iterator[Made]:
    """Rank by the form of its factors, at about the same bytes: 0.5 bits per weight."""
    residual_NK = subject.weight_NK - dequantize(codes)
    num_bytes = round(0.5 * residual_NK.numel() / 8)
    forms = [FactorForm(bits, "symmetric") for bits in (1, 2, 3, 4)]
    forms += [FactorForm(bits, "affine") for bits in (2, 3, 4)]
    forms += [FactorForm(2, "symmetric", sweeps=1), FactorForm(2, "symmetric", sweeps=6)]
    for form in forms:
        label = f"{form.bits} bits {form.grid}, {form.sweeps} sweeps"
        blocks = best_within(residual_NK, subject.known, num_bytes, max_planes=0, factors=form)
        yield Made("factors", label, codes, blocks)


def joints(subject: Subject) -> Iterator[Made]:
    """Labels are codes|kinds|share|rounds; the plain order, rounds 0, is one for all shares."""
    kinds_of: dict[tuple[int, Grid], list[list[BlockKind]]] = {
        (2, "symmetric"): [
            ["rank"] * 2,
            ["rank"] * 10,
            ["plane"],
            ["plane", "rank", "rank"],
            ["plane", "plane"],
        ],
        (2, "affine"): [["plane"]],
        (3, "symmetric"): [["rank"] * 4, ["plane"]],
    }
    for (bits, grid), all_kinds in kinds_of.items():
        for kinds in all_kinds:
            for share, rounds in [(0.0, 0), *((p, 1) for p in SHARES), (0.8, 3)]:
                if rounds > 1 and (bits == 3 or "rank" not in kinds):
                    continue
                joint = quantize_jointly(
                    subject.weight_NK,
                    bits,
                    kinds,
                    grid=grid,
                    weighting=subject.known,
                    share=share,
                    rounds=rounds,
                )
                label = f"{bits} {grid}|{'+'.join(kinds)}|{share}|{rounds}"
                yield Made("joint", label, joint.codes, joint.blocks)


def judge(subject: Subject, made: Made) -> list[tuple[int, repairs_page.Point]]:
    """Bits per weight and relative held-out error, of the codes and after each cut."""
    weighting = Weighting.of(subject.held_out)
    weight_NK = subject.weight_NK
    energy = weighting.error(weight_NK)
    left_NK = weight_NK - dequantize(made.codes)
    restored = alone = weighting.error(left_NK) / energy
    bits = code_bits = 8 * made.codes.data.numel() / weight_NK.numel()
    cuts = (len(made.blocks),) if made.cuts is None else made.cuts
    points = []
    for i in range(len(made.blocks) + 1):
        if i:
            left_NK = left_NK - made.blocks[i - 1].dense()
            bits += 8 * made.blocks[i - 1].num_bytes / weight_NK.numel()
            restored = weighting.error(left_NK) / energy
        if i in cuts:
            # Blocks that would not repair anything are left out, so their number may differ.
            label = i if made.cuts is not None else 0
            points.append((label, repairs_page.Point(i, code_bits, bits, alone, restored)))
    return points


def krylov_rows() -> list[str]:
    """Captured energy and time of the large-matrix path, against exact eigenvalues."""
    rows = []
    for rows_N, cols in ((1408, 2048), (4096, 14336)):
        generator = torch.Generator().manual_seed(1)
        noise = torch.randn(rows_N, cols, generator=generator)
        scale = 0.3 + torch.rand(cols, generator=generator)
        falling = torch.arange(1, 65)[:, None] ** -0.5
        low = torch.randn(rows_N, 64, generator=generator) @ (
            falling * torch.randn(64, cols, generator=generator)
        )
        for name, matrix in (("noise", noise), ("noise + structure", noise * scale + 0.2 * low)):
            start = time.process_time()
            values = torch.linalg.eigvalsh(matrix @ matrix.T).flip(0)
            exact_s = time.process_time() - start
            for rank in (16, 32, 128):
                start = time.process_time()
                left, right = weighted_svd(matrix, rank, Weighting.of())
                taken_s = time.process_time() - start
                captured = float((left @ right).square().sum() / values[:rank].sum())
                rows.append(
                    f"| {rows_N} x {cols} | {name} | {rank} | {captured:.4f} | {taken_s:.2f} | "
                    f"{exact_s:.1f} |"
                )
            start = time.process_time()
            finder, left_NK = RankFinder(rows_N, cols, Weighting.of(), FactorForm()), matrix
            for _ in range(2):
                block = finder.next(left_NK)
                assert block is not None
                left_NK = left_NK - block.dense()
            rows.append(
                f"| {rows_N} x {cols} | {name} | 2 blocks of 16, quantised | | "
                f"{time.process_time() - start:.2f} | |"
            )
            print(rows[-1], flush=True)
    return rows


def measured(subject: Subject, cache: Path) -> list[tuple[tuple[str, str], repairs_page.Point]]:
    """All points of a matrix; kept in `cache`, so that a run that was stopped goes on."""
    file = cache / f"repairs-{subject.name}.json"
    if not file.exists():
        start = time.process_time()
        rows = []
        for made in variants(subject):
            for cut, point in judge(subject, made):
                rows.append([made.section, f"{made.label}#{cut}", dataclasses.asdict(point)])
        file.write_text(json.dumps(rows))
        print(f"{subject.name}: {time.process_time() - start:.0f} CPU-s", flush=True)
    rows = json.loads(file.read_text())
    return [((section, label), repairs_page.Point(**point)) for section, label, point in rows]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.repairs", description=__doc__)
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "moetier")
    parser.add_argument("--gguf", type=Path, help="default: fetched into --cache")
    parser.add_argument("--again", action="store_true", help="forget what --cache holds")
    parser.add_argument("--matrices", nargs="*", help="such as 1.gate; default: all twelve")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    gguf = arguments.gguf or fetch_base(arguments.cache)
    if arguments.again:
        for file in arguments.cache.glob("repairs-*"):
            file.unlink()
    points: dict[tuple[str, str], list[repairs_page.Point]] = defaultdict(list)
    for subject in subjects(gguf, arguments.cache):
        if arguments.matrices and subject.name not in arguments.matrices:
            continue
        for key, point in measured(subject, arguments.cache):
            points[key].append(point)
    assert all(math.isfinite(p.restored) for each in points.values() for p in each)
    page = repairs_page.page(points, krylov_rows())
    (RESULTS / "repairs.md").write_text(page)
    print(f"wrote {RESULTS / 'repairs.md'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
