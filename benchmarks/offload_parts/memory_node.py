"""The memory node: every store's records and a near-data worker for it, on one address.

`python -m benchmarks.offload_parts.memory_node ADDRESS STORE ...` prints one line of JSON that
says where all listen, and serves until its input ends.
"""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack, closing
from pathlib import Path

import torch

from benchmarks.offload_parts.wire_speed import Pourer
from expert_store.rpc import RecordServer
from expert_store.segment import Segment
from ndp_worker.executor import Executor
from ndp_worker.rpc import NdpServer


def main(address: str, stores: list[str]) -> None:
    torch.set_num_threads(1)
    with ExitStack() as stack:
        pourer = stack.enter_context(closing(Pourer(address)))
        records, near_data = {}, {}
        for store in stores:
            segment = stack.enter_context(closing(Segment(Path(store))))
            server = stack.enter_context(closing(RecordServer(segment, [f"{address}:0"])))
            (records[store],) = server.addresses
            if segment.manifest.recipe.is_original:
                continue  # near data runs low-bit codes
            worker = NdpServer(Executor(segment, num_threads=1), [f"{address}:0"])
            (near_data[store],) = stack.enter_context(closing(worker)).addresses
        told = {"pour": pourer.port, "records": records, "near_data": near_data}
        print(json.dumps(told), flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
