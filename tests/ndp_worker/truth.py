"""What near-data work should give, by `kernels.reference` on the records of a segment.

Legend: T tokens, P (expert, token) pairs, H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from expert_store.format import parse_codes, parse_factors
from expert_store.segment import Segment
from expert_store.types import ExpertTokens, RecordRequest
from kernels import reference
from kernels.types import GatedRepair


def reference_outputs(
    segment: Segment, hidden_TH: torch.Tensor, work: Sequence[ExpertTokens]
) -> torch.Tensor:
    """[P, H] float32: one reference MLP per item, in order, with its repair where asked for."""
    outputs = [torch.empty(0, hidden_TH.shape[1])]
    for item in work:
        info, shape = segment.manifest.experts[item.key], segment.manifest.model.expert
        (data,) = segment.fetch([RecordRequest(item.key, "codes")])
        mlp = parse_codes(item.key, data, shape, info.form).mlp
        repair: GatedRepair | None = None
        restored_T: torch.Tensor | None = None
        if item.restored:
            (data,) = segment.fetch([RecordRequest(item.key, "factors", item.num_blocks)])
            form = info.repair if item.num_blocks is None else info.repair.prefix(item.num_blocks)
            repair = parse_factors(item.key, data, shape, form).factors
            restored_T = torch.tensor(item.restored)
        x_TH = hidden_TH[list(item.token_rows)].float()
        outputs.append(reference.gated_mlp(x_TH, mlp, repair, restored_T))
    return torch.cat(outputs)
