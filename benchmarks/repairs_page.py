"""The page of `benchmarks/repairs.py`: points of many matrices as tables. Measures nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from benchmarks.record import provenance


@dataclass(frozen=True)
class Point:
    """One matrix stored in one way: bits per weight and relative held-out error energy."""

    blocks: int
    code_bits: float
    bits: float
    alone: float
    restored: float


Points = Mapping[tuple[str, str], Sequence[Point]]


def mean(values: Sequence[float]) -> float:
    """Geometric: an error halved in one matrix counts as much as in any other."""
    return math.exp(fmean(math.log(value) for value in values))


def page(points: Points, krylov: Sequence[str]) -> str:
    num = max(len(each) for each in points.values())
    lines = [
        "# What repairs a quantised matrix",
        "",
        provenance(),
        "",
        f"{num} FFN matrices of SmolLM2-135M-Instruct (576 x 1536; the weights come from a Q4_1 "
        "file, so figures at 4 bits flatter). D is the error energy of the outputs over their "
        "energy, tr(E R E^T) / tr(W R W^T), with R of held-out text; geometric mean over the "
        "matrices. What quantises and repairs knows the moment of other windows of the same six "
        "texts (about 9 000 tokens), shrunk to its diagonal. b/w is bits per weight, all scales "
        "included. halvings/bit: how often the repair halves D per bit per weight that it takes; "
        "a perfect extra bit would be 2. Weight error is not loss: verdicts on loss stand "
        "elsewhere.",
        "",
    ]
    lines += ["## Codes alone", "", "| codes | b/w | D |", "|---|---|---|"]
    for label, each in section(points, "codes"):
        lines.append(f"| {label} | {fmean(p.bits for p in each):.3f} | {d(each, 'alone')} |")
    for name, title in (
        ("rank", "Codes and rank blocks (factors of 2 bits, symmetric, unless told)"),
        ("plane", "Codes, planes and mixes, one after the other"),
        ("milo", "MiLo's alternation"),
        ("factors", "Form of the factors: at most 0.5 b/w of rank on feedback 2 symmetric"),
    ):
        lines += [
            "",
            f"## {title}",
            "",
            "| codes | blocks | b/w | D alone | D repaired | halvings/bit |",
            "|---|---|---|---|---|---|",
        ]
        for label, each in section(points, name):
            lines.append(row(label, each))
    lines += ["", *joint(points)]
    lines += ["", *half(points)]
    lines += [
        "",
        "## Large matrices: captured energy of the truncated SVD, one thread",
        "",
        "| matrix | kind | rank | captured, of exact | CPU-s | exact (Gram + eigh), CPU-s |",
        "|---|---|---|---|---|---|",
        *krylov,
        "",
    ]
    return "\n".join(lines)


def section(points: Points, name: str) -> list[tuple[str, Sequence[Point]]]:
    return [(key[1].partition("#")[0], each) for key, each in points.items() if key[0] == name]


def d(points: Sequence[Point], field: str) -> str:
    return f"{mean([getattr(point, field) for point in points]):.4f}"


def row(label: str, points: Sequence[Point]) -> str:
    alone, restored = (mean([getattr(p, f) for p in points]) for f in ("alone", "restored"))
    more = fmean(p.bits - p.code_bits for p in points)
    blocks = fmean(p.blocks for p in points)
    return (
        f"| {label} | {blocks:.3g} | {fmean(p.bits for p in points):.3f} | {alone:.4f} | "
        f"{restored:.4f} | {math.log2(alone / restored) / more:.2f} |"
    )


def joint(points: Points) -> list[str]:
    """Mixed errors of the plain order and of the joint choice, by share of restored uses."""
    lines = [
        "## Codes and repair made for each other (feedback)",
        "",
        "p: share of uses with the repair. mixed = (1-p) D alone + p D repaired, held out. plain: "
        "codes first, then the repair; joint: one alternation (two more at p 0.8, in brackets).",
        "",
        "| codes | repair | p | b/w | plain: alone, repaired | joint: alone, repaired | "
        "plain mixed | joint mixed |",
        "|---|---|---|---|---|---|---|---|",
    ]
    found = dict(section(points, "joint"))
    for label, each in found.items():
        grid, kinds, share, rounds = label.split("|")
        if rounds != "1":
            continue
        plain, more = found[f"{grid}|{kinds}|0.0|0"], found.get(f"{grid}|{kinds}|{share}|3")
        again = f" ({mixed(more, share):.4f})" if more else ""
        lines.append(
            f"| {grid} | {named(kinds)} | {share} | {fmean(p.bits for p in each):.3f} | "
            f"{d(plain, 'alone')}, {d(plain, 'restored')} | "
            f"{d(each, 'alone')}, {d(each, 'restored')} | "
            f"{mixed(plain, share):.4f} | {mixed(each, share):.4f}{again} |"
        )
    return lines


def mixed(points: Sequence[Point], share: str) -> float:
    p = float(share)
    return mean([(1 - p) * point.alone + p * point.restored for point in points])


def named(kinds: str) -> str:
    """ "plane+rank+rank" as "plane, rank 32"."""
    planes, ranks = kinds.count("plane"), kinds.count("rank")
    names = [["plane"], ["2 planes"]][planes - 1] if planes else []
    return ", ".join(names + ([f"rank {16 * ranks}"] if ranks else []))


def half(points: Points) -> list[str]:
    """Conditional repair against wider codes for everyone, at equal mean bytes."""
    lines = [
        "## Repair in half of the uses, against wider codes in all",
        "",
        "The repair is moved in half of the uses; these carry the share w of the squared router "
        "weights, so of the loss. mixed = (1-w) D alone + w D repaired, with codes and repair made "
        "for p = w where that is better (w 0.65: for 0.5). wider codes: feedback codes alone, some "
        "matrices at more bits than others so that the mean is the same b/w (straight lines "
        "between the points of the first table, lower hull).",
        "",
        "| codes | repair | mean b/w | wider codes D | w 0.5 | w 0.65 | w 0.8 |",
        "|---|---|---|---|---|---|---|",
    ]
    found = dict(section(points, "joint"))
    codes = [
        (fmean(p.bits for p in each), mean([p.alone for p in each]))
        for label, each in section(points, "codes")
        if label.startswith("feedback")
    ]
    for label, plain in found.items():
        form, kinds, _, rounds = label.split("|")
        if rounds != "0":
            continue
        bits = fmean((p.code_bits + p.bits) / 2 for p in plain)
        cells = []
        for weight, share in (("0.5", "0.5"), ("0.65", "0.5"), ("0.8", "0.8")):
            made = found[f"{form}|{kinds}|{share}|1"]
            cells.append(f"{min(mixed(plain, weight), mixed(made, weight)):.4f}")
        lines.append(
            f"| {form} | {named(kinds)} | {bits:.3f} | {at_bits(codes, bits):.4f} | "
            f"{' | '.join(cells)} |"
        )
    return lines


def at_bits(codes: Sequence[tuple[float, float]], bits: float) -> float:
    """The least D of two kinds of codes in the proportion that has these bits."""
    below = [point for point in codes if point[0] <= bits]
    above = [point for point in codes if point[0] > bits]
    assert below, f"no codes are as small as {bits} bits per weight"
    least = min(error for _, error in below)
    for low, low_error in below:
        for high, high_error in above:
            part = (bits - low) / (high - low)
            least = min(least, (1 - part) * low_error + part * high_error)
    return least
