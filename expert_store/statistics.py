"""What a calibration holds, as nouns: statistics of one layer's experts and of one expert.

Tensors and tables; how they are written is `expert_store/calibration_file.py`.

Legend: E experts, K top-k, H hidden, F ffn, G groups of 64.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from expert_store.matrix.moments import Moment
from expert_store.types import ExpertShape, ModelInfo
from kernels.types import GROUP_SIZE

MomentForm = Literal["full", "blocks"]
"""full: [size, size]. blocks: its diagonal blocks [size/64, 64, 64], one per group of inputs."""

MAX_FULL_SIZE = 2048
FULL_MOMENT_BYTES = 2 << 30
"""Limit on the full moments of all experts of a model; what does not fit is kept as blocks."""


@dataclass(frozen=True, slots=True)
class MomentForms:
    """Which moments are kept in full: a layer's pooled inputs, an expert's inputs, its middle."""

    pooled: MomentForm
    input: MomentForm
    middle: MomentForm

    @staticmethod
    def of(model: ModelInfo, full_bytes: int = FULL_MOMENT_BYTES) -> MomentForms:
        """Full where the size is at most 2048 and all experts' fit into `full_bytes` together.

        Inputs come first: two of three matrices read them.
        """
        num_experts = sum(model.num_experts.values())
        hidden, ffn = model.expert.hidden, model.expert.ffn
        left, forms = full_bytes, dict[int, MomentForm]()
        for index, size in enumerate((hidden, ffn)):
            need = num_experts * moment_bytes(size, "full")
            fits = size <= MAX_FULL_SIZE and need <= left
            forms[index] = "full" if fits else "blocks"
            left -= need if fits else 0
        pooled: MomentForm = "full" if hidden <= MAX_FULL_SIZE else "blocks"
        return MomentForms(pooled, forms[0], forms[1])


def moment_bytes(size: int, form: MomentForm) -> int:
    """Bytes of one moment in memory; a full one takes half of that in the file."""
    return 4 * size * (size if form == "full" else GROUP_SIZE)


@dataclass(frozen=True, slots=True)
class LayerTable:
    """One MoE layer's routing and energies. Position 0 is a token's largest router weight.

    Means of squares are over tokens by importance: by what an error there costs, 1 on average.
    """

    num_tokens: int
    tokens_E: tuple[int, ...]  # tokens that the router sent to each expert
    use_at_EK: tuple[tuple[float, ...], ...]  # share of the layer's tokens, by position
    weight2_at_EK: tuple[tuple[float, ...], ...]  # mean squared router weight there; 0 if unused
    expert_energy_E: tuple[float, ...]  # mean squared norm of an expert's own output; 0 if unused
    skew_K: tuple[float, ...]  # mean share of a token's router weight, by position; sums to 1
    output_energy: float  # mean squared norm of the layer's MoE output

    @property
    def num_experts(self) -> int:
        return len(self.tokens_E)


@dataclass(frozen=True, slots=True)
class LayerTensors:
    """One MoE layer's moments and row weights: means over tokens by importance, float32 on CPU.

    `sample_*` are over a sample of the layer's tokens that every expert was shown, routed to it or
    not: what an expert that saw few tokens of its own leans on. An expert without tokens has zeros
    in the others.
    """

    pooled: torch.Tensor  # moment of the layer's inputs
    input_E: torch.Tensor  # [E, ...] moments of each expert's inputs
    middle_E: torch.Tensor  # [E, ...] of what its down reads
    gate_weight_EF: torch.Tensor  # see ExpertStatistics
    up_weight_EF: torch.Tensor
    sample_middle_EF: torch.Tensor  # diagonal of the middle's moment
    sample_gate_weight_EF: torch.Tensor
    sample_up_weight_EF: torch.Tensor


@dataclass(frozen=True, slots=True)
class LayerStatistics:
    """One MoE layer, whole; `nats` of KL per token that an error with as much energy as its output
    would cost at every token, if errors were small."""

    table: LayerTable
    tensors: LayerTensors
    nats: float


@dataclass(frozen=True, slots=True)
class ExpertStatistics:
    """What one expert really sees, and what an error in it costs.

    To second order, an error (dG, dU, dD) of its matrices moves its output by the mean squared norm
    sum_f gate_weight[f] (dG R dG^T)[f,f] + sum_f up_weight[f] (dU R dU^T)[f,f] + tr(dD M dD^T),
    R = moment_in, M = moment_mid: gate_weight[f] is ||down[:,f]||^2 E[(act'(g_f) u_f)^2],
    up_weight[f] is ||down[:,f]||^2 E[act(g_f)^2]. In the layer's output that counts
    `use_weight2` times: once per token that uses the expert, times its squared router weight.

    Moments and row weights are shrunk to those of the layer's tokens by `num_tokens`.
    """

    moment_in: Moment  # [H]
    moment_mid: Moment  # [F]
    gate_weight_F: torch.Tensor  # float32
    up_weight_F: torch.Tensor  # float32
    num_tokens: int  # tokens of the calibration text that reached this expert
    use: float  # share of the layer's tokens that use it
    use_at_K: tuple[float, ...]  # share of tokens of which it is the i-th largest
    weight2_at_K: tuple[float, ...]  # mean squared router weight there; 0 where unused
    output_energy: float  # mean squared norm of its own output; 0 if unused

    @property
    def use_weight2(self) -> float:
        """Mean over the layer's tokens of its squared router weight, 0 where it is not used."""
        pairs = zip(self.use_at_K, self.weight2_at_K, strict=True)
        return sum(use * weight2 for use, weight2 in pairs)


@dataclass(frozen=True, slots=True)
class CalibratedModel:
    """The model that a calibration was taken from."""

    name: str
    model_type: str
    top_k: int
    expert: ExpertShape
    num_experts: Mapping[int, int]  # layer -> routed experts

    @staticmethod
    def of(model: ModelInfo) -> CalibratedModel:
        return CalibratedModel(
            model.name, model.model_type, model.top_k, model.expert, dict(model.num_experts)
        )


@dataclass(frozen=True, slots=True)
class TextInfo:
    """A text that tokens were taken from."""

    name: str
    num_tokens: int  # taken
    sha256: str  # of the whole text, UTF-8


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """What a small error in each layer's MoE output costs, from gradients (`gpu_worker/calibrate`).

    `layers` are nats of KL per token, per unit of relative energy: of an error with as much energy
    as the output has, at every token.
    """

    num_tokens: int
    layers: Mapping[int, float]


@dataclass(frozen=True, slots=True)
class CalibrationInfo:
    """Everything about a calibration but its tensors."""

    model: CalibratedModel
    texts: tuple[TextInfo, ...]
    asked_tokens: int
    num_tokens: int
    window_tokens: int
    seed: int
    forms: MomentForms
    alike: bool  # every token counted the same, not by what an error costs there
    tables: Mapping[int, LayerTable]
    sensitivity: Sensitivity | None
