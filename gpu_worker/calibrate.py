"""Collects what the experts of a model really see while it reads text, and where it matters.

Runs the experts itself, out of a store of the original weights, forwards and backwards: the
gradient of the loss at a layer's output says what an error there costs, token by token. Knows no
text and no file.

Legend: S token rows, W windows, T tokens of a window, K top-k, H hidden, P rows of one expert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from expert_store.errors import CheckpointError
from expert_store.format import parse_codes
from expert_store.statistics import LayerStatistics, MomentForms
from expert_store.types import ExpertKey, RecordRequest
from gpu_worker.combine import Part, combine
from gpu_worker.counters import StepCounters
from gpu_worker.expert_sums import (
    ExpertMatrices,
    LayerSums,
    expert_output,
    input_gradient,
    run_expert,
)
from gpu_worker.model import ModelRunner, StepReport, bind_experts
from gpu_worker.planner import ExpertWork
from gpu_worker.protocols import ExpertSource
from kernels import ops

SAMPLE_ROWS = 512
"""Rows of a layer that every expert is shown, routed to it or not; equally many of every pass."""
PASS_ROWS = 1024
"""Token rows of one pass: an expert's weights are read twice per pass, and what the dense layers
need for their gradients is kept for so many rows."""
LEAST_IMPORTANCE = 1e-30

TokensDone = Callable[[int], None]


class CollectingExperts:
    """`StepExperts` that runs experts in float32 and sums up what they see as gradients return.

    `source` has codes of 16 bits; all on `device`, the sums on the CPU. Of every pass each expert
    is also shown a seeded sample of `sample_rows` of the layer's rows. With `alike` all tokens
    count the same, whatever their gradients.
    """

    def __init__(
        self,
        source: ExpertSource,
        *,
        device: torch.device | str = "cpu",
        forms: MomentForms | None = None,
        sample_rows: int = SAMPLE_ROWS,
        alike: bool = False,
        seed: int = 0,
    ) -> None:
        model = source.manifest.model
        self._source = source
        self._device = device
        self._sample_rows = sample_rows
        self._alike = alike
        self._seed = seed
        self._passes = 0
        self.forms = MomentForms.of(model) if forms is None else forms
        self._sums = {
            layer: LayerSums(
                shape=model.expert, num_experts=count, top_k=model.top_k, forms=self.forms
            )
            for layer, count in model.num_experts.items()
        }

    def begin(self, valid_S: torch.Tensor | None, token_tags_S: torch.Tensor | None = None) -> None:
        assert valid_S is None, "windows of a calibration have no padding"
        self._passes += 1

    def run_layer(
        self,
        layer: int,
        hidden_SH: torch.Tensor,
        topk_ids_SK: torch.Tensor,
        topk_weights_SK: torch.Tensor,
    ) -> torch.Tensor:
        """As in `StepExperts`. Raises CheckpointError when the hidden states are not finite."""
        if not bool(hidden_SH.isfinite().all()):
            raise CheckpointError(
                f"layer {layer}: the model's hidden states hold NaN or Inf; the checkpoint is "
                "damaged, or needs another dtype"
            )
        if not hidden_SH.requires_grad:  # the first such layer: gradients need go no further down
            hidden_SH = hidden_SH.detach().requires_grad_()
        found: torch.Tensor = _Layer.apply(hidden_SH, topk_weights_SK, topk_ids_SK, layer, self)
        return found

    def end(self) -> StepReport:
        return StepReport(StepCounters(), {})

    def finish(self) -> dict[int, LayerStatistics]:
        """Every layer's statistics; this object is used up."""
        return {layer: sums.finish() for layer, sums in self._sums.items()}

    def forward(
        self, layer: int, hidden_SH: torch.Tensor, ids_SK: torch.Tensor, weights_SK: torch.Tensor
    ) -> torch.Tensor:
        """The weighted sum of each row's experts: [S, H] like `hidden_SH`."""
        parts = []
        for expert, rows_P, columns_P in self._pairs(layer, ids_SK):
            if not rows_P.numel():
                continue
            key, num_rows = ExpertKey(layer, expert), rows_P.numel()
            rows, columns = tuple(rows_P.tolist()), tuple(columns_P.tolist())
            work = ExpertWork(key, rows, columns, (False,) * num_rows)
            parts.append(Part(work, expert_output(self._read(key), hidden_SH[rows_P])))
        return combine(parts, hidden_SH, weights_SK)

    def backward(
        self,
        layer: int,
        hidden_SH: torch.Tensor,
        ids_SK: torch.Tensor,
        weights_SK: torch.Tensor,
        output_SH: torch.Tensor,
        gradient_SH: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Sum up what every expert sees, and pass gradients on: of hidden states and weights."""
        sums, gradient_SH = self._sums[layer], gradient_SH.float()
        importance_S = _importance(gradient_SH)
        counts_S = torch.ones_like(importance_S) if self._alike else importance_S
        sample_S = self._sample(layer, hidden_SH.shape[0]).to(hidden_SH.device)
        hidden_gradient_SH = torch.zeros_like(gradient_SH)
        weights_gradient_SK = torch.zeros_like(weights_SK)
        for expert, rows_P, columns_P in self._pairs(layer, ids_SK):
            matrices = self._read(ExpertKey(layer, expert))
            sample = run_expert(matrices, hidden_SH[sample_S])
            sums.add_sample(expert, matrices, sample, counts_S[sample_S])
            if not rows_P.numel():
                continue
            passage = run_expert(matrices, hidden_SH[rows_P])
            sums.add_expert(expert, passage, counts_S[rows_P])
            gradient_PH = gradient_SH[rows_P]
            weights_P1 = weights_SK[rows_P, columns_P, None].float()
            inputs_PH = input_gradient(matrices, passage, gradient_PH * weights_P1)
            hidden_gradient_SH.index_add_(0, rows_P, inputs_PH)
            of_weights_P = (passage.output_PH * gradient_PH).sum(dim=1)
            weights_gradient_SK[rows_P, columns_P] = of_weights_P.to(weights_SK.dtype)
        sums.add_tokens(hidden_SH, ids_SK, weights_SK, output_SH, counts_S, importance_S)
        return hidden_gradient_SH.to(hidden_SH.dtype), weights_gradient_SK

    def _pairs(
        self, layer: int, ids_SK: torch.Tensor
    ) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """Every expert of a layer, with the rows and columns that the router sent to it."""
        for expert in range(self._source.manifest.model.num_experts[layer]):
            rows_P, columns_P = (ids_SK == expert).nonzero(as_tuple=True)
            yield expert, rows_P, columns_P

    def _sample(self, layer: int, num_rows: int) -> torch.Tensor:
        """Rows of one layer's pass that every expert is shown."""
        generator = torch.Generator().manual_seed(self._seed + layer + (self._passes << 20))
        return torch.randperm(num_rows, generator=generator)[: self._sample_rows]

    def _read(self, key: ExpertKey) -> ExpertMatrices:
        manifest = self._source.manifest
        (data,) = self._source.fetch([RecordRequest(key, "codes")])
        mlp = parse_codes(
            key, data.to(self._device), manifest.model.expert, manifest.experts[key].form
        ).mlp
        gate_FH, up_FH, down_HF = (ops.dequantize(m) for m in (mlp.gate, mlp.up, mlp.down))
        biases = (mlp.gate_bias, mlp.up_bias, mlp.down_bias)
        return ExpertMatrices(gate_FH, up_FH, down_HF, mlp.activation, *biases)


class _Layer(torch.autograd.Function):
    """One layer's experts as autograd sees them: weights are read again on the way back."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_SH: torch.Tensor,
        weights_SK: torch.Tensor,
        ids_SK: torch.Tensor,
        layer: int,
        experts: CollectingExperts,
    ) -> torch.Tensor:
        output_SH = experts.forward(layer, hidden_SH, ids_SK, weights_SK)
        ctx.save_for_backward(hidden_SH, weights_SK, ids_SK, output_SH)
        ctx.layer, ctx.experts = layer, experts
        return output_SH

    @staticmethod
    def backward(ctx: Any, gradient_SH: torch.Tensor) -> tuple[Any, ...]:
        hidden_SH, weights_SK, ids_SK, output_SH = ctx.saved_tensors
        gradients = ctx.experts.backward(
            ctx.layer, hidden_SH, ids_SK, weights_SK, output_SH, gradient_SH
        )
        return *gradients, None, None, None


def _importance(gradient_SH: torch.Tensor) -> torch.Tensor:
    """[S] nats that a unit of squared error costs at each row.

    KL is half the error's square in the metric of the Fisher information, E[g g^T] over words
    drawn from the model's own distribution; an error of no particular direction meets the mean of
    its eigenvalues.
    """
    mean_S = gradient_SH.square().mean(dim=1) / 2
    return mean_S.clamp(min=LEAST_IMPORTANCE)


def collect(
    runner: ModelRunner,
    source: ExpertSource,
    windows_WT: torch.Tensor,
    *,
    seed: int = 0,
    alike: bool = False,
    forms: MomentForms | None = None,
    sample_rows: int = SAMPLE_ROWS,
    pass_rows: int = PASS_ROWS,
    progress: TokensDone = lambda num_tokens: None,
) -> dict[int, LayerStatistics]:
    """Statistics of every MoE layer over all tokens of the windows [W, T].

    `runner` is of the store that `source` reads; its experts are bound again afterwards. The same
    windows, seed and shapes give the same sums. `alike` counts every token the same. `progress` is
    told how many tokens went through.
    """
    _check_windows(windows_WT)
    model, num_tokens = runner.model, windows_WT.shape[1]
    passes = windows_WT.split(max(1, pass_rows // num_tokens))
    collecting = CollectingExperts(
        source,
        device=model.device,
        forms=forms,
        sample_rows=-(-sample_rows // len(passes)),
        alike=alike,
        seed=seed,
    )
    generator = torch.Generator(model.device).manual_seed(seed)
    model.requires_grad_(False)
    bind_experts(model, collecting)
    try:
        for windows_BT in passes:
            collecting.begin(None)
            _read_and_learn(model, windows_BT.to(model.device), generator)
            progress(windows_BT.numel())
    finally:
        bind_experts(model, runner.experts)
    return collecting.finish()


def _read_and_learn(model: Any, ids_BT: torch.Tensor, generator: torch.Generator) -> None:
    """One pass there and back: the loss of words that the model itself would have said."""
    with torch.inference_mode(mode=False), torch.enable_grad():
        logits_BTV = model(input_ids=ids_BT, use_cache=False).logits
        log_probs_SV = logits_BTV.float().flatten(0, 1).log_softmax(dim=1)
        with torch.no_grad():
            said_S1 = torch.multinomial(log_probs_SV.exp(), 1, generator=generator)
        (-log_probs_SV.gather(1, said_S1).sum()).backward()


def _check_windows(windows_WT: torch.Tensor) -> None:
    if windows_WT.dim() != 2 or not windows_WT.numel():
        raise ValueError(
            f"windows: got shape {tuple(windows_WT.shape)}, expected [W, T] with a token at least"
        )
