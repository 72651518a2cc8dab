"""Goal: on a GPU, records reach the device whole and in order with the work that reads them.

Method: many rounds over a small byte limit, so that pinned and device memory is used again while
copies run; a consumer keeps the device busy first, so that a missing wait would be seen.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from expert_store.segment import Segment
from expert_store.types import ExpertKey, RecordRequest
from gpu_worker.record_sizes import PlannedCopy, RecordSizes, largest_expert_bytes
from gpu_worker.streamer import Streamer
from tests.hand_store import build_store

NUM_EXPERTS, ROUNDS = 6, 20

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@needs_gpu
@pytest.mark.parametrize("experts_in_flight", [1, 3, NUM_EXPERTS])
def test_every_round_brings_the_source_s_bytes(tmp_path: Path, experts_in_flight: int) -> None:
    build_store(tmp_path, layers=(0,), experts=NUM_EXPERTS, hidden=512, ffn=1024, blocks="u")
    segment = Segment(tmp_path)
    sizes = RecordSizes.of(segment.manifest)
    requests = [
        RecordRequest(ExpertKey(0, expert), kind)
        for expert in range(NUM_EXPERTS)
        for kind in ("codes", "factors")
    ]
    copies = [PlannedCopy(request, sizes.bytes_of(request)) for request in requests]
    largest = largest_expert_bytes(segment.manifest)
    streamer = Streamer(
        segment,
        device="cuda",
        max_in_flight_bytes=experts_in_flight * largest,
        fetch_bytes=largest,
        num_threads=2,
    )
    busy = torch.randn(2048, 2048, device="cuda")
    sums: list[tuple[RecordRequest, torch.Tensor]] = []
    for _ in range(ROUNDS):
        busy = (busy @ busy).tanh()
        with streamer.start(copies) as stream:
            for landed in stream:
                assert landed.data is not None, landed.error
                assert landed.data.device.type == "cuda"
                weights = torch.arange(landed.data.numel(), device="cuda") % 251
                sums.append((landed.copy.request, (landed.data.long() * weights).sum()))
                stream.release(landed.copy.request)
    streamer.close()
    streamer.check_integrity(idle=True)
    assert len(sums) == ROUNDS * len(copies)
    for request, got in sums:
        data = segment.fetch([request])[0].long()
        assert int(got) == int((data * (torch.arange(data.numel()) % 251)).sum()), request
    segment.close()
