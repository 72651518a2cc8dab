"""Several MLPs of one step in a handful of launches: no launch per expert, no loop over experts.

Digits of the inputs; gate and up of all experts, a launch per form of codes present; planes; right
factors; what joins gate and up (left factors, biases, activation, digits of the result) in one;
the same for down. Four launches for plain codes of one form, nine with rank blocks and a plane.
Checked under Triton's interpreter and compiled for sm_90; not run on a GPU.

Legend: T tokens, P pairs (a token at an expert), H hidden, F ffn.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch

from kernels.gated import compose_gated_mlp
from kernels.triton_decode import Form, multiply_rows, tokens_per_job
from kernels.triton_digits import Digits, to_digits
from kernels.triton_gate import finish_down, join_gate_and_up
from kernels.triton_matmul import DECODE_TOKENS, low_rank_matmul, matmul
from kernels.triton_step import RowsLaunch, build_tables
from kernels.types import TILE_ROWS, MlpCall, QuantizedMatrix

NO_FACTORS = Form(3, "affine")
"""What kernels without left factors to add are compiled for; any form would do."""
ALIGNED_WORDS = 2
"""Sections of the uploaded tables start at multiples of 16 bytes."""


def gated_mlp_many(calls: Sequence[MlpCall]) -> list[torch.Tensor]:
    """[T_i, H] float32 per call, in order; what `kernels/ops.py` has checked.

    Calls of at most DECODE_TOKENS tokens share launches where shape, activation, dtype and form of
    factors agree: there a token's result has the same bits whatever other tokens and calls there
    are. Calls of more tokens, of other codes (bfloat16, block code) or with factors in several
    forms run one after another, matrix by matrix.
    """
    few = [index for index, call in enumerate(calls) if _is_grouped(call)]
    results = dict(zip(few, _grouped([calls[index] for index in few]), strict=True))
    return [
        results[index] if index in results else _one_by_one(call)
        for index, call in enumerate(calls)
    ]


def _is_grouped(call: MlpCall) -> bool:
    mlp, repair = call.mlp, call.repair
    if not 0 < call.x_TH.shape[0] <= DECODE_TOKENS:
        return False
    packed = all(
        isinstance(matrix, QuantizedMatrix) and matrix.bits != 16
        for matrix in (mlp.gate, mlp.up, mlp.down)
    )
    if not packed or repair is None:
        return packed
    return len({(p.bits, p.grid) for p in (repair.gate, repair.up, repair.down) if p.rank}) < 2


def _one_by_one(call: MlpCall) -> torch.Tensor:
    x_TH = call.x_TH
    if not x_TH.shape[0]:
        return x_TH.new_zeros(x_TH.shape, dtype=torch.float32)
    return compose_gated_mlp(
        x_TH, call.mlp, call.repair, call.restored_T,
        matmul=partial(matmul, dtype=x_TH.dtype), low_rank_matmul=low_rank_matmul,
    )  # fmt: skip


def _grouped(calls: Sequence[MlpCall]) -> list[torch.Tensor]:
    """The same for calls that are all `_is_grouped`."""
    restored = [_restored(call) for call in calls]
    forms = [_factor_form(call, mask) for call, mask in zip(calls, restored, strict=True)]
    results: dict[int, torch.Tensor] = {}
    for form, members in _groups(calls, forms):
        chosen = [_readable(calls[index]) for index in members]
        y_PH = _run(chosen, [restored[index] for index in members], form)
        parts = y_PH.split([call.x_TH.shape[0] for call in chosen])
        results |= zip(members, parts, strict=True)
    return [results[index] for index in range(len(calls))]


def _groups(
    calls: Sequence[MlpCall], forms: Sequence[Form | None]
) -> list[tuple[Form | None, list[int]]]:
    """Calls that share launches; those without factors go with the first form there is."""
    alike: dict[object, dict[Form | None, list[int]]] = defaultdict(lambda: defaultdict(list))
    for index, (call, form) in enumerate(zip(calls, forms, strict=True)):
        gate = call.mlp.gate
        key = (gate.rows, gate.cols, call.mlp.activation, call.x_TH.dtype, call.x_TH.device)
        alike[key][form].append(index)
    groups = []
    for by_form in alike.values():
        without = by_form.pop(None, [])
        first = next(iter(by_form), None)
        by_form[first] = sorted(by_form[first] + without)
        groups += list(by_form.items())
    return groups


def _restored(call: MlpCall) -> np.ndarray | None:
    """Bool [T] on the host, None when no token is; a mask that lies on the device costs a wait."""
    if call.repair is None or call.repair.is_empty:
        return None
    if call.restored_T is None:
        return np.ones(call.x_TH.shape[0], bool)
    mask = call.restored_T.cpu().numpy()
    return mask if mask.any() else None


def _factor_form(call: MlpCall, mask: np.ndarray | None) -> Form | None:
    if call.repair is None or mask is None:
        return None
    parts = (call.repair.gate, call.repair.up, call.repair.down)
    return next((Form(part.bits, part.grid) for part in parts if part.rank), None)


def _readable(call: MlpCall) -> MlpCall:
    """Rows of consecutive inputs in a type the kernels read."""
    x = call.x_TH.float() if call.x_TH.dtype == torch.float64 else call.x_TH
    return replace(call, x_TH=x if x.stride(1) == 1 else x.contiguous())


def _run(
    calls: Sequence[MlpCall], restored: Sequence[np.ndarray | None], factor_form: Form | None
) -> torch.Tensor:
    """[P, H] float32: the calls' results one after another."""
    mlp, x = calls[0].mlp, calls[0].x_TH
    ffn, hidden = mlp.gate.rows, mlp.gate.cols
    tokens = tokens_per_job(max(call.x_TH.shape[0] for call in calls))
    tables = build_tables(calls, restored, tokens)
    num_pairs, form = len(tables.y_rows), factor_form or NO_FACTORS
    in_order, x_addresses, y_rows, pairs, lefts, *jobs = _send(
        [
            np.arange(num_pairs),
            tables.x_addresses,
            tables.y_rows,
            tables.pairs,
            tables.lefts,
            *(launch.jobs for launch in (*tables.gate_up, *tables.down)),
        ],
        x.device,
    )
    gate_up_PF = x.new_empty((num_pairs, 2 * ffn), dtype=torch.float32)
    y_PH = x.new_empty((num_pairs, hidden), dtype=torch.float32)
    # Ranks of gate and up, then, when those have been used, of down.
    z_PR = x.new_empty((num_pairs, max(tables.z_columns, 1)), dtype=torch.float32)

    def multiply(
        launches: Sequence[RowsLaunch],
        sent: Sequence[torch.Tensor],
        x: Digits,
        y: torch.Tensor,
        rows: int,
        y_rows: torch.Tensor,
    ) -> None:
        for launch, table in zip(launches, sent, strict=True):
            to_z = launch.of == "rights"
            multiply_rows(
                table, launch.form, x, z_PR if to_z else y, in_order if to_z else y_rows,
                rows=TILE_ROWS if to_z else rows, tokens=tokens, add=launch.of == "planes",
            )  # fmt: skip

    ranked_gate_up, ranked_down = tables.ranked
    x_digits = to_digits(x_addresses, hidden, x)
    split = len(tables.gate_up)
    multiply(tables.gate_up, jobs[:split], x_digits, gate_up_PF, ffn, in_order)
    h_digits = join_gate_and_up(
        pairs, lefts, form, gate_up_PF, z_PR, mlp.activation, ranked=ranked_gate_up
    )
    multiply(tables.down, jobs[split:], h_digits, y_PH, hidden, y_rows)
    if ranked_down or tables.has_down_bias:
        finish_down(pairs, lefts, form, y_PH, y_rows, z_PR, ranked=ranked_down)
    return y_PH


def _send(tables: Sequence[np.ndarray], device: torch.device) -> list[torch.Tensor]:
    """The int64 tables on the device, in one copy that nothing waits for."""
    starts, length = [], 0
    for table in tables:
        starts.append(length)
        length += -(-table.size // ALIGNED_WORDS) * ALIGNED_WORDS
    # Pinned memory comes from torch's cache, which keeps it until the copy has ended.
    host = torch.empty(length, dtype=torch.int64, pin_memory=device.type == "cuda")
    words = host.numpy()
    for start, table in zip(starts, tables, strict=True):
        words[start : start + table.size] = table.ravel()
    sent = host.to(device, non_blocking=True)
    return [
        sent[start : start + table.size].view(table.shape)
        for start, table in zip(starts, tables, strict=True)
    ]
