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

from kernels.triton_decode import JOB_FIELDS, Form
from kernels.triton_gate import PAIR_FIELDS
from kernels.types import TILE_ROWS, LowRank, MlpCall, QuantizedMatrix, left_offset, tiles_bytes

PROJECTION_NAMES = ("gate", "up", "down")
KERNEL_ALIGNMENT = 16
"""Bytes: what the kernels' copies need. Records and rank blocks start at multiples of 64."""
NO_ROWS = np.zeros(0, np.int64)
Jobs = dict[Form, list[tuple[int, ...]]]
"""Jobs by form, each a tuple of JOB_FIELDS."""

Kind = Literal["codes", "planes", "rights"]


@dataclass(frozen=True, slots=True)
class RowsLaunch:
    """One launch: matrices of one form, by the inputs of their pairs."""

    form: Form
    jobs: np.ndarray  # [JOB_FIELDS, J] int64
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
    """Collects a step's tables, call by call."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        self.codes: list[Jobs] = [defaultdict(list), defaultdict(list)]
        self.planes: list[list[Jobs]] = [[], []]
        self.rights: list[Jobs] = [defaultdict(list), defaultdict(list)]
        self.lefts: list[np.ndarray] = [NO_ROWS]
        self.num_lefts = 0
        self.z_columns = 0
        self.pairs: list[np.ndarray] = []
        self.kept: list[torch.Tensor] = []

    def add(self, call: MlpCall, first_pair: int, num_restored: int) -> None:
        """One call, its pairs from `first_pair` on, the first `num_restored` of them restored."""
        num_pairs, repair = call.x_TH.shape[0], call.repair
        fields = np.zeros((PAIR_FIELDS, num_pairs), np.int64)
        z_column = 0
        for index, name in enumerate(PROJECTION_NAMES):
            matrix: QuantizedMatrix = getattr(call.mlp, name)
            bias = getattr(call.mlp, f"{name}_bias")
            stage, column = index // 2, matrix.rows * (index % 2)
            address = self._matrix(matrix)
            self._jobs(self.codes[stage], matrix, address, column, first_pair, num_pairs)
            fields[3 * index] = 0 if bias is None else self._contiguous(bias)
            if repair is None or not num_restored:
                continue
            for turn, plane in enumerate(getattr(repair, f"{name}_planes")):
                if turn == len(self.planes[stage]):
                    self.planes[stage].append(defaultdict(list))
                jobs, address = self.planes[stage][turn], self._matrix(plane)
                self._jobs(jobs, plane, address, column, first_pair, num_restored)
            low_rank: LowRank = getattr(repair, name)
            z_column = 0 if stage else z_column
            fields[3 * index + 1] = self.num_lefts
            fields[3 * index + 2, :num_restored] = len(low_rank.block_offsets)
            self._ranks(self.rights[stage], low_rank, z_column, first_pair, num_restored)
            z_column += low_rank.rank
            self.z_columns = max(self.z_columns, z_column)
        self.pairs.append(fields)

    def _matrix(self, matrix: QuantizedMatrix) -> int:
        """The address of its bytes, aligned; of a copy where they are not."""
        address = matrix.data.data_ptr()
        if address % KERNEL_ALIGNMENT or not matrix.data.is_contiguous():
            self.kept.append(matrix.data.clone(memory_format=torch.contiguous_format))
            address = self.kept[-1].data_ptr()
        return address

    def _contiguous(self, bias: torch.Tensor) -> int:
        self.kept.append(bias.contiguous())
        return self.kept[-1].data_ptr()

    def _jobs(
        self,
        jobs: Jobs,
        matrix: QuantizedMatrix,
        address: int,
        column: int,
        first: int,
        count: int,
    ) -> None:
        """Jobs of `matrix` for a run of pairs, `tokens` at a time."""
        scales = address + tiles_bytes(matrix.rows, matrix.cols, matrix.bits, matrix.grid)
        table = jobs[Form(matrix.bits, matrix.grid)]
        for start in range(0, count, self.tokens):
            table.append((address, scales, column, first + start, min(self.tokens, count - start)))

    def _ranks(self, jobs: Jobs, low_rank: LowRank, column: int, first: int, count: int) -> None:
        """Jobs of the right factors of all rank blocks, and the addresses of the left ones."""
        num_blocks = len(low_rank.block_offsets)
        if not num_blocks:
            return
        cols, bits, grid = low_rank.cols, low_rank.bits, low_rank.grid
        start = low_rank.data.data_ptr()
        offsets = np.array(low_rank.block_offsets, np.int64)
        if ((start + offsets) % KERNEL_ALIGNMENT).any() or not low_rank.data.is_contiguous():
            start, offsets = self._aligned_blocks(low_rank)
        addresses = start + offsets
        self.lefts.append(addresses + left_offset(cols, bits, grid))
        self.num_lefts += num_blocks
        scales = tiles_bytes(TILE_ROWS, cols, bits, grid)
        table = jobs[Form(bits, grid)]
        for at in range(0, count, self.tokens):
            length = min(self.tokens, count - at)
            for block, address in enumerate(addresses.tolist()):
                place = column + TILE_ROWS * block
                table.append((address, address + scales, place, first + at, length))

    def _aligned_blocks(self, low_rank: LowRank) -> tuple[int, np.ndarray]:
        """The same blocks in a copy, each where the kernels can read it: address and offsets."""
        start = left_offset(low_rank.cols, low_rank.bits, low_rank.grid)
        size = start + left_offset(low_rank.rows, low_rank.bits, low_rank.grid)
        copy = low_rank.data.new_zeros(size * len(low_rank.block_offsets))
        for block in range(len(low_rank.block_offsets)):
            right, left = low_rank.right(block).data, low_rank.left_t(block).data
            at = block * size
            copy[at : at + right.numel()] = right
            copy[at + start : at + start + left.numel()] = left
        self.kept.append(copy)
        return copy.data_ptr(), np.arange(len(low_rank.block_offsets), dtype=np.int64) * size

    def launches(self, stage: int) -> tuple[RowsLaunch, ...]:
        """Codes first; then plane 0 of every matrix, plane 1, ...; right factors."""
        turns: list[tuple[Kind, Jobs]] = [("codes", self.codes[stage])]
        turns += [("planes", turn) for turn in self.planes[stage]]
        turns += [("rights", self.rights[stage])]
        return tuple(
            RowsLaunch(form, np.array(table, np.int64).reshape(-1, JOB_FIELDS).T, of)
            for of, jobs in turns
            for form, table in jobs.items()
        )


def build_tables(
    calls: Sequence[MlpCall], restored: Sequence[np.ndarray], tokens: int
) -> StepTables:
    """Tables of calls whose x rows are consecutive in memory; each has at least one token.

    `restored` is each call's mask, bool [T]; `tokens` the most pairs of a job.
    """
    builder = _Builder(tokens)
    x_addresses, y_rows, first_pair = [], [], 0
    for call, mask in zip(calls, restored, strict=True):
        num_pairs = call.x_TH.shape[0]
        num_restored = int(np.count_nonzero(mask))
        builder.add(call, first_pair, num_restored)
        order = np.arange(num_pairs)
        if 0 < num_restored < num_pairs:
            order = np.argsort(~mask, kind="stable")
        row_bytes = call.x_TH.stride(0) * call.x_TH.element_size()
        x_addresses.append(call.x_TH.data_ptr() + order * row_bytes)
        y_rows.append(first_pair + order)
        first_pair += num_pairs
    pairs = np.concatenate(builder.pairs, axis=1)
    return StepTables(
        x_addresses=np.concatenate(x_addresses),
        y_rows=np.concatenate(y_rows),
        pairs=pairs,
        lefts=np.concatenate(builder.lefts),
        gate_up=builder.launches(0),
        down=builder.launches(1),
        z_columns=builder.z_columns,
        ranked=(bool(pairs[2].any() or pairs[5].any()), bool(pairs[8].any())),
        has_down_bias=bool(pairs[6].any()),
        keep_alive=tuple(builder.kept),
    )
