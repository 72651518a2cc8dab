"""An error bound: how far a served weight may be from the original, checked on every tensor.

Knows no codec.

Legend: N rows, K cols, G groups of 64 cols.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from kernels.types import GROUP_SIZE

BoundMode = Literal["absolute", "row", "group"]

LARGEST_RELATIVE = 4.0
"""Of the root mean square: a Gaussian weight is all zeros long before that."""
SMALLEST_RELATIVE = 1e-5
SMALLEST_ABSOLUTE = 2.0**-100
"""Relative bounds come to no less than this either: weights under 1e-30 are zeros."""
SMALLEST_GROUP = 2.0**-10
"""A group's rms counts as at least this share of its row's."""


@dataclass(frozen=True, slots=True)
class ErrorBound:
    """The largest error of one weight: `value`, or `value` times the rms of its row or group.

    row and group are relative to the root mean square of the weight's row, or of the group of 64
    inputs that it belongs to. A bound relative to a whole tensor's range is not offered: one
    outlier would make it meaningless.

    Raises ValueError for another mode or a value out of its limits.
    """

    value: float
    mode: BoundMode

    def __post_init__(self) -> None:
        if self.mode not in get_args(BoundMode):
            raise ValueError(
                f"error bound: got mode {self.mode!r}, expected one of {get_args(BoundMode)}"
            )
        least, most = SMALLEST_RELATIVE, LARGEST_RELATIVE
        if self.mode == "absolute":
            least, most = SMALLEST_ABSOLUTE, 3e38
        if not (math.isfinite(self.value) and least <= self.value <= most):
            raise ValueError(
                f"error bound: got {self.value}, expected {least:.3g} to {most:.3g} for {self.mode}"
            )

    @classmethod
    def parse(cls, text: str) -> ErrorBound:
        """The bound that `str()` wrote, such as "row:0.1". Raises ValueError."""
        mode, colon, number = text.partition(":")
        try:
            value = float(number)
        except ValueError:
            value = math.nan
        known = next((name for name in get_args(BoundMode) if name == mode), None)
        if not colon or known is None or math.isnan(value):
            raise ValueError(
                f"error bound: got {text!r}, expected MODE:VALUE with mode one of "
                f"{get_args(BoundMode)}, for example row:0.1"
            )
        return cls(value, known)

    def __str__(self) -> str:
        return f"{self.mode}:{self.value!r}"

    def of(self, weight_NK: torch.Tensor) -> torch.Tensor:
        """The bound of every weight in absolute terms: float64 [N, 1], or [N, G] for group.

        Raises ValueError for what is not a float matrix, holds NaN or infinity, or, for group, has
        cols that are no multiple of 64.
        """
        check_weight(weight_NK)
        rows, cols = weight_NK.shape
        if self.mode == "absolute":
            return torch.full((rows, 1), self.value, dtype=torch.float64)
        row_N1 = _rms(weight_NK)
        if self.mode == "row":
            return (self.value * row_N1).clamp(min=SMALLEST_ABSOLUTE)
        if cols % GROUP_SIZE:
            raise ValueError(
                f"error bound: {self} needs cols in groups of {GROUP_SIZE}, got [{rows}, {cols}]; "
                "use row or absolute"
            )
        groups_NG = _rms(weight_NK.view(-1, GROUP_SIZE)).view(rows, -1)
        return (self.value * groups_NG.maximum(SMALLEST_GROUP * row_N1)).clamp(
            min=SMALLEST_ABSOLUTE
        )


def check_weight(weight_NK: torch.Tensor) -> None:
    """Raises ValueError unless it is a float matrix of finite values."""
    if weight_NK.dim() != 2 or not weight_NK.is_floating_point() or not weight_NK.numel():
        raise ValueError(
            f"weight: expected float [rows, cols], got {weight_NK.dtype} {tuple(weight_NK.shape)}"
        )
    if not bool(torch.isfinite(weight_NK).all()):
        raise ValueError("weight: holds NaN or infinity; an error bound means nothing there")


def largest_error(
    weight_NK: torch.Tensor, served_NK: torch.Tensor, bound_NG: torch.Tensor
) -> float:
    """The largest error of any weight, as a share of its bound; above 1 the bound is broken."""
    rows, groups = bound_NG.shape
    largest = 0.0
    step = max(1, (1 << 20) // weight_NK.shape[1])
    for start in range(0, rows, step):
        piece = slice(start, start + step)
        error_NK = (served_NK[piece].double() - weight_NK[piece].double()).abs()
        share = error_NK.view(error_NK.shape[0], groups, -1) / bound_NG[piece, :, None]
        # NaN must not pass as small.
        largest = max(largest, float(torch.nan_to_num(share, nan=torch.inf).max()))
    return largest


def assert_within(
    weight_NK: torch.Tensor, served_NK: torch.Tensor, bound: ErrorBound, codec: str
) -> None:
    """AssertionError when what is served breaks its bound: a codec's fault, never the caller's."""
    largest = largest_error(weight_NK, served_NK, bound.of(weight_NK))
    if largest > 1:
        rows, cols = weight_NK.shape
        raise AssertionError(
            f"{codec}: a weight of [{rows}, {cols}] is {largest:.6g} times its bound {bound} off; "
            "nothing was written"
        )


def _rms(values: torch.Tensor) -> torch.Tensor:
    """Root mean square of each row, float64 [N, 1], in pieces that bound the memory."""
    norms = [piece.double().norm(dim=1, keepdim=True) for piece in values.split(1 << 12)]
    return torch.cat(norms) / values.shape[1] ** 0.5
