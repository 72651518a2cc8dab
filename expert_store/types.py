"""The nouns of the store: keys, requests, records, and the manifest that says what exists.

A manifest is enough to plan without reading a weight. Bytes <-> nouns is `expert_store/format.py`.

Legend: H hidden, F ffn.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

from expert_store.forms import (
    BLOCK_KINDS,
    CODECS,
    PROJECTIONS,
    BlockKind,
    Codec,
    CodesForm,
    Projection,
    RepairBlockSpec,
    RepairForm,
)
from kernels.types import GROUP_SIZE, Activation, GatedMLP, GatedRepair, Grid

__all__ = [
    "BLOCK_KINDS",
    "CODECS",
    "FORMAT_VERSION",
    "PROJECTIONS",
    "BlockKind",
    "Codec",
    "CodesForm",
    "Compensator",
    "ExpertCodes",
    "ExpertInfo",
    "ExpertKey",
    "ExpertOutputs",
    "ExpertShape",
    "ExpertTokens",
    "ExpertWeights",
    "Manifest",
    "ModelInfo",
    "Projection",
    "Recipe",
    "RecordInfo",
    "RecordKind",
    "RecordRequest",
    "RepairBlockSpec",
    "RepairForm",
]

FORMAT_VERSION = 2

RecordKind = Literal["codes", "factors"]


class ExpertKey(NamedTuple):
    """One routed expert: `layer` is the decoder layer's index in the model, `expert` its index
    there.

    A tuple, as `RecordRequest` is: both are looked up hundreds of times in a decode step, and a
    dataclass is hashed in Python.
    """

    layer: int
    expert: int

    def __str__(self) -> str:
        return f"layer {self.layer} expert {self.expert}"


class RecordRequest(NamedTuple):
    """A read of one record, or of the first `num_blocks` blocks of a factors record."""

    key: ExpertKey
    kind: RecordKind
    num_blocks: int | None = None

    def covers(self, other: RecordRequest) -> bool:
        """Whether the bytes of this read begin with those of `other`: the same record, as long or
        longer."""
        if (self.key, self.kind) != (other.key, other.kind):
            return False
        if self.num_blocks is None or other.num_blocks is None:
            return self.num_blocks is None
        return self.num_blocks >= other.num_blocks


@dataclass(frozen=True, slots=True)
class ExpertTokens:
    """The tokens that one expert is asked to run: row numbers into the call's hidden states.

    Where `restored` is true its compensator is applied, or the first `num_blocks` blocks of it.
    Without a restored row they are () and None, nothing else. Raises ValueError otherwise.
    """

    key: ExpertKey
    token_rows: tuple[int, ...]
    restored: tuple[bool, ...] = ()
    num_blocks: int | None = None

    def __post_init__(self) -> None:
        is_right = self.num_blocks is None or (bool(self.restored) and self.num_blocks >= 0)
        if self.restored:
            is_right &= len(self.restored) == len(self.token_rows) and any(self.restored)
        if not is_right:
            raise ValueError(
                f"restored of {self.key}: got {self.restored} with num_blocks {self.num_blocks} "
                f"for {len(self.token_rows)} token rows"
            )

    @property
    def num_restored(self) -> int:
        return sum(self.restored)


@dataclass(frozen=True, slots=True, eq=False)
class ExpertOutputs:
    """What experts made of their tokens, in the order asked; not weighted by the router.

    `degraded`: places in the work of experts whose restored rows ran from codes alone, as their
    compensators could not be had.
    """

    output_PH: torch.Tensor  # [P, H] on the CPU, in the dtype of the hidden states
    degraded: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class ExpertShape:
    """What every routed expert of a model has in common."""

    hidden: int
    ffn: int
    activation: Activation
    has_bias: bool

    def projection(self, name: Projection) -> tuple[int, int]:
        """(rows, cols) of one projection."""
        return (self.hidden, self.ffn) if name == "down" else (self.ffn, self.hidden)


@dataclass(frozen=True, slots=True)
class ExpertWeights:
    """One expert as the checkpoint holds it, in canonical [out, in] form, float32 on CPU."""

    key: ExpertKey
    gate: torch.Tensor  # [F, H]
    up: torch.Tensor  # [F, H]
    down: torch.Tensor  # [H, F]
    gate_bias: torch.Tensor | None = None  # [F]
    up_bias: torch.Tensor | None = None  # [F]
    down_bias: torch.Tensor | None = None  # [H]


@dataclass(frozen=True, slots=True)
class ExpertCodes:
    """The low-bit record of one expert."""

    key: ExpertKey
    mlp: GatedMLP
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Compensator:
    """What one expert's factors record adds to its codes, or a prefix of that record."""

    key: ExpertKey
    factors: GatedRepair
    num_bytes: int
    form: RepairForm

    def prefix(self, num_blocks: int) -> Compensator:
        """The same with only its first `num_blocks` blocks; views, nothing is copied.

        `num_bytes` stays that of what is held.
        """
        if num_blocks >= len(self.form.blocks):
            return self
        form = self.form.prefix(num_blocks)
        whole = self.factors
        factors = GatedRepair(
            gate=whole.gate.prefix(form.num_blocks("gate", "rank")),
            up=whole.up.prefix(form.num_blocks("up", "rank")),
            down=whole.down.prefix(form.num_blocks("down", "rank")),
            gate_planes=whole.gate_planes[: form.num_blocks("gate", "plane")],
            up_planes=whole.up_planes[: form.num_blocks("up", "plane")],
            down_planes=whole.down_planes[: form.num_blocks("down", "plane")],
        )
        return Compensator(self.key, factors, self.num_bytes, form)


@dataclass(frozen=True, slots=True)
class RecordInfo:
    """Where one record lies and what it must hash to."""

    file: str  # relative to the store
    offset: int  # bytes from the start of the file
    num_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class ExpertInfo:
    """What the manifest knows of one expert.

    `repair` names the blocks of the factors record in record order, which is falling order of what
    they repair per byte. `kurtosis` is of the original weights (a Gaussian has 3). `error` is the
    square root of the error energy of the codes alone over the energy of the weights,
    `restored_error` likewise with the whole compensator, `block_gains` the share of the codes'
    error energy that each block removes. The energies are weighted as the recipe's calibration
    says, plain (Frobenius) without one.
    """

    key: ExpertKey
    form: CodesForm
    codes: RecordInfo
    factors: RecordInfo | None
    repair: RepairForm
    kurtosis: float
    error: float
    restored_error: float
    block_gains: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.block_gains) != len(self.repair.blocks):
            raise ValueError(
                f"block_gains of {self.key}: got {len(self.block_gains)}, expected one for each of "
                f"{len(self.repair.blocks)} blocks"
            )

    def prefix_error(self, num_blocks: int) -> float:
        """The error with the first `num_blocks` blocks; the gains' sum, so no weight is read."""
        left = 1.0 - sum(self.block_gains[:num_blocks])
        return self.error * math.sqrt(max(0.0, left))


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """The model the experts were taken from, as far as planning needs it."""

    name: str
    model_type: str
    num_layers: int
    top_k: int
    vocab_size: int
    max_positions: int
    expert: ExpertShape
    moe_layers: Mapping[int, str]  # layer index -> module path of its experts in the model
    num_experts: Mapping[int, int]  # layer index -> number of routed experts


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a store was made; enough to make it again."""

    name: str  # "paper", "static", "original", ...: see `expert_store/config.py`
    codec: Codec
    bits: float  # mean code bits, nominal: scales and zeros not counted; 16 is bfloat16
    grid: Grid
    factor_bits: int
    factor_grid: Grid
    avg_rank: int
    rank_ladder: tuple[int, ...]
    top_n: int  # how many of a token's experts are restored at run time, unless told otherwise
    seed: int
    budget: float | None = None  # bits per expert weight moved, all that a token moves counted
    calibration: str | None = None  # id of the statistics that weighted the errors
    error_bound: str | None = None  # of an error-bounded codec
    group_size: int = GROUP_SIZE  # of the codes

    @property
    def is_original(self) -> bool:
        """Whether the experts are the checkpoint's own bfloat16."""
        return self.codec == "tiles" and self.bits == 16


@dataclass(frozen=True, slots=True)
class Manifest:
    """Everything about a store but its weights."""

    format_version: int
    version: str  # content id of the store: differs when any record differs
    recipe: Recipe
    model: ModelInfo
    experts: Mapping[ExpertKey, ExpertInfo]
    dense_files: Mapping[str, str]  # file name -> sha256
    side_files: Mapping[str, str]  # likewise config.json, tokenizer files, index of the dense files

    def record(self, request: RecordRequest) -> RecordInfo | None:
        """Info of the whole record asked for; None when the expert has no factors. KeyError if
        unknown."""
        info = self.experts[request.key]
        return info.codes if request.kind == "codes" else info.factors
