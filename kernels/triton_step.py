"""The tables of one grouped step: who multiplies what, as numbers for the kernels; host side only.

Pairs (a token at an expert) are numbered expert by expert, an expert's restored tokens first, so
that whatever a repair adds is added to a run of pairs. Knows no launch.

Legend: P pairs, J jobs, T tokens, N rows, H hidden, F ffn.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from kernels.triton_decode import FIRST_PAIR, NUM_PAIRS, Form
from kernels.triton_gate import DOWN, GATE, PAIR_FIELDS, UP
from kernels.types import (
    TILE_ROWS,
    LowRank,
    Matrix,
    MlpCall,
    QuantizedMatrix,
    left_offset,
    tiles_bytes,
)

KERNEL_ALIGNMENT = 16
"""Bytes: what the kernels' copies need. Records and rank blocks start at multiples of 64."""
Jobs = dict[Form, list[tuple[int, ...]]]
"""Jobs by form, each a tuple as in `kernels/triton_decode.py`."""

Kind = Literal["codes", "planes", "rights"]


@dataclass(frozen=True, slots=True)
class RowsLaunch:
    """One launch: matrices of one form, by the inputs of their pairs."""

    form: Form
    jobs: np.ndarray  # [5, J] int64
    of: Kind


@dataclass(frozen=True, slots=True)
class StepTables:
    """Everything the kernels look up; all int64.

    keep_alive holds copies made for alignment: the tables have their addresses alone.
    """

    x_addresses: np.ndarray  # [P]
    y_rows: np.ndarray  # [P] row of each pair in the result, the calls' rows one after another
    pairs: np.ndarray  # [PAIR_FIELDS, P]
    lefts: np.ndarray  # [number of left factors] addresses
    gate_up: tuple[RowsLaunch, ...]  # in order: planes add to what codes have written
    down: tuple[RowsLaunch, ...]
    z_columns: int  # ranks of the widest pair, of gate and up together or of down
    ranked: tuple[bool, bool]  # whether any pair has left factors of gate or up; of down
    has_down_bias: bool
    keep_alive: tuple[torch.Tensor, ...]


class _Builder:
    """Collects a step's tables, call by call; what is per token is spread by numpy at the end."""

    def __init__(self) -> None:
        self.codes: list[Jobs] = [defaultdict(list), defaultdict(list)]
        self.planes: list[list[Jobs]] = [[], []]
        self.rights: list[Jobs] = [defaultdict(list), defaultdict(list)]
        self.lefts: list[int] = []
        self.z_columns = 0
        self.fields: list[list[int]] = []
        self.kept: list[torch.Tensor] = []

    def add(self, call: MlpCall, first: int, num_pairs: int, num_restored: int) -> None:
        """One call, its pairs from `first` on, the first `num_restored` of them restored."""
        mlp, repair = call.mlp, call.repair if num_restored else None
        self._matrix(self.codes[0], mlp.gate, 0, first, num_pairs)
        self._matrix(self.codes[0], mlp.up, mlp.gate.rows, first, num_pairs)
        self._matrix(self.codes[1], mlp.down, 0, first, num_pairs)
        fields = [0] * PAIR_FIELDS
        for projection, bias in enumerate((mlp.gate_bias, mlp.up_bias, mlp.down_bias)):
            if bias is not None:
                fields[3 * projection] = self._contiguous(bias)
        self.fields.append(fields)
        if repair is None:
            return
        for stage, column, planes in (
            (0, 0, repair.gate_planes),
            (0, mlp.gate.rows, repair.up_planes),
            (1, 0, repair.down_planes),
        ):
            for turn, plane in enumerate(planes):
                if turn == len(self.planes[stage]):
                    self.planes[stage].append(defaultdict(list))
                self._matrix(self.planes[stage][turn], plane, column, first, num_restored)
        for projection, stage, column, factors in (
            (GATE, 0, 0, repair.gate),
            (UP, 0, repair.gate.rank, repair.up),
            (DOWN, 1, 0, repair.down),
        ):
            fields[3 * projection + 1] = len(self.lefts)
            fields[3 * projection + 2] = len(factors.block_offsets)
            if factors.block_offsets:
                self._ranks(self.rights[stage], factors, column, first, num_restored)
                self.z_columns = max(self.z_columns, column + factors.rank)

    def _matrix(self, jobs: Jobs, matrix: Matrix, column: int, first: int, count: int) -> None:
        """A job of `matrix`; of an aligned copy where its bytes are not."""
        assert isinstance(matrix, QuantizedMatrix), f"{type(matrix)} has no form of tiles"
        data = matrix.data
        address = data.data_ptr()
        if address % KERNEL_ALIGNMENT or not data.is_contiguous():
            self.kept.append(data.clone(memory_format=torch.contiguous_format))
            address = self.kept[-1].data_ptr()
        scales = address
        if matrix.grid == "symmetric":
            scales += tiles_bytes(
                matrix.rows, matrix.cols, matrix.bits, matrix.grid, matrix.group_size
            )
        jobs[Form.of(matrix)].append((address, scales, column, first, count))

    def _contiguous(self, bias: torch.Tensor) -> int:
        self.kept.append(bias.contiguous())
        return self.kept[-1].data_ptr()

    def _ranks(self, jobs: Jobs, factors: LowRank, column: int, first: int, count: int) -> None:
        """Jobs of the right factors of all rank blocks, and the addresses of the left ones."""
        cols, bits, grid = factors.cols, factors.bits, factors.grid
        start, offsets = factors.data.data_ptr(), factors.block_offsets
        if not factors.data.is_contiguous() or any(
            (start + offset) % KERNEL_ALIGNMENT for offset in offsets
        ):
            start, offsets = self._aligned_blocks(factors)
        left = start + left_offset(cols, bits, grid)
        scales = start + tiles_bytes(TILE_ROWS, cols, bits, grid)
        self.lefts += [left + offset for offset in offsets]
        jobs[Form(bits, grid)] += [
            (start + offset, scales + offset, column + TILE_ROWS * block, first, count)
            for block, offset in enumerate(offsets)
        ]

    def _aligned_blocks(self, factors: LowRank) -> tuple[int, tuple[int, ...]]:
        """The same blocks in a copy, each where the kernels can read it: address and offsets."""
        start = left_offset(factors.cols, factors.bits, factors.grid)
        size = start + left_offset(factors.rows, factors.bits, factors.grid)
        num_blocks = len(factors.block_offsets)
        copy = factors.data.new_zeros(size * num_blocks)
        for block in range(num_blocks):
            right, left = factors.right(block).data, factors.left_t(block).data
            at = block * size
            copy[at : at + right.numel()] = right
            copy[at + start : at + start + left.numel()] = left
        self.kept.append(copy)
        return copy.data_ptr(), tuple(block * size for block in range(num_blocks))

    def launches(self, stage: int, tokens: int) -> tuple[RowsLaunch, ...]:
        """Codes first; then plane 0 of every matrix, plane 1, ...; right factors."""
        turns: list[tuple[Kind, Jobs]] = [("codes", self.codes[stage])]
        turns += [("planes", turn) for turn in self.planes[stage]]
        turns += [("rights", self.rights[stage])]
        return tuple(
            RowsLaunch(form, split_jobs(np.array(table, np.int64), tokens), of)
            for of, jobs in turns
            for form, table in jobs.items()
        )


def split_jobs(jobs: np.ndarray, tokens: int) -> np.ndarray:
    """[5, J] from [jobs, 5] of any number of pairs: at most `tokens` each."""
    counts = jobs[:, NUM_PAIRS]
    if counts.max() <= tokens:
        return np.ascontiguousarray(jobs.T)
    parts = -(-counts // tokens)
    split = np.repeat(jobs, parts, axis=0)
    skipped = np.arange(len(split)) - np.repeat(np.cumsum(parts) - parts, parts)
    split[:, FIRST_PAIR] += skipped * tokens
    split[:, NUM_PAIRS] = np.minimum(split[:, NUM_PAIRS] - skipped * tokens, tokens)
    return np.ascontiguousarray(split.T)


def build_tables(
    calls: Sequence[MlpCall], restored: Sequence[np.ndarray | None], tokens: int
) -> StepTables:
    """Tables of calls whose inputs are consecutive within each row, one token each or more.

    `restored` is each call's mask, bool [T], None for no token; `tokens` the most pairs of a job.
    """
    builder = _Builder()
    counts = np.array([call.x_TH.shape[0] for call in calls])
    firsts = np.cumsum(counts) - counts
    num_restored = np.zeros_like(counts)
    y_rows = np.arange(counts.sum())
    for index, (call, mask) in enumerate(zip(calls, restored, strict=True)):
        first, count = int(firsts[index]), int(counts[index])
        if mask is not None:
            num_restored[index] = np.count_nonzero(mask)
            y_rows[first : first + count] = first + np.argsort(~mask, kind="stable")
        builder.add(call, first, count, int(num_restored[index]))
    starts = np.array([call.x_TH.data_ptr() for call in calls])
    row_bytes = np.array([call.x_TH.stride(0) * call.x_TH.element_size() for call in calls])
    in_call = y_rows - np.repeat(firsts, counts)
    pairs = np.repeat(np.array(builder.fields, np.int64), counts, axis=0).T
    place = np.arange(len(y_rows)) - np.repeat(firsts, counts)
    pairs[2::3, place >= np.repeat(num_restored, counts)] = 0
    return StepTables(
        x_addresses=np.repeat(starts, counts) + in_call * np.repeat(row_bytes, counts),
        y_rows=y_rows,
        pairs=pairs,
        lefts=np.array(builder.lefts, np.int64),
        gate_up=builder.launches(0, tokens),
        down=builder.launches(1, tokens),
        z_columns=builder.z_columns,
        ranked=(bool(pairs[2].any() or pairs[5].any()), bool(pairs[8].any())),
        has_down_bias=bool(pairs[6].any()),
        keep_alive=tuple(builder.kept),
    )
