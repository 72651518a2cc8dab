"""Random experts of a model's shape in host memory, as a source that the worker reads from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from benchmarks.gpu.matrices import FACTOR_BITS, random_expert, random_repair
from expert_store.format import codes_bytes, encode_codes, factors_bytes
from expert_store.types import (
    FORMAT_VERSION,
    PROJECTIONS,
    CodesForm,
    ExpertInfo,
    ExpertKey,
    ExpertShape,
    Manifest,
    ModelInfo,
    Recipe,
    RecordInfo,
    RecordRequest,
    RepairForm,
)

RANK = 16
REPAIR = RepairForm.of_letters(FACTOR_BITS, "affine", "gud")  # rank 16 for each projection
GAINS = (0.25, 0.25, 0.25)


@dataclass(frozen=True, slots=True)
class Layer:
    """The sizes of one MoE layer."""

    name: str
    hidden: int
    ffn: int
    experts: int
    top_k: int


MIXTRAL = Layer("Mixtral 8x7B", 4096, 14336, 8, 2)
SMALL = Layer("64 small experts", 2048, 1408, 64, 6)
TINY = Layer("tiny", 64, 128, 4, 2)


class HostSource:
    """`ExpertSource` over host memory: pageable, as a mapped store file is, or pinned.

    Layers 0 to `num_layers` - 1, all of one form: codes of `bits` bits, a compensator of rank 16.
    """

    tier = "host"

    def __init__(
        self,
        layer: Layer,
        device: str,
        *,
        bits: int,
        num_layers: int = 1,
        pinned: bool = False,
    ) -> None:
        self.shape = ExpertShape(layer.hidden, layer.ffn, "silu", has_bias=False)
        self.form = CodesForm.uniform(bits)
        self.manifest = _manifest(layer, self.shape, self.form, bits, num_layers)
        self._records: dict[tuple[ExpertKey, str], torch.Tensor] = {}
        for number, key in enumerate(self.manifest.experts):
            codes, factors = _random_records(layer, device, bits, seed=1 + 10 * number)
            for kind, data in (("codes", codes), ("factors", factors)):
                self._records[key, kind] = data.pin_memory() if pinned else data

    def fetch(self, requests: Sequence[RecordRequest]) -> list[torch.Tensor]:
        return [self._records[request.key, request.kind] for request in requests]

    def close(self) -> None:
        """Nothing is open."""


def _random_records(
    layer: Layer, device: str, bits: int, *, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and factors of one expert, in host memory."""
    mlp = random_expert(layer.hidden, layer.ffn, bits, device, seed=seed)
    added = random_repair(layer.hidden, layer.ffn, RANK, device, seed=seed)
    parts = [
        part.data
        for name in PROJECTIONS
        for part in (getattr(added, name).right(0), getattr(added, name).left_t(0))
    ]
    return encode_codes(mlp).cpu(), torch.cat(parts).cpu()


def _manifest(
    layer: Layer, shape: ExpertShape, form: CodesForm, bits: int, num_layers: int
) -> Manifest:
    keys = [ExpertKey(at, expert) for at in range(num_layers) for expert in range(layer.experts)]
    codes = RecordInfo("codes", 0, codes_bytes(shape, form), "0" * 64)
    factors = RecordInfo("factors", 0, factors_bytes(shape, REPAIR), "0" * 64)
    return Manifest(
        format_version=FORMAT_VERSION,
        version="gpu check",
        recipe=Recipe(
            name="paper",
            codec="tiles",
            bits=float(bits),
            grid="affine",
            factor_bits=FACTOR_BITS,
            factor_grid="affine",
            avg_rank=RANK,
            rank_ladder=(0, RANK),
            top_n=layer.top_k,
            seed=0,
        ),
        model=ModelInfo(
            name=layer.name,
            model_type="mixtral",
            num_layers=num_layers,
            top_k=layer.top_k,
            vocab_size=128,
            max_positions=256,
            expert=shape,
            moe_layers={at: f"model.layers.{at}.mlp.experts" for at in range(num_layers)},
            num_experts=dict.fromkeys(range(num_layers), layer.experts),
        ),
        experts={
            key: ExpertInfo(key, form, codes, factors, REPAIR, 3.0, 0.4, 0.2, GAINS) for key in keys
        },
        dense_files={},
        side_files={},
    )
