"""What error feedback gains by each of its choices, and how far to trust a moment of few tokens.

Parts of benchmarks/quantizers.py.

Legend: T tokens, K inputs of a matrix, G groups of 64 inputs, g the inputs of one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from unittest.mock import patch

import torch

from benchmarks.record import table
from benchmarks.smollm2 import DOMAINS, Place, loaded, moments
from expert_store.matrix import feedback, ordering
from expert_store.matrix.feedback import quantize_feedback
from expert_store.matrix.loss import relative_error
from expert_store.matrix.moments import Moment, MomentSum
from expert_store.matrix.ordering import InputOrder
from kernels.reference import dequantize

MATRICES = ((10, "gate"), (10, "down"), (28, "down"))


def choices() -> str:
    """One choice of `quantize_feedback` changed at a time."""
    layers = tuple(sorted({layer for layer, _ in MATRICES}))
    fit, held = moments("fit", layers), moments("held", layers)
    raw = moments("fit", layers, shrink=False)
    rows = []
    for label, changed, source in (
        ("as it is", _nothing(), fit),
        ("inputs in their natural order", patch.object(feedback, "InputOrder", _Natural), fit),
        ("no sweep", patch.object(feedback, "SWEEPS", 0), fit),
        ("1 sweep", patch.object(feedback, "SWEEPS", 1), fit),
        ("4 sweeps", patch.object(feedback, "SWEEPS", 4), fit),
        ("damping 0.001", patch.object(ordering, "DAMPING", 0.001), fit),
        ("damping 0.1", patch.object(ordering, "DAMPING", 0.1), fit),
        ("moment not shrunk", _nothing(), raw),
        ("moment not shrunk, damping 0.1", patch.object(ordering, "DAMPING", 0.1), raw),
    ):
        with changed:
            cells = []
            for layer, projection in MATRICES:
                weight, place = loaded().weight(layer, projection), Place.of(layer, projection)
                matrix = quantize_feedback(weight, 2, grid="symmetric", moment=source[place])
                found = dequantize(matrix)
                seen, unseen = (relative_error(weight, found, m[place]) for m in (raw, held))
                cells.append(f"{seen:.5f} / {unseen:.5f}")
        rows.append([label, *cells])
        print(rows[-1], flush=True)
    return (
        "Weighted error on seen / unseen tokens, 2 bits, symmetric, full moment. The moment is "
        "shrunk to its diagonal as K tokens, damping is 0.01 of the mean energy, inputs go loud "
        "ones first, 2 sweeps follow.\n\n"
        + table(["", *(f"{layer} {name}" for layer, name in MATRICES)], rows)
    )


@contextmanager
def _nothing() -> Iterator[None]:
    yield


class _Natural:
    """`InputOrder` without its sorting."""

    @staticmethod
    def of(moment: Moment) -> InputOrder:
        cols = moment.cols
        values = moment.values.clone()
        values.diagonal().add_(ordering.DAMPING * float(moment.diagonal().mean()))
        root = torch.linalg.cholesky(values.double().flip(0, 1)).flip(0, 1)
        unit = torch.eye(cols, dtype=torch.float64)
        shares = torch.linalg.solve_triangular(root, unit, upper=True) * root.diagonal()[:, None]
        weight_Gg = root.diagonal().square().view(-1, 64).float()
        groups_G, cols_K = torch.arange(cols // 64), torch.arange(cols)
        return InputOrder(groups_G, cols_K, values, shares.float(), weight_Gg, is_diagonal=False)


def shrinkage() -> str:
    """How to trust a moment of few tokens: one domain plays the expert, all domains the pool."""
    rules: dict[str, Callable[[Moment, Moment, int], Moment]] = {
        "own alone": lambda own, pool, n: own,
        "own, to its diagonal": lambda own, pool, n: own.shrunk_to_diagonal(n),
        "pool alone": lambda own, pool, n: pool,
        "Ledoit-Wolf": _ledoit_wolf,
        **{
            f"pool as {share:g} K tokens": partial(_as_tokens, share)
            for share in (0.25, 0.5, 1.0, 2.0, 4.0)
        },
    }
    rows = []
    for layer, projection in ((10, "gate"), (10, "down"), (20, "down")):
        place, weight = Place.of(layer, projection), loaded().weight(layer, projection)
        seen = {domain: loaded().inputs("fit", domain, place) for domain in DOMAINS}
        pooled = _moment(torch.cat(list(seen.values())))
        pooled = pooled.shrunk_to_diagonal(sum(map(len, seen.values())))
        for domain in ("pydoc", "literature"):
            unseen = _moment(loaded().inputs("held", domain, place))
            shuffled = torch.randperm(len(seen[domain]), generator=torch.Generator().manual_seed(0))
            for tokens in (64, 256, len(shuffled)):
                own = _moment(seen[domain][shuffled[:tokens]])
                cells = []
                for rule in rules.values():
                    moment = rule(own, pooled, tokens)
                    matrix = quantize_feedback(weight, 2, grid="symmetric", moment=moment)
                    cells.append(f"{relative_error(weight, dequantize(matrix), unseen):.4f}")
                rows.append([f"{layer} {projection}", domain, str(tokens), *cells])
                print(rows[-1], flush=True)
    return (
        "Weighted error at 2 bits, symmetric, full moment, on unseen text of the domain, by how "
        "the moment of some of its tokens is drawn toward that of all domains (itself shrunk to "
        "its diagonal as K tokens). K is the number of inputs. `Moment.shrunk` is the pool as 1 K "
        "tokens. The first token of a window is left out.\n\n"
        + table(["matrix", "domain", "tokens", *rules], rows)
    )


def _ledoit_wolf(own: Moment, pooled: Moment, tokens: int) -> Moment:
    """Toward the pool, by the squared noise expected of Gaussian inputs over the distance."""
    trace = float(pooled.diagonal().sum(dtype=torch.float64))
    noise = trace**2 + float(pooled.values.double().square().sum())
    distance = float((own.values - pooled.values).double().square().sum())
    return Moment(torch.lerp(own.values, pooled.values, min(1.0, noise / tokens / distance)))


def _as_tokens(share: float, own: Moment, pooled: Moment, tokens: int) -> Moment:
    prior = share * own.cols
    return Moment(torch.lerp(own.values, pooled.values, prior / (prior + tokens)))


def _moment(x_TK: torch.Tensor) -> Moment:
    total = MomentSum(x_TK.shape[1])
    total.add(x_TK)
    return total.moment()
