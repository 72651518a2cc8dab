"""What it costs to get an expert's record by each transport, and to have it run near its bytes.

A store actor and a near-data actor on a local Ray cluster; all contestants take turns in every
round. A record is "got" (its view is there) and "copied" (and was copied into one staging buffer,
as a streamer does before the device). `python -m benchmarks.transports` writes a CSV; the gate,
equal bytes and equal outputs by every way, runs first.
"""

from __future__ import annotations

import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path

import ray
import torch

from benchmarks.record import RESULTS, commit, processor, today, write_rows
from expert_store.actor import ObjectStoreSource, StoreActor, StoreHandle
from expert_store.rpc import GrpcSource
from expert_store.segment import Segment
from expert_store.types import ExpertKey, ExpertTokens, RecordRequest
from ndp_worker.actor import NdpActor
from ndp_worker.config import NdpConfig
from ndp_worker.executor import Executor
from ndp_worker.rpc import NdpClient
from tests.hand_store import build_store

OUT = RESULTS / "transports.csv"
SHAPES = ((256, 448), (2048, 768), (4096, 4096))  # (H, F): 0.1, 1.5 and 16 MB of 2-bit codes
NUM_EXPERTS = 4
ROUNDS = 40
NDP_SHAPE = (2048, 768)
NDP_TOKENS = (1, 8)
WAIT_S = 120.0


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the CSV. `share_of_memcpy` is of copying as many bytes in process memory, which
    took turns with the others; a view that is only got, not copied, can exceed 1.
    """

    what: str
    shape: str
    num_bytes: int
    p20: float
    p50: float
    p80: float
    unit: str
    gb_per_s: float
    share_of_memcpy: float
    rounds: int
    hardware: str
    load: str  # 1-minute load average when measured, over cores
    commit: str
    date: str


def interleaved(contestants: dict[str, Callable[[], object]]) -> dict[str, list[float]]:
    """Milliseconds per call of each, in a new order every round; two rounds are warm-up."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    shuffled, order = random.Random(0), list(contestants)
    for round_ in range(ROUNDS + 2):
        shuffled.shuffle(order)
        for name in order:
            started = time.perf_counter()
            contestants[name]()
            if round_ >= 2:
                times[name].append(1e3 * (time.perf_counter() - started))
    return times


class Machine:
    """What every row says about where and when it was measured."""

    def __init__(self) -> None:
        self.hardware = processor()
        self.commit = commit()

    def rows(self, shape: str, num_bytes: int, times_ms: dict[str, list[float]]) -> list[Row]:
        """One row per contestant, each against the contestant "memcpy"."""
        copy_ms = statistics.median(times_ms["memcpy"])
        load = f"{os.getloadavg()[0]:.1f}/{os.cpu_count()}"
        rows = []
        for what, times in times_ms.items():
            p20, *_, p80 = statistics.quantiles(times, n=5)
            p50 = statistics.median(times)
            rows.append(
                Row(
                    what=what,
                    shape=shape,
                    num_bytes=num_bytes,
                    p20=round(p20, 4),
                    p50=round(p50, 4),
                    p80=round(p80, 4),
                    unit="ms",
                    gb_per_s=round(num_bytes / p50 / 1e6, 3),
                    share_of_memcpy=round(copy_ms / p50, 3),
                    rounds=len(times),
                    hardware=self.hardware,
                    load=load,
                    commit=self.commit,
                    date=today(),
                )
            )
        return rows


def memcpy(num_bytes: int) -> Callable[[], object]:
    """Copies so many bytes between two buffers of this process, one core."""
    source = torch.ones(num_bytes, dtype=torch.uint8)
    target = torch.ones(num_bytes, dtype=torch.uint8)
    return lambda: target.copy_(source)


def record_rows(machine: Machine, folder: Path, hidden: int, ffn: int) -> list[Row]:
    """Get and copy one record of [hidden, ffn] by each transport."""
    manifest = build_store(
        folder, layers=(0,), experts=NUM_EXPERTS, hidden=hidden, ffn=ffn, blocks=""
    )
    requests = [RecordRequest(key, "codes") for key in manifest.experts]
    with ExitStack() as stack:
        actor = StoreActor.options(num_cpus=0).remote(str(folder))
        stack.callback(lambda: ray.get(actor.stop.remote(), timeout=WAIT_S))
        listing = ray.get(actor.describe.remote(), timeout=WAIT_S).listing
        unix, tcp = listing.addresses
        sources = {
            "mapped segment": Segment(folder),
            "object store": ObjectStoreSource(manifest, [StoreHandle(actor, listing)]),
            "grpc unix": GrpcSource(manifest, lambda: [replace(listing, addresses=(unix,))]),
            "grpc tcp": GrpcSource(manifest, lambda: [replace(listing, addresses=(tcp,))]),
        }
        for source in sources.values():
            stack.enter_context(closing(source))
        truth = sources["mapped segment"].fetch(requests)
        for name, source in sources.items():  # the gate; it also checks and puts every record once
            equal = map(torch.equal, truth, source.fetch(requests))
            assert all(equal), f"{name} gave other bytes"
        size = truth[0].numel()
        staging = torch.empty(size, dtype=torch.uint8)
        turn = dict.fromkeys(sources, 0)

        def get(name: str) -> torch.Tensor:
            turn[name] += 1
            return sources[name].fetch([requests[turn[name] % NUM_EXPERTS]])[0]

        contestants: dict[str, Callable[[], object]] = {"memcpy": memcpy(size)}
        for name in sources:
            contestants[f"get: {name}"] = lambda name=name: get(name)
            contestants[f"get and copy: {name}"] = lambda name=name: staging.copy_(get(name))
        times = interleaved(contestants)
    shape = f"1 record, hidden {hidden}, ffn {ffn}, 2 bits"
    return machine.rows(shape, size, times)


def near_data_rows(machine: Machine, folder: Path) -> list[Row]:
    """A call of `NUM_EXPERTS` experts on all tokens: in process, over a unix socket, over TCP."""
    hidden, ffn = NDP_SHAPE
    manifest = build_store(
        folder, layers=(0,), experts=NUM_EXPERTS, hidden=hidden, ffn=ffn, blocks=""
    )
    rows = []
    with ExitStack() as stack:
        actor = NdpActor.options(num_cpus=0).remote(str(folder), config=NdpConfig(num_threads=1))
        stack.callback(lambda: ray.get(actor.stop.remote(), timeout=WAIT_S))
        listing = ray.get(actor.describe.remote(), timeout=WAIT_S).listing
        clients = {
            kind: stack.enter_context(closing(NdpClient((address,), version=manifest.version)))
            for kind, address in zip(("unix", "tcp"), listing.addresses, strict=True)
        }
        executor = Executor(Segment(folder), num_threads=1)
        for num_tokens in NDP_TOKENS:
            hidden_TH = torch.randn(num_tokens, hidden).bfloat16()
            work = [
                ExpertTokens(ExpertKey(0, expert), tuple(range(num_tokens)))
                for expert in range(NUM_EXPERTS)
            ]
            contestants: dict[str, Callable[[], torch.Tensor]] = {
                "near data: in process": lambda h=hidden_TH, w=work: executor.run(h, w).output_PH
            }
            for kind, client in clients.items():
                contestants[f"near data: {kind}"] = lambda c=client, h=hidden_TH, w=work: (
                    c.submit(h, w).result(WAIT_S).output_PH
                )
            truth = executor.run(hidden_TH, work).output_PH
            for name, run in contestants.items():
                assert torch.equal(run(), truth), f"{name} gave other outputs"
            before = clients["tcp"].bytes_moved
            contestants["near data: tcp"]()
            num_bytes = sum(clients["tcp"].bytes_moved) - sum(before)
            shape = (
                f"{NUM_EXPERTS} experts, {num_tokens} tokens, hidden {hidden}, ffn {ffn}, 2 bits"
            )
            times = interleaved({"memcpy": memcpy(num_bytes), **contestants})
            rows += machine.rows(shape, num_bytes, times)
    return rows


def main() -> None:
    torch.set_num_threads(1)
    machine = Machine()
    rows = []
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        configure_logging=False,
    )
    try:
        with tempfile.TemporaryDirectory() as folder:
            for hidden, ffn in SHAPES:
                rows += record_rows(machine, Path(folder) / f"{hidden}x{ffn}", hidden, ffn)
            rows += near_data_rows(machine, Path(folder) / "ndp")
    finally:
        ray.shutdown()
    write_rows(OUT, rows)
    for row in rows:
        print(
            f"{row.what:32} {row.shape:52} p50 {row.p50:9.3f} ms  {row.gb_per_s:8.2f} GB/s  "
            f"{100 * row.share_of_memcpy:6.1f} % of memcpy"
        )
    print(f"{machine.hardware}, load {rows[-1].load}; wrote {OUT}")


if __name__ == "__main__":
    main()
