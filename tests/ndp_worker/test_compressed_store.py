"""Goal: what `compress` writes is served whole by every transport and run near its bytes.

Method: tiny random checkpoints compressed with the paper's, the static and the original recipe;
records over gRPC against the mapped segment, near-data outputs against `kernels.reference`.
"""

from __future__ import annotations

from contextlib import ExitStack, closing
from pathlib import Path

import pytest
import torch

from expert_store.compress import compress
from expert_store.config import CompressionConfig
from expert_store.format import parse_codes
from expert_store.listing import Listing
from expert_store.rpc import GrpcSource, RecordServer
from expert_store.segment import Segment
from expert_store.types import ExpertTokens, RecordRequest
from kernels import reference
from ndp_worker.executor import Executor
from ndp_worker.rpc import NdpClient, NdpServer
from tests.tiny_checkpoints import write_tiny_checkpoint

WAIT_S = 30.0


@pytest.mark.parametrize(
    ("family", "recipe"), [("mixtral", "paper"), ("gpt_oss", "static"), ("qwen3_moe", "original")]
)
def test_a_compressed_store_is_served_whole_and_run(
    tmp_path: Path, family: str, recipe: str
) -> None:
    model = write_tiny_checkpoint(family, tmp_path / "model", hidden=128, ffn=128, experts=3)
    compress(model, tmp_path / "store", CompressionConfig(recipe=recipe), jobs=1)
    segment = Segment(tmp_path / "store")
    manifest = segment.manifest
    requests = [
        RecordRequest(key, kind)
        for key, info in manifest.experts.items()
        for kind in ("codes", "factors")
        if kind == "codes" or info.factors is not None
    ]
    if recipe == "paper":
        assert any(request.kind == "factors" for request in requests)
    with ExitStack() as stack:
        records = stack.enter_context(closing(RecordServer(segment)))
        listing = Listing("a", "records", manifest.version, "n", records.addresses)
        source = stack.enter_context(closing(GrpcSource(manifest, lambda: [listing])))
        for found, truth in zip(source.fetch(requests), segment.fetch(requests), strict=True):
            assert torch.equal(found, truth)

        near = stack.enter_context(closing(NdpServer(Executor(segment))))
        client = stack.enter_context(closing(NdpClient(near.addresses, version=manifest.version)))
        hidden_TH = torch.randn(5, manifest.model.expert.hidden)
        for layer in manifest.model.moe_layers:
            keys = [key for key in manifest.experts if key.layer == layer]
            work = [ExpertTokens(key, (key.expert, 4)) for key in keys]
            outputs_PH = client.submit(hidden_TH, work).result(WAIT_S).output_PH
            truth_PH = torch.cat([_reference(segment, hidden_TH, item) for item in work])
            # Codes: two roundings of activations to int8. bf16 originals run in float32.
            tolerance = 1e-5 if recipe == "original" else 3e-2
            assert (outputs_PH - truth_PH).norm() / truth_PH.norm() < tolerance


def _reference(segment: Segment, hidden_TH: torch.Tensor, item: ExpertTokens) -> torch.Tensor:
    (data,) = segment.fetch([RecordRequest(item.key, "codes")])
    form = segment.manifest.experts[item.key].form
    mlp = parse_codes(item.key, data, segment.manifest.model.expert, form).mlp
    return reference.gated_mlp(hidden_TH[list(item.token_rows)], mlp)
