"""Goal: who runs an expert, and where its compensator is added, does not change the text.

Method: greedy text of the bundled model's store with every pair on the device, and with every pair
on a near-data worker that is called over a unix socket.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from cluster.stores import bundled_store
from expert_store.segment import Segment
from expert_store.types import RecordRequest
from gpu_worker.build import build_engine, load_tokenizer
from gpu_worker.config import NearDataPolicy, WorkerConfig
from gpu_worker.counters import StepCounters
from gpu_worker.sequence import SamplingParams, Sequence
from ndp_worker.executor import Executor
from ndp_worker.rpc import NdpClient, NdpServer
from tests.gpu_worker.sources import LossySource

PROMPTS = ("The river ran", "def add(a, b):\n", "Once upon a time there was")
MAX_TOKENS = 16


@pytest.fixture
def store(mini_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MOETIER_CACHE", str(mini_cache))
    return bundled_store()


@pytest.fixture
def segment(store: Path) -> Iterator[Segment]:
    with closing(Segment(store)) as opened:
        yield opened


def texts(
    store: Path,
    segment: Segment,
    near_data: NearDataPolicy,
    executor: Executor,
    top_n: int | None = None,
) -> tuple[list[str], StepCounters, bool]:
    """The text of each prompt, what it took, and whether any of them was degraded."""
    config = WorkerConfig(device="cpu", dtype="float32", near_data=near_data, top_n=top_n)
    tokenizer = load_tokenizer(store)
    assert tokenizer is not None
    with (
        closing(NdpServer(executor)) as server,
        closing(
            NdpClient(server.addresses, version=segment.manifest.version, deadline_s=60.0)
        ) as client,
        closing(build_engine(store, segment, client, config)) as engine,
    ):
        params = SamplingParams(max_tokens=MAX_TOKENS, ignore_eos=True, temperature=0.0)
        for index, prompt in enumerate(PROMPTS):
            engine.add(Sequence(str(index), tuple(tokenizer.encode(prompt)), params))
        found = dict.fromkeys(map(str, range(len(PROMPTS))), "")
        counters, degraded = StepCounters(), False
        while engine.has_work:
            output = engine.step()
            counters += output.counters
            for event in output.events:
                found[event.request_id] += event.text
                degraded |= event.degraded
    return list(found.values()), counters, degraded


def test_greedy_text_is_the_same_on_the_device_and_near_data(store: Path, segment: Segment) -> None:
    executor = Executor(segment, backend="cpu_fp32")
    here, on_device, _ = texts(store, segment, "off", executor)
    there, near_data, degraded = texts(store, segment, "all", executor)
    assert there == here
    assert not degraded
    assert on_device.near_data_pairs == 0 < on_device.total_moved_bytes
    assert near_data.total_moved_bytes == 0 < near_data.sent_bytes
    assert near_data.near_data_pairs == near_data.restored_pairs + near_data.low_bit_pairs
    assert near_data.restored_pairs == on_device.restored_pairs > 0
    assert near_data.low_bit_pairs == on_device.low_bit_pairs > 0


def test_compensators_lost_near_data_give_the_text_of_codes_alone_and_say_so(
    store: Path, segment: Segment
) -> None:
    experts = segment.manifest.experts
    lost = [RecordRequest(key, "factors") for key, info in experts.items() if info.factors]
    alone, _, _ = texts(store, segment, "off", Executor(segment), top_n=0)
    executor = Executor(LossySource(segment, lost), backend="cpu_fp32")
    found, counters, degraded = texts(store, segment, "all", executor)
    assert found == alone
    assert degraded
    assert counters.restored_pairs == 0 < counters.degraded_pairs
