"""The nouns of the store: keys, requests, records, and the manifest that says what exists.

A manifest is enough to plan without reading a weight. Bytes <-> nouns is `expert_store/format.py`.

Legend: H hidden, F ffn.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from kernels.types import Activation, GatedMLP, GatedRepair

FORMAT_VERSION = 1

Projection = Literal["gate", "up", "down"]
PROJECTIONS: tuple[Projection, ...] = ("gate", "up", "down")
RecordKind = Literal["codes", "factors"]


@dataclass(frozen=True, slots=True, order=True)
class ExpertKey:
    """One routed expert: `layer` is the decoder layer's index in the model, `expert` its index
    there."""

    layer: int
    expert: int

    def __str__(self) -> str:
        return f"layer {self.layer} expert {self.expert}"


@dataclass(frozen=True, slots=True)
class RecordRequest:
    """A read of one record, or of the first `num_blocks` rank blocks of a factors record."""

    key: ExpertKey
    kind: RecordKind
    num_blocks: int | None = None


@dataclass(frozen=True, slots=True)
class ExpertTokens:
    """The tokens that one expert is asked to run: row numbers into the call's hidden states."""

    key: ExpertKey
    token_rows: tuple[int, ...]


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
    """The low-rank record of one expert, or a prefix of it."""

    key: ExpertKey
    factors: GatedRepair
    num_bytes: int


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

    `blocks` names the projection each rank block of the factors record belongs to, in record
    order, which
    is falling order of what it repairs. `kurtosis` is of the original weights (a Gaussian has 3),
    `error`
    the relative Frobenius error of the codes alone, `restored_error` with the whole compensator.
    """

    key: ExpertKey
    bits: int
    codes: RecordInfo
    factors: RecordInfo | None
    blocks: tuple[Projection, ...]
    kurtosis: float
    error: float
    restored_error: float

    def rank(self, projection: Projection) -> int:
        return 16 * self.blocks.count(projection)


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

    name: str  # "paper" | "static" | "original"
    bits: int
    group_size: int
    factor_bits: int
    avg_rank: int
    rank_ladder: tuple[int, ...]
    top_n: int  # how many of a token's experts are restored at run time, unless told otherwise
    seed: int


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
