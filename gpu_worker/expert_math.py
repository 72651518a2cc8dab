"""What a record becomes on the device, and what an expert makes of its rows: the kernels' part.

Knows no cache, no plan and no transport. A replay (`gpu_worker/replay.py`) puts nothing in its
place.

Legend: P pairs of one expert, H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from expert_store.format import decode_on_host, device_form, parse_codes, parse_factors
from expert_store.types import Compensator, ExpertCodes, Manifest, RecordRequest
from kernels import ops
from kernels.types import MlpCall

Record = ExpertCodes | Compensator


@dataclass(frozen=True, slots=True)
class ExpertCall:
    """One expert on its rows, with its factors, if any, where `restored_P` is true."""

    hidden_PH: torch.Tensor
    codes: ExpertCodes
    factors: Compensator | None
    restored_P: torch.Tensor | None  # [P] bool


class ExpertMath(Protocol):
    """From bytes to a record, and from a record and rows to rows."""

    def decode_on_host(self, request: RecordRequest, data: torch.Tensor) -> torch.Tensor:
        """Fetched bytes as they go to the device; called by the threads that fetch.

        Raises a StoreError when they cannot be decoded.
        """
        ...

    def parse(self, request: RecordRequest, data: torch.Tensor) -> Record:
        """The record in `data` (uint8, on the device). Raises a StoreError when it is none.

        `data` is what `decode_on_host` gave.
        """
        ...

    def run(self, calls: Sequence[ExpertCall]) -> list[torch.Tensor]:
        """[P, H] float32 for each call."""
        ...


class KernelMath:
    """The real thing: records as the kernels read them, run by one backend."""

    def __init__(self, manifest: Manifest, backend: ops.Backend) -> None:
        self._manifest = manifest
        self._backend = backend

    def decode_on_host(self, request: RecordRequest, data: torch.Tensor) -> torch.Tensor:
        if request.kind == "factors":
            return data
        info, shape = self._manifest.experts[request.key], self._manifest.model.expert
        return decode_on_host(request.key, data, shape, info.form)

    def parse(self, request: RecordRequest, data: torch.Tensor) -> Record:
        info, shape = self._manifest.experts[request.key], self._manifest.model.expert
        if request.kind == "codes":
            return parse_codes(request.key, data, shape, device_form(info.form))
        repair = info.repair
        if request.num_blocks is not None:
            repair = repair.prefix(request.num_blocks)
        return parse_factors(request.key, data, shape, repair)

    def run(self, calls: Sequence[ExpertCall]) -> list[torch.Tensor]:
        return ops.gated_mlp_many(
            [
                MlpCall(
                    call.hidden_PH,
                    call.codes.mlp,
                    None if call.factors is None else call.factors.factors,
                    call.restored_P,
                )
                for call in calls
            ],
            backend=self._backend,
            num_threads=torch.get_num_threads(),
        )
