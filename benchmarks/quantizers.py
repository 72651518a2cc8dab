"""The quantisers of expert_store/matrix against each other: error, weighted error, loss, speed.

`python -m benchmarks.quantizers [PART ...]` measures parts (all by default) and replaces their
sections in the report. Needs what benchmarks/smollm2.py needs.

Legend: N rows, K cols.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean

import torch
from hqq.core.quantize import Quantizer

from benchmarks import quantizer_choices
from benchmarks.record import RESULTS, provenance, table
from benchmarks.smollm2 import DOMAINS, FIT_TOKENS, PROJECTIONS, Place, loaded, moments
from expert_store.checkpoint import Checkpoint
from expert_store.matrix.feedback import quantize_feedback
from expert_store.matrix.grid import quantize_grid
from expert_store.matrix.hqq import quantize_hqq
from expert_store.matrix.loss import relative_error
from expert_store.matrix.moments import FULL_INPUTS, Moment, MomentSum
from expert_store.matrix.rtn import quantize_rtn
from kernels.reference import dequantize
from kernels.types import GROUP_SIZE, Grid, QuantizedMatrix
from models import MIXTRAL_MINI

OUT = RESULTS / "quantizers.md"
LAYERS = (1, 10, 20, 28)
GRIDS: tuple[Grid, ...] = ("affine", "symmetric")
BITS = (2, 3, 4)
LOSS_BITS = (3, 2)


@dataclass(frozen=True, slots=True)
class Method:
    """A quantiser: weight, bits and a moment (used or not) in, codes out."""

    name: str
    grid: Grid
    run: Callable[[torch.Tensor, int, Moment], QuantizedMatrix]


def methods() -> list[Method]:
    """All quantisers, from the control to the best. Each is called again where it is used."""
    found = [Method("hqq", "affine", lambda w, bits, m: quantize_hqq(w, bits))]
    for grid in GRIDS:

        def rtn(w: torch.Tensor, bits: int, m: Moment, grid: Grid = grid) -> QuantizedMatrix:
            return quantize_rtn(w, bits, grid=grid)

        def plain(w: torch.Tensor, bits: int, m: Moment, grid: Grid = grid) -> QuantizedMatrix:
            return quantize_grid(w, bits, grid=grid)

        def aware(w: torch.Tensor, bits: int, m: Moment, grid: Grid = grid) -> QuantizedMatrix:
            return quantize_grid(w, bits, grid=grid, moment=m)

        def groups(w: torch.Tensor, bits: int, m: Moment, grid: Grid = grid) -> QuantizedMatrix:
            return quantize_feedback(w, bits, grid=grid, moment=m.blocks_only())

        def full(w: torch.Tensor, bits: int, m: Moment, grid: Grid = grid) -> QuantizedMatrix:
            return quantize_feedback(w, bits, grid=grid, moment=m)

        found += [
            Method("round to nearest", grid, rtn),
            Method("grid", grid, plain),
            Method("grid, moment's diagonal", grid, aware),
            Method("feedback, blocks of 64", grid, groups),
            Method("feedback, full moment", grid, full),
        ]
    return found


UNCALIBRATED = ("hqq", "round to nearest", "grid")


def weights_of_loaded() -> dict[str, torch.Tensor]:
    return {
        f"{layer} {name}": loaded().weight(layer, name) for layer in LAYERS for name in PROJECTIONS
    }


def errors() -> str:
    """Relative squared error of weights, without calibration, on four families of matrices."""
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(5, 576, 1536, generator=generator)
    checkpoint = Checkpoint(MIXTRAL_MINI)
    experts = [checkpoint.expert(checkpoint.keys[i]) for i in (0, len(checkpoint.keys) // 2, -1)]
    families = {
        "Gaussian": [normal[0]],
        "Student t, 4 d.f.": [normal[0] / normal[1:].square().mean(dim=0).sqrt()],
        "SmolLM2 (12)": list(weights_of_loaded().values()),
        "mixtral-mini (9)": [getattr(e, name).float() for e in experts for name in PROJECTIONS],
    }
    rows = []
    hqq: dict[tuple[int, str], list[float]] = {}
    for bits in BITS:
        for method in methods():
            if method.name not in UNCALIBRATED:
                continue
            cells = []
            for name, weights in families.items():
                found = [_relative(method, w, bits, Moment.identity(w.shape[1])) for w in weights]
                if method.name == "hqq":
                    hqq[bits, name] = found
                elif (method.name, method.grid) == ("grid", "affine"):
                    pairs = zip(found, hqq[bits, name], strict=True)
                    assert all(mine <= theirs for mine, theirs in pairs), (
                        f"grid is worse than hqq on {name} at {bits} bits: no table is written"
                    )
                cells.append(f"{fmean(found):.4f}")
            rows.append(
                [str(bits), method.name, method.grid, _bits_per_weight(method, bits), *cells]
            )
            print(rows[-1], flush=True)
    return (
        "Mean over matrices of the squared error over the weight's energy. Gate (passed): on every "
        "matrix the affine grid is no worse than hqq.\n\n"
        + table(["bits", "method", "levels", "bits/weight", *families], rows)
    )


def weighted() -> str:
    """Weighted error on the tokens that the moment was taken from, and on others."""
    fit, held = moments("fit", LAYERS), moments("held", LAYERS)
    rows = []
    for bits in BITS:
        for method in methods():
            plain, seen, unseen = [], {"in": [], "mid": []}, {"in": [], "mid": []}
            for layer in LAYERS:
                for name in PROJECTIONS:
                    place = Place.of(layer, name)
                    weight = loaded().weight(layer, name)
                    found = dequantize(method.run(weight, bits, fit[place]))
                    plain.append(relative_error(weight, found))
                    seen[place.name].append(relative_error(weight, found, fit[place]))
                    unseen[place.name].append(relative_error(weight, found, held[place]))
            size = float(_bits_per_weight(method, bits))
            both = fmean(_geometric(unseen[name]) for name in ("in", "in", "mid"))
            cells = [f"{fmean(plain):.4f}", *(f"{_geometric(seen[n]):.5f}" for n in seen)]
            cells += [f"{_geometric(unseen[n]):.5f}" for n in unseen] + [f"{both * 4**size:.3f}"]
            rows.append([str(bits), method.name, method.grid, f"{size:.3f}", *cells])
            print(rows[-1], flush=True)
    head = ["bits", "method", "levels", "bits/weight", "D plain"]
    head += [
        "D seen, gate+up",
        "D seen, down",
        "D unseen, gate+up",
        "D unseen, down",
        "unseen x 4^b",
    ]
    return (
        f"SmolLM2, layers {', '.join(map(str, LAYERS))}, gate, up, down. Moments from "
        f"{FIT_TOKENS} tokens of six domains, shrunk to their diagonal, judged by themselves "
        f"(seen) and by {FIT_TOKENS} other tokens of these domains (unseen). D plain: mean squared "
        "error over energy. D seen, unseen: the same of outputs, geometric mean over matrices, "
        "since layers differ by a hundredfold. Last column: unseen error of gate, up and down "
        "times 4^(bits per weight): the price of an error at equal bytes, lower is better. "
        "SmolLM2's weights come from 4-bit affine codes, which flatters affine levels at 4 "
        "bits.\n\n" + table(head, rows)
    )


def speed() -> str:
    """Process CPU seconds of one matrix, one thread."""
    shapes = {"Mixtral-8x7B gate [14336, 4096]": (14336, 4096), "down [4096, 14336]": (4096, 14336)}
    shapes["DeepSeek-V2-Lite gate [1408, 2048]"] = (1408, 2048)
    rows = []
    for name, (n, k) in shapes.items():
        weight = torch.randn(n, k, generator=torch.Generator().manual_seed(0)) * 0.02
        total = MomentSum(k)
        total.add(torch.randn(2 * GROUP_SIZE, k, generator=torch.Generator().manual_seed(1)))
        moment = total.moment().shrunk_to_diagonal(total.count)
        library = partial(
            Quantizer.quantize, weight, nbits=2, group_size=GROUP_SIZE, axis=1, bitpack=False
        )
        base = _seconds(partial(library, device="cpu"))
        rows.append([name, "hqq, the library's own call", "affine", f"{base:.2f}", "1.0"])
        for method in methods():
            if method.name.endswith("full moment") and k > FULL_INPUTS:
                continue
            if method.name == "round to nearest" and method.grid == "symmetric":
                continue
            seconds = _seconds(partial(method.run, weight, 2, moment))
            label = "hqq in our row chunks" if method.name == "hqq" else method.name
            rows.append([name, label, method.grid, f"{seconds:.2f}", f"{base / seconds:.1f}"])
            print(rows[-1], flush=True)
        print(rows[-1], flush=True)
    return (
        "2 bits, Gaussian weights, packing included (the library's call packs nothing), one "
        "thread, one run each, process CPU time. Other processes shared the two cores, which "
        "slows the caches for all rows alike.\n\n"
        + table(["matrix", "method", "levels", "CPU s", "times hqq's speed"], rows)
    )


def loss() -> str:
    """Nats per token of the dense model with all 90 FFN matrices replaced."""
    fit = moments("fit", tuple(range(30)))
    base = loaded().losses(None)
    rows = [["16", "original", "", "", f"{fmean(base):.4f}", *(f"{each:.3f}" for each in base)]]
    for bits in LOSS_BITS:
        for method in methods():

            def replace(
                layer: int, name: str, w: torch.Tensor, bits: int = bits, method: Method = method
            ) -> torch.Tensor:
                return dequantize(method.run(w, bits, fit[Place.of(layer, name)]))

            more = [a - b for a, b in zip(loaded().losses(replace), base, strict=True)]
            error = math.sqrt(
                sum((x - fmean(more)) ** 2 for x in more) / (len(more) - 1) / len(more)
            )
            size = _bits_per_weight(method, bits)
            cells = [f"+{fmean(more):.3f} ± {error:.3f}", *(f"+{each:.3f}" for each in more)]
            rows.append([str(bits), method.name, method.grid, size, *cells])
            print(rows[-1], flush=True)
    return (
        "SmolLM2-135M-Instruct, dense, 512 unseen tokens of each domain; ± is the standard error "
        "over domains. Moments as above, of every layer, from the original model.\n\n"
        + table(["bits", "method", "levels", "bits/weight", "nats/token", *DOMAINS], rows)
    )


def _relative(method: Method, weight: torch.Tensor, bits: int, moment: Moment) -> float:
    return relative_error(weight, dequantize(method.run(weight, bits, moment)))


def _bits_per_weight(method: Method, bits: int) -> str:
    return f"{bits + (32 if method.grid == 'affine' else 8) / GROUP_SIZE:.3f}"


def _geometric(values: Iterable[float]) -> float:
    return math.exp(fmean(math.log(each) for each in values))


def _seconds(run: Callable[[], object]) -> float:
    start_s = time.process_time()
    run()
    return time.process_time() - start_s


PARTS = {
    "errors": ("Without calibration", errors),
    "weighted": ("With calibration", weighted),
    "choices": ("What pays", quantizer_choices.choices),
    "shrinkage": ("Moments of few tokens", quantizer_choices.shrinkage),
    "loss": ("Loss", loss),
    "speed": ("Speed", speed),
}
_TITLE = "# Quantisers, matrix by matrix"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", nargs="*", choices=[*PARTS, []], help="default: all")
    parser.add_argument("--out", type=Path, default=OUT)
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    for part in given.part or PARTS:
        heading, measure = PARTS[part]
        body = f"{measure()}\n\nBy `python -m benchmarks.quantizers {part}`: {provenance()}"
        given.out.write_text(with_section(_read(given.out), heading, body))
        print(f"wrote {part} to {given.out}", flush=True)
    return 0


def _read(path: Path) -> str:
    return path.read_text() if path.exists() else _TITLE + "\n"


def with_section(page: str, heading: str, body: str) -> str:
    """The page with one section replaced or added, sections in the order of `PARTS`."""
    title, *sections = page.rstrip("\n").split("\n## ")
    bodies = dict(section.split("\n\n", 1) for section in sections)
    bodies[heading] = body
    order = [name for name, _ in PARTS.values() if name in bodies]
    return "\n\n## ".join([title.strip(), *(f"{n}\n\n{bodies[n].strip()}" for n in order)]) + "\n"


if __name__ == "__main__":
    raise SystemExit(main())
