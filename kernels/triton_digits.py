"""Activations as fixed-point digits: what lets integer tensor cores multiply float32 exactly.

Each group of 64 inputs of a token shares a power of two; an input is then a 31-bit integer, stored
as four signed digits of 8 bits, the highest first. That is exact down to 2**-30 of the group's
largest input. Products of digits with codes are sums of integers, so they have no order: a token's
result is the same to the bit in any batch. Knows no matrix. Checked under Triton's interpreter and
compiled for sm_90; not run on a GPU.

Legend: P pairs (a token at an expert), G groups of 64 inputs, D the 4 digits, K cols.
"""

# A Triton kernel's parameters are typed by Triton at launch, not by annotations.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from kernels.types import TILE_COLS

DIGITS = 4
"""A token takes as many columns of a tensor core's operand, which has 8 at least."""
GROUPS_PER_PROGRAM = 16


@dataclass(frozen=True, slots=True)
class Digits:
    """P rows of K inputs, each the sum of two halves of two digits:

    x[p, 64 g + i] = sum over h of sizes[p, g, h] * (256 * digits[p, g, 2 h, i]
                                                     + digits[p, g, 2 h + 1, i]).
    A row that holds an infinity or a NaN has NaN sizes, so that its results show it.
    """

    digits: torch.Tensor  # [P, G, D, 64] int8
    sizes: torch.Tensor  # [P, G, 2] float32, powers of two
    sums: torch.Tensor  # [P, G, 2] float32: of a group's inputs 0 to 31, then of 32 to 63

    @staticmethod
    def empty(num_pairs: int, cols: int, like: torch.Tensor) -> Digits:
        """Room for P rows, on the device of `like`."""
        num_groups = cols // TILE_COLS
        shape = (num_pairs, num_groups, DIGITS // 2)
        return Digits(
            like.new_empty((num_pairs, num_groups, DIGITS, TILE_COLS), dtype=torch.int8),
            like.new_empty(shape, dtype=torch.float32),
            like.new_empty(shape, dtype=torch.float32),
        )

    @property
    def num_groups(self) -> int:
        return self.digits.shape[1]


def to_digits(x_addresses: torch.Tensor, cols: int, like: torch.Tensor) -> Digits:
    """Rows of `like`'s dtype at the addresses [P] int64, each of `cols` inputs in a row."""
    num_pairs = x_addresses.shape[0]
    out = Digits.empty(num_pairs, cols, like)
    num_groups = out.num_groups
    _digits_kernel[(triton.cdiv(num_groups, GROUPS_PER_PROGRAM), num_pairs)](
        x_addresses, like, out.digits, out.sizes, out.sums, num_groups, GROUPS=GROUPS_PER_PROGRAM
    )
    return out


@triton.jit
def _digits_kernel(x_addresses, like, digits, sizes, sums, num_groups, GROUPS: tl.constexpr):
    """GROUPS groups of one row. `like` gives the dtype alone."""
    pair = tl.program_id(1)
    x = tl.load(x_addresses + pair).to(like.dtype)
    group = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    inside = group < num_groups
    col = group[:, None] * 64 + tl.arange(0, 64)[None, :]
    value = tl.load(x + col, mask=inside[:, None], other=0.0).to(tl.float32)
    store_digits(digits, sizes, sums, pair.to(tl.int64) * num_groups + group, value, inside)


@triton.jit
def store_digits(digits, sizes, sums, place, value, inside):
    """Write groups value [G, 64] float32 as digits at place [G], counted in groups."""
    half = tl.arange(0, 2)[None, :]
    largest = tl.max(tl.abs(value), 1)
    exponent = (largest.to(tl.int32, bitcast=True) >> 23) & 255
    # A NaN may hide from the maximum, and overflow from the exponent: both show in the sum.
    total = tl.sum(value, 1)
    finite = (total == total) & (tl.abs(total) < float("inf")) & (exponent < 255)
    # |value| < 2**(exponent - 126); times `up` it is below 2**30. Below 2**-96 digits run out.
    exponent = tl.maximum(exponent, 30)
    up = ((283 - exponent) << 23).to(tl.float32, bitcast=True)
    whole = tl.where(finite[:, None], value * up[:, None], 0.0).to(tl.int32)
    d3 = ((whole + 128) & 255) - 128
    whole = (whole - d3) >> 8
    d2 = ((whole + 128) & 255) - 128
    whole = (whole - d2) >> 8
    d1 = ((whole + 128) & 255) - 128
    d0 = (whole - d1) >> 8
    at = digits + place[:, None] * 256 + tl.arange(0, 64)[None, :]
    tl.store(at, d0.to(tl.int8), mask=inside[:, None])
    tl.store(at + 64, d1.to(tl.int8), mask=inside[:, None])
    tl.store(at + 128, d2.to(tl.int8), mask=inside[:, None])
    tl.store(at + 192, d3.to(tl.int8), mask=inside[:, None])
    size = ((exponent[:, None] - 13 - 16 * half) << 23).to(tl.float32, bitcast=True)
    size = tl.where(finite[:, None], size, float("nan"))
    at_half = place[:, None] * 2 + half
    tl.store(sizes + at_half, size, mask=inside[:, None])
    halves = tl.sum(tl.reshape(value, (value.shape[0], 2, 32)), 2)
    tl.store(sums + at_half, halves, mask=inside[:, None])
