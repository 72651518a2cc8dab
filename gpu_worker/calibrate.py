"""Collects what the experts of a model really see, while the model reads text.

Runs the experts itself, out of a store of the original weights, so that what lies between their
matrices can be seen. Knows no text and no file.

Legend: S token rows, W windows, T tokens of a window, K top-k, H hidden, P rows of one expert.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from expert_store.errors import CheckpointError
from expert_store.format import parse_codes
from expert_store.statistics import LayerStatistics, MomentForms
from expert_store.types import ExpertKey, RecordRequest
from gpu_worker.counters import StepCounters
from gpu_worker.expert_sums import ExpertMatrices, LayerSums, run_expert
from gpu_worker.experts import combine
from gpu_worker.local_run import Part
from gpu_worker.model import ModelRunner, StepReport, bind_experts
from gpu_worker.planner import ExpertWork
from gpu_worker.protocols import ExpertSource
from kernels import ops

SAMPLE_ROWS = 512
"""Rows of a layer that every expert is shown, routed to it or not."""
PASS_ROWS = 4096
"""Token rows of one pass: an expert's weights are read once per pass."""

TokensDone = Callable[[int], None]


class CollectingExperts:
    """`StepExperts` that runs experts in float32 and sums up what they see.

    `source` has codes of 16 bits; all on `device`, the sums on the CPU. The first pass also shows
    every expert a seeded sample of the layer's rows.
    """

    def __init__(
        self,
        source: ExpertSource,
        *,
        device: torch.device | str = "cpu",
        forms: MomentForms | None = None,
        sample_rows: int = SAMPLE_ROWS,
        seed: int = 0,
    ) -> None:
        model = source.manifest.model
        self._source = source
        self._device = device
        self._sample_rows = sample_rows
        self._seed = seed
        self.forms = MomentForms.of(model) if forms is None else forms
        self._sums = {
            layer: LayerSums(
                shape=model.expert, num_experts=count, top_k=model.top_k, forms=self.forms
            )
            for layer, count in model.num_experts.items()
        }
        self._unsampled = set(self._sums)

    def begin(self, valid_S: torch.Tensor | None, token_tags_S: torch.Tensor | None = None) -> None:
        assert valid_S is None, "windows of a calibration have no padding"

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
        sums = self._sums[layer]
        sample_S = self._sample(layer, hidden_SH.shape[0])
        ids_SK = topk_ids_SK.to("cpu", torch.int64)
        parts = []
        for expert in range(self._source.manifest.model.num_experts[layer]):
            rows_P, columns_P = (ids_SK == expert).nonzero(as_tuple=True)
            if not rows_P.numel() and sample_S is None:
                continue
            matrices = self._read(ExpertKey(layer, expert))
            if sample_S is not None:
                sample = run_expert(matrices, hidden_SH[sample_S.to(hidden_SH.device)])
                sums.add_sample(expert, matrices, sample)
            if not rows_P.numel():
                continue
            passage = run_expert(matrices, hidden_SH[rows_P.to(hidden_SH.device)])
            sums.add_expert(expert, passage)
            work = ExpertWork(
                ExpertKey(layer, expert),
                tuple(rows_P.tolist()),
                tuple(columns_P.tolist()),
                (False,) * rows_P.numel(),
            )
            parts.append(Part(work, passage.output_PH))
        output_SH = combine(parts, hidden_SH, topk_weights_SK)
        sums.add_tokens(hidden_SH, ids_SK, topk_weights_SK, output_SH)
        return output_SH

    def end(self) -> StepReport:
        return StepReport(StepCounters(), {})

    def finish(self) -> dict[int, LayerStatistics]:
        """Every layer's statistics; this object is used up."""
        return {layer: sums.finish() for layer, sums in self._sums.items()}

    def _sample(self, layer: int, num_rows: int) -> torch.Tensor | None:
        """Rows of the layer's first pass that every expert is shown; None in later passes."""
        if layer not in self._unsampled:
            return None
        self._unsampled.remove(layer)
        generator = torch.Generator().manual_seed(self._seed + layer)
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


def collect(
    runner: ModelRunner,
    source: ExpertSource,
    windows_WT: torch.Tensor,
    *,
    seed: int = 0,
    forms: MomentForms | None = None,
    sample_rows: int = SAMPLE_ROWS,
    pass_rows: int = PASS_ROWS,
    progress: TokensDone = lambda num_tokens: None,
) -> dict[int, LayerStatistics]:
    """Statistics of every MoE layer over all tokens of the windows [W, T].

    `runner` is of the store that `source` reads; its experts are bound again afterwards. The same
    windows, seed and shapes give the same sums. `progress` is told how many tokens went through.
    """
    _check_windows(windows_WT)
    model = runner.model
    collecting = CollectingExperts(
        source, device=model.device, forms=forms, sample_rows=sample_rows, seed=seed
    )
    # The first pass gives the sample, so it should hold windows from everywhere.
    generator = torch.Generator().manual_seed(seed)
    order_W = torch.randperm(windows_WT.shape[0], generator=generator)
    num_tokens = windows_WT.shape[1]
    positions_T = torch.arange(num_tokens, device=model.device)
    bind_experts(model, collecting)
    try:
        own = ModelRunner(model, collecting)
        for windows_BT in windows_WT[order_W].split(max(1, pass_rows // num_tokens)):
            positions_BT = positions_T.expand(windows_BT.shape[0], -1)
            own.forward(windows_BT.to(model.device), positions_BT, None, None, logits_to_keep=1)
            progress(windows_BT.numel())
    finally:
        bind_experts(model, runner.experts)
    return collecting.finish()


def _check_windows(windows_WT: torch.Tensor) -> None:
    if windows_WT.dim() != 2 or not windows_WT.numel():
        raise ValueError(
            f"windows: got shape {tuple(windows_WT.shape)}, expected [W, T] with a token at least"
        )
