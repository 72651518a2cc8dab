"""Runs experts where their bytes are: codes and factors straight from a mapped segment, no copies.

Owns the parsed views of experts. Knows no network and no router weights.

Legend: T tokens of the call, P (expert, token) pairs, H hidden.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch

from expert_store.errors import StoreError
from expert_store.format import device_form, parse_codes, parse_factors
from expert_store.types import ExpertKey, ExpertOutputs, ExpertTokens, Manifest, RecordRequest
from expert_store.warnings_told import WarningsTold
from kernels.ops import Backend, gated_mlp_many
from kernels.types import GatedMLP, GatedRepair, MlpCall

logger = logging.getLogger(__name__)

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class RecordSource(Protocol):
    """Where records come from; a `Segment`, so that they are views of mapped pages."""

    @property
    def manifest(self) -> Manifest: ...

    def fetch(self, requests: Sequence[RecordRequest]) -> list[torch.Tensor]: ...


class Executor:
    """Runs the experts of a source on the CPU, restored where asked. Thread-safe: one batch
    computes at a time, on `num_threads` threads, so that concurrent callers do not fight for the
    cores.
    """

    def __init__(
        self, source: RecordSource, *, num_threads: int = 1, backend: Backend = "cpu_int8"
    ) -> None:
        if num_threads < 1:
            raise ValueError(f"num_threads: got {num_threads}, expected at least 1")
        self._source = source
        self._num_threads = num_threads
        self._backend = backend
        self._experts: dict[ExpertKey, GatedMLP] = {}
        # Of each expert the prefix that was asked for last: which one it is seldom changes.
        self._repairs: dict[ExpertKey, tuple[int | None, GatedRepair]] = {}
        self._told = WarningsTold(logger, time.monotonic)
        self._stale: deque[ExpertKey] = deque()
        self._lock = threading.Lock()
        self.busy_s = 0.0  # time spent in calls, since the start

    @property
    def manifest(self) -> Manifest:
        """That of the source."""
        return self._source.manifest

    def run(self, hidden_TH: torch.Tensor, work: Sequence[ExpertTokens]) -> ExpertOutputs:
        """Outputs [P, H] of each expert on its rows of hidden_TH, in the order of `work`.

        hidden_TH is a CPU tensor, float32, bfloat16 or float16; the outputs are accumulated in
        float32. An expert whose factors cannot be read runs from codes alone and is named in
        `degraded`. Raises ValueError for rows, shapes, dtypes, experts or blocks that do not exist,
        a StoreError when codes cannot be read.

        A pure function of its arguments and of the store: nothing of a call is kept but parsed
        records, so that a call may be repeated and gives the same bits.
        """
        check_work(hidden_TH, work, self.manifest.model.expert.hidden)
        with self._lock, self._busy():
            while self._stale:
                key = self._stale.popleft()
                self._experts.pop(key, None)
                self._repairs.pop(key, None)
            experts = self._parsed([item.key for item in work])
            repairs = [self._repair(item) for item in work]
            calls = [
                MlpCall(hidden_TH[list(item.token_rows)], experts[item.key], repair, _mask(item))
                for item, repair in zip(work, repairs, strict=True)
                if item.token_rows
            ]
            outputs = gated_mlp_many(calls, backend=self._backend, num_threads=self._num_threads)
        output_PH = hidden_TH.new_empty(0, hidden_TH.shape[1])
        if outputs:
            output_PH = torch.cat(outputs).to(hidden_TH.dtype)
        degraded = [
            place
            for place, (item, repair) in enumerate(zip(work, repairs, strict=True))
            if item.restored and repair is None
        ]
        return ExpertOutputs(output_PH, tuple(degraded))

    def forget(self, key: ExpertKey) -> None:
        """The next call reads this expert's records anew: they were damaged, or are repaired.

        Takes no lock: a call of `run` may be what found the damage.
        """
        self._stale.append(key)

    @contextmanager
    def _busy(self) -> Iterator[None]:
        began_s = time.monotonic()
        try:
            yield
        finally:
            self.busy_s += time.monotonic() - began_s

    def _parsed(self, keys: Sequence[ExpertKey]) -> dict[ExpertKey, GatedMLP]:
        """The experts, views that are kept; what had to be decoded (sz3) is not, it would fill the
        memory."""
        missing = [key for key in dict.fromkeys(keys) if key not in self._experts]
        records = self._source.fetch([RecordRequest(key, "codes") for key in missing])
        experts = {key: self._experts[key] for key in keys if key in self._experts}
        for key, data in zip(missing, records, strict=True):
            form = self.manifest.experts[key].form
            codes = parse_codes(key, data, self.manifest.model.expert, form)
            experts[key] = codes.mlp
            if form == device_form(form):
                self._experts[key] = codes.mlp
        return experts

    def _repair(self, item: ExpertTokens) -> GatedRepair | None:
        """The blocks asked for; None when there is no restored row, or the record is lost."""
        if not item.restored:
            return None
        num_blocks, repair = self._repairs.get(item.key, (None, None))
        if repair is not None and num_blocks == item.num_blocks:
            return repair
        request = RecordRequest(item.key, "factors", item.num_blocks)
        try:
            (data,) = self._source.fetch([request])
            form = self.manifest.experts[item.key].repair
            if item.num_blocks is not None:
                form = form.prefix(item.num_blocks)
            shape = self.manifest.model.expert
            repair = parse_factors(item.key, data, shape, form).factors
        except StoreError as error:
            self._told.warn(item.key, "%s runs from codes alone: %s", item.key, error)
            return None
        self._repairs[item.key] = (item.num_blocks, repair)
        return repair


def _mask(item: ExpertTokens) -> torch.Tensor | None:
    """Which rows the repair is for; None means all of them."""
    return None if all(item.restored) else torch.tensor(item.restored)


def check_work(hidden_TH: torch.Tensor, work: Sequence[ExpertTokens], hidden: int) -> None:
    """Raise ValueError unless the batch is one layer's, with rows that hidden_TH has."""
    if hidden_TH.dim() != 2 or hidden_TH.shape[1] != hidden:
        raise ValueError(f"hidden states: expected [T, {hidden}], got {tuple(hidden_TH.shape)}")
    if hidden_TH.dtype not in FLOAT_DTYPES:
        raise ValueError(
            f"hidden states: got {hidden_TH.dtype}, expected one of "
            f"{', '.join(str(dtype) for dtype in FLOAT_DTYPES)}"
        )
    layers = sorted({item.key.layer for item in work})
    if len(layers) > 1:
        raise ValueError(f"work: layers {layers} in one call; send one call per layer")
    num_tokens = hidden_TH.shape[0]
    for item in work:
        bad = [row for row in item.token_rows if not 0 <= row < num_tokens]
        if bad:
            raise ValueError(
                f"token_rows of {item.key}: row {bad[0]} of {num_tokens} hidden states; rows are "
                f"0 to {num_tokens - 1}"
            )
