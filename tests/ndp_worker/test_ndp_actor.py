"""Goal: a near-data actor answers over its unix socket and over TCP, and its death is a typed
error within the deadline. Method: one local Ray cluster for the module; the actor is killed.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import ray
import torch

from expert_store.errors import ExpertUnavailableError
from expert_store.holder import HolderStatus
from expert_store.segment import Segment
from expert_store.types import ExpertKey, ExpertTokens
from ndp_worker.actor import NdpActor
from ndp_worker.config import NdpConfig
from ndp_worker.executor import Executor
from ndp_worker.rpc import NdpClient
from tests.hand_store import build_store

pytestmark = pytest.mark.ray
WAIT_S = 60.0
KEYS = [ExpertKey(1, 0), ExpertKey(1, 2)]
WORK = [ExpertTokens(KEYS[1], (0, 3)), ExpertTokens(KEYS[0], (1,))]


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=100 * 2**20,
        log_to_driver=False,
        configure_logging=False,
    )
    try:
        yield
    finally:
        ray.shutdown()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("store")
    build_store(folder)
    return folder


def start(store: Path) -> tuple[object, HolderStatus]:
    actor = NdpActor.options(num_cpus=0).remote(str(store), KEYS, config=NdpConfig(num_threads=1))
    return actor, ray.get(actor.describe.remote(), timeout=WAIT_S)


def test_it_answers_on_both_addresses_until_it_is_killed(cluster: None, store: Path) -> None:
    actor, status = start(store)
    listing = status.listing
    assert listing.role == "near_data"
    assert listing.keys == frozenset(KEYS)
    assert listing.node_id == ray.get_runtime_context().get_node_id()
    assert status.num_experts == 2
    hidden_TH = torch.randn(5, 64)
    expected = Executor(Segment(store)).run(hidden_TH, WORK).output_PH
    for address in listing.addresses:
        with closing(NdpClient((address,), version=listing.version, deadline_s=WAIT_S)) as client:
            found = client.submit(hidden_TH, WORK).result(WAIT_S)
            assert torch.equal(found.output_PH, expected)
            absent = [ExpertTokens(ExpertKey(1, 1), (0,))]
            with pytest.raises(ExpertUnavailableError, match="not in this segment"):
                client.submit(hidden_TH, absent).result(WAIT_S)

    with closing(NdpClient(listing.addresses, version=listing.version, deadline_s=3.0)) as client:
        client.submit(hidden_TH, WORK).result(WAIT_S)
        ray.kill(actor)
        started = time.monotonic()
        deadline = started + WAIT_S
        while time.monotonic() < deadline:  # the kill arrives a moment later
            future = client.submit(hidden_TH, WORK)
            if error := future.exception(WAIT_S):
                break
        assert isinstance(error, ExpertUnavailableError)
        assert "is lost" in str(error)
        shutil.rmtree(Path(listing.addresses[0].removeprefix("unix:")).parent)  # it could not


def test_it_stops_when_told(cluster: None, store: Path) -> None:
    actor, status = start(store)
    ray.get(actor.stop.remote(), timeout=WAIT_S)
    assert not Path(status.listing.addresses[0].removeprefix("unix:")).exists()
    with (
        closing(
            NdpClient(status.listing.addresses, version=status.listing.version, deadline_s=3.0)
        ) as client,
        pytest.raises(ExpertUnavailableError),
    ):
        client.submit(torch.randn(5, 64), WORK).result(WAIT_S)
    ray.kill(actor)
