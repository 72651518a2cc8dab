"""Joins what experts make of their pairs into a layer's output, in one fixed order.

Knows no expert's bytes and not who ran it.

Legend: S token rows, K top-k, H hidden, P pairs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch

from gpu_worker.planner import ExpertWork
from kernels import ops


@dataclass(frozen=True, slots=True)
class Part:
    """What one expert makes of some of its pairs, not yet weighted by the router."""

    work: ExpertWork
    output_PH: torch.Tensor  # [P, H] float, on any device


def combine(
    parts: Sequence[Part], hidden_SH: torch.Tensor, topk_weights_SK: torch.Tensor
) -> torch.Tensor:
    """Each row's parts times their router weights, summed in float32: [S, H] like `hidden_SH`.

    The order of `parts` does not matter: a row's parts are added in rising order of expert. Carries
    no gradient.
    """
    if not parts:
        return torch.zeros_like(hidden_SH)
    parts = sorted(parts, key=lambda part: part.work.key)
    rows_P = _joined(part.work.token_rows for part in parts)
    columns_P = _joined(part.work.columns for part in parts)
    add = _sum_on_host if hidden_SH.device.type == "cpu" else _sum_on_device
    sum_SH = add(parts, rows_P, columns_P, hidden_SH, topk_weights_SK.detach().float())
    return sum_SH.to(hidden_SH.dtype)


def _sum_on_host(
    parts: Sequence[Part],
    rows_P: np.ndarray,
    columns_P: np.ndarray,
    hidden_SH: torch.Tensor,
    topk_weights_SK: torch.Tensor,
) -> torch.Tensor:
    """In one native call where there is one, else in numpy: the same bits."""
    outputs_PH = torch.cat([part.output_PH.detach().cpu() for part in parts]).float()
    weights_P = topk_weights_SK.numpy()[rows_P, columns_P]
    num_rows = hidden_SH.shape[0]
    sum_SH = ops.weighted_sum(
        outputs_PH, torch.from_numpy(rows_P), torch.from_numpy(weights_P), num_rows
    )
    if sum_SH is not None:
        return sum_SH
    order_P, counts = _by_turn(rows_P)
    weighted_PH = outputs_PH.numpy()[order_P]
    weighted_PH *= weights_P[order_P, None]
    found_SH = np.zeros((num_rows, outputs_PH.shape[1]), np.float32)
    start = 0
    for count in counts:
        turn = slice(start, start + count)
        found_SH[rows_P[order_P[turn]]] += weighted_PH[turn]
        start += count
    return torch.from_numpy(found_SH)


def _sum_on_device(
    parts: Sequence[Part],
    rows_P: np.ndarray,
    columns_P: np.ndarray,
    hidden_SH: torch.Tensor,
    topk_weights_SK: torch.Tensor,
) -> torch.Tensor:
    """The same in torch, without waiting for the device."""
    device = hidden_SH.device
    order_P, counts = _by_turn(rows_P)
    places_3P = np.array((rows_P[order_P], columns_P[order_P], order_P))
    rows, columns, order = torch.from_numpy(places_3P).to(device, non_blocking=True)
    outputs_PH = torch.cat([part.output_PH.to(device, torch.float32) for part in parts])
    weighted_PH = outputs_PH[order] * topk_weights_SK[rows, columns, None]
    sum_SH = torch.zeros(hidden_SH.shape, dtype=torch.float32, device=device)
    start = 0
    for count in counts:
        turn = slice(start, start + count)
        sum_SH.index_add_(0, rows[turn], weighted_PH[turn])
        start += count
    return sum_SH


def _joined(numbers: Iterable[tuple[int, ...]]) -> np.ndarray:
    return np.fromiter(chain.from_iterable(numbers), np.int64)


def _by_turn(rows_P: np.ndarray) -> tuple[np.ndarray, list[int]]:
    """The pairs in the order of adding, and how many go at once.

    The first parts of all rows are added at once, then the second ones, and so on: as many
    additions as a row has parts, not as there are experts. A row is in each at most once, so that
    index_add_ has one order only, on a GPU too.
    """
    turns_P = _turns(rows_P)
    return np.lexsort((rows_P, turns_P)), np.bincount(turns_P).tolist()


def _turns(rows_P: np.ndarray) -> np.ndarray:
    """[P] int64: how many pairs of the same row come before each."""
    order_P = rows_P.argsort(kind="stable")
    sorted_P = rows_P[order_P]
    turns_P = np.empty_like(rows_P)
    turns_P[order_P] = np.arange(len(rows_P)) - np.searchsorted(sorted_P, sorted_P)
    return turns_P
