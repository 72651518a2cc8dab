"""Between and after a step's products: left factors, biases, activation, and digits of the result.

Two kernels, a program per pair and 64 outputs: the first adds what is left to add to gate and up,
joins them and writes the digits that down is multiplied by; the second adds what down lacks.
Checked under Triton's interpreter and compiled for sm_90; not run on a GPU.

Legend: P pairs (a token at an expert), R rank, F ffn, H hidden.
"""

# A Triton kernel's parameters are typed by Triton at launch, not by annotations.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.activations import SWIGLU_ALPHA, SWIGLU_LIMIT
from kernels.triton_decode import Form
from kernels.triton_digits import Digits, store_digits
from kernels.triton_tile import gather_weight, load_row_scale, tile_places
from kernels.types import GROUP_SIZE, Activation

GATE, UP, DOWN = range(3)
"""Projections, in the order of their rows in a pair table."""
PAIR_FIELDS = 9
"""Rows of a pair table [PAIR_FIELDS, P] int64. For each projection: the address of its bias or 0,
the place of its first left factor in the table of addresses, and how many there are (0 where the
pair is not restored)."""
ALPHA = tl.constexpr(SWIGLU_ALPHA)
LIMIT = tl.constexpr(SWIGLU_LIMIT)


def join_gate_and_up(
    pairs: torch.Tensor,
    lefts: torch.Tensor,
    form: Form,
    gate_up: torch.Tensor,
    z: torch.Tensor,
    activation: Activation,
    *,
    ranked: bool,
) -> Digits:
    """Digits [P, F] of act(gate) * up, where gate_up [P, 2 F] float32 still lacks left @ z, bias.

    z [P, R] float32 holds a pair's ranks of gate, then those of up. lefts are addresses int64 of
    packed left factors, transposed, in `form`; without `ranked` there are none to add.
    """
    num_pairs, ffn = gate_up.shape[0], gate_up.shape[1] // 2
    h = Digits.empty(num_pairs, ffn, gate_up)
    _gate_kernel[(ffn // GROUP_SIZE, num_pairs)](
        pairs, num_pairs, lefts, gate_up, z, z.stride(0), h.digits, h.sizes, h.sums, ffn,
        BITS=form.bits, SYMMETRIC=form.grid == "symmetric", RANKED=ranked, ACTIVATION=activation,
    )  # fmt: skip
    return h


def finish_down(
    pairs: torch.Tensor,
    lefts: torch.Tensor,
    form: Form,
    y: torch.Tensor,
    y_rows: torch.Tensor,
    z: torch.Tensor,
    *,
    ranked: bool,
) -> None:
    """y[y_rows[p]] += left @ z[p] + bias of down, in place; y is [*, H] float32."""
    num_pairs, hidden = y_rows.shape[0], y.shape[1]
    _down_kernel[(hidden // GROUP_SIZE, num_pairs)](
        pairs, num_pairs, lefts, y, y_rows, z, z.stride(0), hidden,
        BITS=form.bits, SYMMETRIC=form.grid == "symmetric", RANKED=ranked,
    )  # fmt: skip


@triton.jit
def _gate_kernel(
    pairs, num_pairs, lefts, gate_up, z, z_stride, digits, sizes, sums, ffn,
    BITS: tl.constexpr, SYMMETRIC: tl.constexpr,
    RANKED: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    group, pair = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row = group * 64 + tl.arange(0, 64)
    at = gate_up + pair * (2 * ffn) + row
    gate, up = tl.load(at), tl.load(at + ffn)
    fields = pairs + pair
    if RANKED:
        at_z = z + pair * z_stride
        gate += _left_at(fields, num_pairs, lefts, at_z, group, ffn, 0, BITS, SYMMETRIC)
        at_z += 16 * tl.load(fields + 2 * num_pairs)
        up += _left_at(fields, num_pairs, lefts, at_z, group, ffn, 3, BITS, SYMMETRIC)
    gate += _bias_at(fields, row)
    up += _bias_at(fields + 3 * num_pairs, row)
    if ACTIVATION == "silu":
        joined = gate * tl.sigmoid(gate) * up
    elif ACTIVATION == "gelu":
        joined = 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476)) * up
    elif ACTIVATION == "gelu_tanh":
        # (1 + tanh(a)) / 2 = sigmoid(2 a)
        joined = gate * tl.sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)) * up
    elif ACTIVATION == "relu":
        joined = tl.maximum(gate, 0.0, propagate_nan=tl.PropagateNan.ALL) * up
    else:
        tl.static_assert(ACTIVATION == "clamped_swiglu")
        gate = tl.minimum(gate, LIMIT, propagate_nan=tl.PropagateNan.ALL)
        up = tl.minimum(up, LIMIT, propagate_nan=tl.PropagateNan.ALL)
        up = tl.maximum(up, -LIMIT, propagate_nan=tl.PropagateNan.ALL)
        joined = (up + 1.0) * (gate * tl.sigmoid(gate * ALPHA))
    place = pair * (ffn // 64) + group + tl.arange(0, 1)
    store_digits(digits, sizes, sums, place, joined[None, :], tl.full((1,), 1, tl.int1))


@triton.jit
def _down_kernel(
    pairs, num_pairs, lefts, y, y_rows, z, z_stride, hidden,
    BITS: tl.constexpr, SYMMETRIC: tl.constexpr, RANKED: tl.constexpr,
):  # fmt: skip
    group, pair = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row = group * 64 + tl.arange(0, 64)
    at = y + tl.load(y_rows + pair) * hidden + row
    total = tl.load(at)
    fields = pairs + pair
    if RANKED:
        at_z = z + pair * z_stride
        total += _left_at(fields, num_pairs, lefts, at_z, group, hidden, 6, BITS, SYMMETRIC)
    total += _bias_at(fields + 6 * num_pairs, row)
    tl.store(at, total)


@triton.jit
def _left_at(
    fields, num_pairs, lefts, z, group, rows, FIELD: tl.constexpr,
    BITS: tl.constexpr, SYMMETRIC: tl.constexpr,
):  # fmt: skip
    """64 outputs of left @ z for one pair: a tile of each block's transposed left factor."""
    first = tl.load(fields + (FIELD + 1) * num_pairs)
    num_blocks = tl.load(fields + (FIELD + 2) * num_pairs).to(tl.int32)
    rank = tl.arange(0, 16)
    total = tl.zeros((64,), tl.float32)
    for block in range(0, num_blocks):
        data = tl.load(lefts + first + block).to(tl.pointer_type(tl.uint8))
        col = tl.arange(0, 64)[None, :]
        weight = gather_weight(data, group, rank[:, None], col, BITS, SYMMETRIC, 64, 1)
        values = tl.load(z + block * 16 + rank)
        if SYMMETRIC:
            row_scales = tile_places(rows // 64, BITS, SYMMETRIC, 64, 1)[0]
            values *= load_row_scale(data, row_scales + 2 * rank)
        total += tl.sum(values[:, None] * weight, 0)
    return total


@triton.jit
def _bias_at(field, row):
    """The bias whose address is in the field, zeros when that is 0."""
    address = tl.load(field)
    bias = tl.zeros((64,), tl.float32)
    if address != 0:
        bias += tl.load(address.to(tl.pointer_type(tl.float32)) + row)
    return bias
