"""Running sums of what the experts of one layer see and make: the statistics of a calibration.

Pure: rows in, means out. Every token counts by its importance: nats of KL that a unit of squared
error in the layer's output costs there. Knows no store, no router's code and no file.

Legend: T token rows, P rows of one expert, K top-k, E experts, H hidden, F ffn, G groups of 64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from expert_store.statistics import (
    LayerStatistics,
    LayerTable,
    LayerTensors,
    MomentForm,
    MomentForms,
)
from expert_store.types import ExpertShape
from kernels.activations import apply_gate
from kernels.types import GROUP_SIZE, Activation


@dataclass(frozen=True, slots=True)
class ExpertMatrices:
    """One expert's weights, float32, [out, in]; its biases where the family has them."""

    gate_FH: torch.Tensor
    up_FH: torch.Tensor
    down_HF: torch.Tensor
    activation: Activation
    gate_bias_F: torch.Tensor | None = None
    up_bias_F: torch.Tensor | None = None
    down_bias_H: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class Passage:
    """What some rows become inside one expert, float32 on the rows' device."""

    input_PH: torch.Tensor
    middle_PF: torch.Tensor  # act(gate x) * up x: what down reads
    gate_slope_PF: torch.Tensor  # how much the middle moves with the gate's output
    up_slope_PF: torch.Tensor  # how much with up's
    output_PH: torch.Tensor  # not weighted by the router


def expert_output(expert: ExpertMatrices, hidden_PH: torch.Tensor) -> torch.Tensor:
    """Rows through one expert, [P, H] float32."""
    gate_PF, up_PF = _gate_and_up(expert, hidden_PH.float())
    middle_PF = apply_gate(expert.activation, gate_PF, up_PF)
    return torch.nn.functional.linear(middle_PF, expert.down_HF, expert.down_bias_H)


def run_expert(expert: ExpertMatrices, hidden_PH: torch.Tensor) -> Passage:
    """Rows through one expert, keeping what lies between. Slopes are exact, for any activation."""
    input_PH = hidden_PH.float()
    gate_PF, up_PF = _gate_and_up(expert, input_PH)
    # Element by element, so that the gradient of the sum is every element's own derivative. A model
    # runs in inference mode, whose tensors autograd refuses: hence the copies.
    with torch.inference_mode(mode=False), torch.enable_grad():
        gate_PF, up_PF = gate_PF.clone().requires_grad_(), up_PF.clone().requires_grad_()
        middle_PF = apply_gate(expert.activation, gate_PF, up_PF)
        gate_slope_PF, up_slope_PF = torch.autograd.grad(middle_PF.sum(), (gate_PF, up_PF))
    middle_PF = middle_PF.detach()
    output_PH = torch.nn.functional.linear(middle_PF, expert.down_HF, expert.down_bias_H)
    return Passage(input_PH, middle_PF, gate_slope_PF, up_slope_PF, output_PH)


def input_gradient(
    expert: ExpertMatrices, passage: Passage, gradient_PH: torch.Tensor
) -> torch.Tensor:
    """The gradient of an expert's input rows, [P, H], from that of its output rows."""
    middle_PF = gradient_PH @ expert.down_HF
    gate_PH = (middle_PF * passage.gate_slope_PF) @ expert.gate_FH
    return gate_PH + (middle_PF * passage.up_slope_PF) @ expert.up_FH


def _gate_and_up(
    expert: ExpertMatrices, input_PH: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    linear = torch.nn.functional.linear
    gate_PF = linear(input_PH, expert.gate_FH, expert.gate_bias_F)
    return gate_PF, linear(input_PH, expert.up_FH, expert.up_bias_F)


class LayerSums:
    """Sums over the tokens that reached one layer. Float32 on the CPU, whatever the rows' device.

    Size: that of the layer's part of the file (`expert_store/calibration.py`).
    """

    def __init__(
        self, *, shape: ExpertShape, num_experts: int, top_k: int, forms: MomentForms
    ) -> None:
        self._forms = forms
        self._num_tokens = 0
        self._importance = self._nats = 0.0
        self._importance_E = torch.zeros(num_experts, dtype=torch.float64)
        self._pooled = _zero_moment(shape.hidden, forms.pooled)
        self._input_E = _zero_moment(shape.hidden, forms.input, num_experts)
        self._middle_E = _zero_moment(shape.ffn, forms.middle, num_experts)
        self._gate_slope_EF = torch.zeros(num_experts, shape.ffn)
        self._up_slope_EF = torch.zeros(num_experts, shape.ffn)
        self._tokens_E = torch.zeros(num_experts, dtype=torch.int64)
        self._output_energy_E = torch.zeros(num_experts, dtype=torch.float64)
        # What an expert makes of a sample of the layer's tokens, whoever they were routed to.
        self._sample_importance_E = torch.zeros(num_experts, dtype=torch.float64)
        self._sample_middle_EF = torch.zeros(num_experts, shape.ffn)
        self._sample_gate_slope_EF = torch.zeros(num_experts, shape.ffn)
        self._sample_up_slope_EF = torch.zeros(num_experts, shape.ffn)
        self._down_energy_EF = torch.zeros(num_experts, shape.ffn)
        self._use_EK = torch.zeros(num_experts, top_k, dtype=torch.int64)
        self._weight2_EK = torch.zeros(num_experts, top_k, dtype=torch.float64)
        self._skew_K = torch.zeros(top_k, dtype=torch.float64)
        self._output_energy = 0.0

    def add_tokens(
        self,
        hidden_TH: torch.Tensor,
        topk_ids_TK: torch.Tensor,
        topk_weights_TK: torch.Tensor,
        output_TH: torch.Tensor,
        importance_T: torch.Tensor,
        nats_T: torch.Tensor,
    ) -> None:
        """Every token once: the pool of inputs, the router's choices, the layer's own output.

        How often an expert is used, and the router's skew, count every token alike. `nats_T` is
        what a unit of squared error costs, for the layer as a whole.

        Positions within a token count sizes of router weights, as restoring does
        (`gpu_worker/routing.py`): position 0 is the largest, of equal ones the earlier column.
        """
        weights_TK = topk_weights_TK.to("cpu", torch.float64).abs()
        order_TK = weights_TK.argsort(dim=1, descending=True, stable=True)
        weights_TK = weights_TK.gather(1, order_TK)
        ids_TK = topk_ids_TK.to("cpu", torch.int64).gather(1, order_TK)
        self._num_tokens += ids_TK.shape[0]
        self._importance += float(importance_T.double().sum())
        self._pooled += _moment_sum(hidden_TH.float(), importance_T, self._forms.pooled)
        self._use_EK.scatter_add_(0, ids_TK, torch.ones_like(ids_TK))
        importance_T1 = importance_T.to("cpu", torch.float64)[:, None]
        self._weight2_EK.scatter_add_(0, ids_TK, importance_T1 * weights_TK.square())
        # A token whose weights are all zero has no skew; it counts as one with equal weights.
        total_T1 = weights_TK.sum(dim=1, keepdim=True)
        share_TK = torch.where(total_T1 > 0, weights_TK / total_T1, 1 / weights_TK.shape[1])
        self._skew_K += share_TK.sum(dim=0)
        energy_T = output_TH.double().square().sum(dim=1)
        self._nats += float(nats_T.double() @ energy_T)
        self._output_energy += float(importance_T.double() @ energy_T)

    def add_expert(self, expert: int, passage: Passage, importance_P: torch.Tensor) -> None:
        """The rows that the router sent to one expert."""
        self._tokens_E[expert] += passage.input_PH.shape[0]
        self._importance_E[expert] += float(importance_P.double().sum())
        self._input_E[expert] += _moment_sum(passage.input_PH, importance_P, self._forms.input)
        self._middle_E[expert] += _moment_sum(passage.middle_PF, importance_P, self._forms.middle)
        self._gate_slope_EF[expert] += _energies(passage.gate_slope_PF, importance_P)
        self._up_slope_EF[expert] += _energies(passage.up_slope_PF, importance_P)
        self._output_energy_E[expert] += float(_energies(passage.output_PH, importance_P).sum())

    def add_sample(
        self,
        expert: int,
        matrices: ExpertMatrices,
        passage: Passage,
        importance_P: torch.Tensor,
    ) -> None:
        """Rows of the layer that one expert was given whether routed to it or not."""
        self._sample_importance_E[expert] += float(importance_P.double().sum())
        self._sample_middle_EF[expert] += _energies(passage.middle_PF, importance_P)
        self._sample_gate_slope_EF[expert] += _energies(passage.gate_slope_PF, importance_P)
        self._sample_up_slope_EF[expert] += _energies(passage.up_slope_PF, importance_P)
        self._down_energy_EF[expert] = matrices.down_HF.square().sum(dim=0).cpu()

    def finish(self) -> LayerStatistics:
        """The means, in this object's memory: the sums are gone afterwards."""
        assert self._num_tokens > 0, "no token reached this layer"
        assert bool((self._sample_importance_E > 0).all()), "an expert was shown no sample"
        reached_E = self._tokens_E > 0
        count_E = torch.where(reached_E, self._importance_E, 1.0)
        count_E1 = count_E.float()[:, None]
        sample_E1 = self._sample_importance_E.float()[:, None]
        num_tokens = self._num_tokens
        mean_importance = self._importance / num_tokens
        down_EF = self._down_energy_EF
        tensors = LayerTensors(
            pooled=self._pooled.div_(self._importance),
            input_E=self._input_E.div_(_like(count_E1, self._input_E)),
            middle_E=self._middle_E.div_(_like(count_E1, self._middle_E)),
            gate_weight_EF=self._gate_slope_EF.div_(count_E1).mul_(down_EF),
            up_weight_EF=self._up_slope_EF.div_(count_E1).mul_(down_EF),
            sample_middle_EF=self._sample_middle_EF.div_(sample_E1),
            sample_gate_weight_EF=self._sample_gate_slope_EF.div_(sample_E1).mul_(down_EF),
            sample_up_weight_EF=self._sample_up_slope_EF.div_(sample_E1).mul_(down_EF),
        )
        table = LayerTable(
            num_tokens=num_tokens,
            tokens_E=tuple(self._tokens_E.tolist()),
            use_at_EK=_rows(self._use_EK.double() / num_tokens),
            weight2_at_EK=_rows(self._weight2_EK / mean_importance / self._use_EK.clamp(min=1)),
            expert_energy_E=tuple((self._output_energy_E / count_E).tolist()),
            skew_K=tuple((self._skew_K / num_tokens).tolist()),
            output_energy=self._output_energy / self._importance,
        )
        return LayerStatistics(table, tensors, nats=self._nats / num_tokens)


def _zero_moment(size: int, form: MomentForm, *leading: int) -> torch.Tensor:
    if form == "full":
        return torch.zeros(*leading, size, size)
    return torch.zeros(*leading, size // GROUP_SIZE, GROUP_SIZE, GROUP_SIZE)


def _energies(x_TK: torch.Tensor, importance_T: torch.Tensor) -> torch.Tensor:
    """Sum of each column's squares over rows, on the CPU: [K]."""
    return (importance_T @ x_TK.square()).cpu()


def _moment_sum(x_TK: torch.Tensor, importance_T: torch.Tensor, form: MomentForm) -> torch.Tensor:
    """Sum of x x^T over rows, on the CPU: [K, K], or its diagonal blocks [G, 64, 64]."""
    x_TK = x_TK * importance_T.sqrt()[:, None]
    if form == "full":
        return (x_TK.T @ x_TK).cpu()
    x_GTB = x_TK.view(x_TK.shape[0], -1, GROUP_SIZE).transpose(0, 1)
    return torch.bmm(x_GTB.transpose(1, 2), x_GTB).cpu()


def _like(count_E1: torch.Tensor, moments_E: torch.Tensor) -> torch.Tensor:
    return count_E1.view(-1, *(1,) * (moments_E.dim() - 1))


def _rows(table_EK: torch.Tensor) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(row) for row in table_EK.tolist())
