"""Routers fitted again after quantising: from what they see now to what the original's say.

A quantised model's routers read hidden states that are a little off. Each is moved, by ridge
regression towards the router that it was, to give the original's logits on the same tokens. Softmax
does not see what all logits of a token have in common, so neither does the fit. Knows no file.

Legend: S token rows, W windows, T tokens of each, H hidden, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch

from expert_store.families import experts_modules
from gpu_worker.model import ModelRunner
from gpu_worker.replay import RoutingTrace

LINEAR_ROUTERS = ("mixtral", "olmoe", "qwen2_moe", "qwen3_moe")
"""Families whose router is one matrix and a softmax: `gate` beside `experts`."""
RIDGES = (math.inf, 10.0, 3.0, 1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001)
"""Tried weights of the old router, in units of the mean energy of a hidden state's element."""
HELD_OUT_EVERY = 4
"""Every so many windows, one is for choosing the ridge and not fitted on."""
PASS_ROWS = 1024

Order = Literal["together", "in_turn"]
"""together: all layers from one pass of the quantised model. in_turn: each layer from a pass with
the layers before it corrected."""


@dataclass(frozen=True, slots=True)
class RouterFit:
    """One layer's router. Errors are mean squares of held-out logits, what they share left out."""

    layer: int
    weight_EH: torch.Tensor  # float32, of values that the asked dtype can hold
    ridge: float  # inf: the old router is kept
    error_before: float
    error_after: float
    moved: float  # norm of the change over that of the router


@dataclass(frozen=True, slots=True)
class Agreement:
    """Shares of (token, layer) pairs that two runs route alike: to the same set, the same first."""

    same_set: float
    same_top_1: float


@dataclass(frozen=True, slots=True)
class Sums:
    """What a ridge regression needs of rows X [S, H] and residuals R [S, E], float64."""

    gram_HH: torch.Tensor
    cross_HE: torch.Tensor
    energy: float
    num_rows: int

    @staticmethod
    def of(inputs_SH: torch.Tensor, residual_SE: torch.Tensor) -> Sums:
        inputs, residual = inputs_SH.double(), residual_SE.double()
        return Sums(
            inputs.T @ inputs,
            inputs.T @ residual,
            float(residual.square().sum()),
            inputs.shape[0],
        )

    def __add__(self, other: Sums) -> Sums:
        return Sums(
            self.gram_HH + other.gram_HH,
            self.cross_HE + other.cross_HE,
            self.energy + other.energy,
            self.num_rows + other.num_rows,
        )

    def error(self, change_EH: torch.Tensor) -> float:
        """Mean square of R - X change^T."""
        change = change_EH.double()
        left = self.energy - 2 * float((change * self.cross_HE.T).sum())
        left += float(((change @ self.gram_HH) * change).sum())
        return max(0.0, left) / (self.num_rows * change.shape[0])


def recalibrate(
    original: ModelRunner,
    quantized: ModelRunner,
    windows_WT: torch.Tensor,
    *,
    dtype: torch.dtype = torch.bfloat16,
    order: Order = "together",
    ridges: Sequence[float] = RIDGES,
    progress: Callable[[int], None] = lambda num_tokens: None,
) -> list[RouterFit]:
    """Fit the routers of every layer on windows [W, T] and put them into the quantised model.

    `dtype` is what the routers will be stored in. `progress` is told tokens of either model.
    Raises ValueError for a family whose router is no single matrix, and for fewer than two windows.
    """
    if windows_WT.dim() != 2 or windows_WT.shape[0] < 2:
        raise ValueError(
            f"windows: got shape {tuple(windows_WT.shape)}, expected [W, T] with at least 2 "
            "windows, one to choose the ridge by; give more text"
        )
    truth, routers = routers_of(original.model), routers_of(quantized.model)
    logits = _logits(original, truth, windows_WT, progress)
    layers = sorted(routers)
    fits = []
    for some in [layers] if order == "together" else [[layer] for layer in layers]:
        sums = _sums(quantized, {la: routers[la] for la in some}, logits, windows_WT, progress)
        for layer in some:
            fit = fit_router(layer, routers[layer].weight, *sums[layer], ridges=ridges, dtype=dtype)
            routers[layer].weight.data.copy_(fit.weight_EH)
            fits.append(fit)
    return fits


def routers_of(model: Any) -> dict[int, Any]:
    """The router module of each layer; its `weight` is [E, H]. Raises ValueError."""
    family = model.config.model_type
    if family not in LINEAR_ROUTERS:
        raise ValueError(
            f"model: routers of {family} cannot be recalibrated, only those of "
            f"{', '.join(LINEAR_ROUTERS)}"
        )
    found = {}
    for layer, (path, _) in experts_modules(model).items():
        router = model.get_submodule(path.rpartition(".")[0]).gate
        assert router.weight.dim() == 2, f"{path}: its router has weight {router.weight.shape}"
        found[layer] = router
    return found


def fit_router(
    layer: int,
    weight_EH: torch.Tensor,
    fitted: Sums,
    held_out: Sums,
    *,
    ridges: Sequence[float] = RIDGES,
    dtype: torch.dtype = torch.bfloat16,
) -> RouterFit:
    """The router by the ridge that does best on the held-out rows, the largest of equal ones.

    A candidate that does not beat the old router there, as it will be stored, is not taken.
    """
    old_EH = weight_EH.detach().cpu().float()
    before = held_out.error(torch.zeros_like(old_EH))
    best = RouterFit(layer, old_EH, math.inf, before, before, 0.0)
    values_H, vectors_HH = torch.linalg.eigh(fitted.gram_HH)
    turned_HE = vectors_HH.T @ fitted.cross_HE
    unit = float(values_H.clamp(min=0).mean())
    for ridge in sorted(ridges, reverse=True):
        if math.isinf(ridge) or unit == 0:
            continue
        shrunk_HE = turned_HE / (values_H.clamp(min=0) + ridge * unit)[:, None]
        change_EH = (vectors_HH @ shrunk_HE).T.float()
        if not bool(change_EH.any()):
            continue
        new_EH = (old_EH + change_EH).to(dtype).float()
        after = held_out.error(new_EH - old_EH)
        if after < best.error_after:
            moved = float((new_EH - old_EH).norm() / old_EH.norm().clamp(min=1e-30))
            best = RouterFit(layer, new_EH, ridge, before, after, moved)
    return best


def agreement(mine: RoutingTrace, theirs: RoutingTrace) -> dict[int, Agreement]:
    """By layer, how far two traces over the same windows route alike. Ids of a set have no order.

    Raises ValueError when they are of other windows.
    """
    if not torch.equal(mine.token_tags_WT, theirs.token_tags_WT):
        raise ValueError("traces: expected both over the same windows")
    found = {}
    for layer, one in mine.layers.items():
        other = theirs.layers[layer]
        sets = [part.topk_ids_WTK.sort(dim=2).values for part in (one, other)]
        first = [
            part.topk_ids_WTK.gather(2, part.topk_weights_WTK.abs().argmax(dim=2, keepdim=True))
            for part in (one, other)
        ]
        found[layer] = Agreement(
            float((sets[0] == sets[1]).all(dim=2).double().mean()),
            float((first[0] == first[1]).double().mean()),
        )
    return found


def mean_agreement(layers: Mapping[int, Agreement]) -> Agreement:
    """Over layers, which have as many tokens each."""
    count = len(layers)
    return Agreement(
        sum(one.same_set for one in layers.values()) / count,
        sum(one.same_top_1 for one in layers.values()) / count,
    )


def _centred(values_SE: torch.Tensor) -> torch.Tensor:
    return values_SE - values_SE.mean(dim=1, keepdim=True)


def _logits(
    runner: ModelRunner,
    routers: Mapping[int, Any],
    windows_WT: torch.Tensor,
    progress: Callable[[int], None],
) -> list[dict[int, torch.Tensor]]:
    """The original's centred logits [S, E] of each layer, pass by pass, on the CPU."""
    return [
        {
            layer: _centred(inputs_SH @ routers[layer].weight.detach().cpu().float().T)
            for layer, inputs_SH in seen.items()
        }
        for seen in _passes(runner, routers, windows_WT, progress)
    ]


def _sums(
    runner: ModelRunner,
    routers: Mapping[int, Any],
    logits: Sequence[Mapping[int, torch.Tensor]],
    windows_WT: torch.Tensor,
    progress: Callable[[int], None],
) -> dict[int, tuple[Sums, Sums]]:
    """(fitted, held out) of each layer, from what the model's routers see now."""
    found: dict[int, tuple[Sums, Sums]] = {}
    num_tokens, start = windows_WT.shape[1], 0
    for expected, seen in zip(logits, _passes(runner, routers, windows_WT, progress), strict=True):
        for layer, inputs_SH in seen.items():
            weight_EH = routers[layer].weight.detach().cpu().float()
            residual_SE = expected[layer] - _centred(inputs_SH @ weight_EH.T)
            numbers_S = start + torch.arange(inputs_SH.shape[0]) // num_tokens
            held_S = numbers_S % HELD_OUT_EVERY == min(HELD_OUT_EVERY, windows_WT.shape[0]) - 1
            new = tuple(Sums.of(inputs_SH[part], residual_SE[part]) for part in (~held_S, held_S))
            old = found.get(layer)
            found[layer] = (new[0], new[1]) if old is None else (old[0] + new[0], old[1] + new[1])
        start += inputs_SH.shape[0] // num_tokens
    return found


def _passes(
    runner: ModelRunner,
    routers: Mapping[int, Any],
    windows_WT: torch.Tensor,
    progress: Callable[[int], None],
) -> Iterator[dict[int, torch.Tensor]]:
    """What each router reads in a pass: float32 [S, H] on the CPU, by layer."""
    positions_T = torch.arange(windows_WT.shape[1], device=runner.model.device)
    with _tapped(routers) as seen:
        for windows_BT in windows_WT.split(max(1, PASS_ROWS // windows_WT.shape[1])):
            positions_BT = positions_T.expand(windows_BT.shape[0], -1)
            ids_BT = windows_BT.to(runner.model.device)
            runner.forward(ids_BT, positions_BT, None, None, logits_to_keep=1)
            progress(windows_BT.numel())
            yield dict(seen)
            seen.clear()


@contextmanager
def _tapped(routers: Mapping[int, Any]) -> Iterator[dict[int, torch.Tensor]]:
    """Keeps the routers' inputs of a pass."""
    seen: dict[int, torch.Tensor] = {}

    def hook(layer: int) -> Callable[..., None]:
        def keep(module: Any, args: tuple[torch.Tensor, ...]) -> None:
            seen[layer] = args[0].reshape(-1, args[0].shape[-1]).to("cpu", torch.float32).clone()

        return keep

    handles = [router.register_forward_pre_hook(hook(layer)) for layer, router in routers.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
