"""Goal: records come out of a store actor byte for byte, over the object store (zero copy) and
over gRPC, and its death is a typed error within the deadline.

Method: one local Ray cluster for the module; actors killed and restarted on purpose.
"""

from __future__ import annotations

import shutil
import time
import warnings
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import ray
import torch
from ray.exceptions import ActorUnavailableError

from expert_store.actor import ObjectStoreSource, StoreActor, StoreHandle
from expert_store.errors import CorruptRecordError, ExpertUnavailableError
from expert_store.holder import HolderStatus, OpenDirectory
from expert_store.owned_objects import OwnedObjects
from expert_store.rpc import GrpcSource
from expert_store.segment import Segment, locate
from expert_store.types import ExpertKey, RecordRequest
from tests.hand_store import build_store

pytestmark = pytest.mark.ray
WAIT_S = 60.0
CODES = RecordRequest(ExpertKey(1, 2), "codes")


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=200 * 2**20,
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
    build_store(folder, hidden=256, ffn=512)  # codes of 123 KB: not inlined by Ray
    return folder


def start(store: Path, *keys: ExpertKey, **options: object) -> StoreHandle:
    arguments = {"max_put_bytes": options.pop("max_put_bytes", 2**30)}
    actor = StoreActor.options(num_cpus=0, **options).remote(
        str(store), list(keys) or None, **arguments
    )
    return StoreHandle(actor, status_of(actor).listing)


def kill(handle: StoreHandle, **options: bool) -> None:
    """A killed process cannot remove its socket; nor can it answer there."""
    ray.kill(handle.actor, **options)
    shutil.rmtree(Path(handle.listing.addresses[0].removeprefix("unix:")).parent)


def status_of(actor: object) -> HolderStatus:
    return ray.get(actor.describe.remote(), timeout=WAIT_S)


def wait_for_another(actor: object, pid: int) -> None:
    """Until the process that answers for the actor is not `pid`: Ray kills in its own time."""
    end = time.monotonic() + WAIT_S
    while time.monotonic() < end:
        try:
            if status_of(actor).pid != pid:
                return
        except ActorUnavailableError:
            pass
        time.sleep(0.05)
    pytest.fail(f"process {pid} was not replaced within {WAIT_S:g} s")


@pytest.fixture(scope="module")
def handle(cluster: None, store: Path) -> Iterator[StoreHandle]:
    made = start(store)
    yield made
    ray.get(made.actor.stop.remote(), timeout=WAIT_S)
    ray.kill(made.actor)


def all_requests(store: Path) -> list[RecordRequest]:
    keys = Segment(store).manifest.experts
    requests = [RecordRequest(key, kind) for key in keys for kind in ("codes", "factors")]
    return [*requests, RecordRequest(ExpertKey(0, 1), "factors", 2)]


def test_it_says_what_it_holds(handle: StoreHandle, store: Path) -> None:
    status = status_of(handle.actor)
    listing = status.listing
    assert listing.version == Segment(store).manifest.version
    assert listing.node_id == ray.get_runtime_context().get_node_id()
    assert listing.role == "records"
    assert [address.startswith("unix:") for address in listing.addresses] == [True, False]
    assert status.num_experts == 6
    assert status.num_bytes == Segment(store).num_bytes
    assert Path(f"/proc/{status.pid}").exists()


def test_both_transports_give_the_segments_bytes(handle: StoreHandle, store: Path) -> None:
    requests = all_requests(store)
    expected = Segment(store).fetch(requests)
    with (
        closing(ObjectStoreSource(Segment(store).manifest, [handle])) as objects,
        closing(GrpcSource(objects.manifest, lambda: [handle.listing])) as grpc,
    ):
        assert (objects.tier, grpc.tier) == ("object_store", "grpc")
        for truth, *found in zip(
            expected, objects.fetch(requests), grpc.fetch(requests), strict=True
        ):
            assert all(torch.equal(truth, data) for data in found)


def test_a_prefix_is_an_object_of_its_own_bytes(handle: StoreHandle, store: Path) -> None:
    """Another node that pulls it moves no more than was planned."""
    manifest = Segment(store).manifest
    requests = [RecordRequest(ExpertKey(1, 0), "factors", n) for n in (1, 3, None)]
    refs = ray.get(handle.actor.refs.remote(manifest.version, requests), timeout=WAIT_S)
    sizes = [locate(manifest, request).num_bytes for request in requests]
    assert [array.nbytes for array in ray.get(refs)] == sizes
    assert sizes[0] < sizes[1] < sizes[2]


def test_objects_are_read_only_pages_of_the_object_store(handle: StoreHandle, store: Path) -> None:
    source = ObjectStoreSource(Segment(store).manifest, [handle])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first, second = source.fetch([CODES])[0], source.fetch([CODES])[0]
    assert first.data_ptr() == second.data_ptr()  # nothing was copied
    (ref,) = ray.get(handle.actor.refs.remote(source.manifest.version, [CODES]), timeout=WAIT_S)
    array = ray.get(ref)
    assert isinstance(array, np.ndarray)
    assert array.dtype == np.uint8
    assert not array.flags.writeable
    assert array.ctypes.data == first.data_ptr()
    expected = bytes(array)
    source.close()
    del array, ref
    assert bytes(first.numpy()) == expected  # a view outlives its source
    with pytest.raises(ExpertUnavailableError, match="closed"):
        source.fetch([CODES])


def test_a_record_is_put_once(handle: StoreHandle, store: Path) -> None:
    version = Segment(store).manifest.version
    ask = [handle.actor.refs.remote(version, [CODES, CODES]) for _ in range(2)]
    (a, b), (c, d) = ray.get(ask, timeout=WAIT_S)
    assert a == b == c == d


def test_errors_keep_their_types(cluster: None, handle: StoreHandle, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    manifest = build_store(damaged, hidden=256, ffn=512)
    record = locate(manifest, CODES)
    data = bytearray((damaged / record.file).read_bytes())
    data[record.offset] ^= 1
    (damaged / record.file).write_bytes(data)
    bad = start(damaged, CODES.key, ExpertKey(0, 0))
    source = ObjectStoreSource(manifest, [bad], deadline_s=WAIT_S)
    with pytest.raises(CorruptRecordError, match="layer 1 expert 2 .*expected sha256"):
        source.fetch([CODES])
    with pytest.raises(ValueError, match="layer 9"):
        source.fetch([RecordRequest(ExpertKey(9, 0), "codes")])
    # A good copy beside it serves the record; the two stores are the same bytes otherwise.
    both = ObjectStoreSource(manifest, [bad, handle], deadline_s=WAIT_S)
    assert both.fetch([CODES])[0].numel() == record.num_bytes
    with pytest.raises(ExpertUnavailableError, match="no copy is listed"):
        ObjectStoreSource(manifest, [bad], deadline_s=0.3).fetch(
            [RecordRequest(ExpertKey(0, 1), "codes")]
        )
    kill(bad)


def test_another_version_and_a_bad_store_are_refused(
    cluster: None, handle: StoreHandle, tmp_path: Path
) -> None:
    other = build_store(tmp_path / "other", seed=3)
    with pytest.raises(ExpertUnavailableError, match="holds store version"):
        ObjectStoreSource(other, [handle], deadline_s=0.3).fetch([CODES])
    shutil.rmtree(tmp_path / "other" / "codes")
    broken = StoreActor.options(num_cpus=0).remote(str(tmp_path / "other"))
    with pytest.raises(ray.exceptions.RayActorError, match="cannot be mapped"):
        ray.get(broken.describe.remote(), timeout=WAIT_S)
    with pytest.raises(ValueError, match="deadline_s"):
        ObjectStoreSource(other, [], deadline_s=0)


def test_a_killed_actor_is_a_typed_error_or_another_copy(
    cluster: None, handle: StoreHandle, store: Path
) -> None:
    doomed = start(store)
    manifest, requests = Segment(store).manifest, all_requests(store)
    alone = ObjectStoreSource(manifest, [doomed], deadline_s=1.5)
    paired = ObjectStoreSource(manifest, [doomed, handle], deadline_s=WAIT_S)
    alone.fetch([CODES])
    paired.fetch(requests)
    kill(doomed)
    for found, truth in zip(paired.fetch(requests), Segment(store).fetch(requests), strict=True):
        assert torch.equal(found, truth)
    started = time.monotonic()
    with pytest.raises(ExpertUnavailableError, match="layer 1 expert 1 within 1.5 s.*Actor"):
        alone.fetch([RecordRequest(ExpertKey(1, 1), "codes")])
    assert time.monotonic() - started < 10
    with (
        closing(GrpcSource(manifest, lambda: [doomed.listing], deadline_s=0.5)) as grpc,
        pytest.raises(ExpertUnavailableError, match="UNAVAILABLE"),
    ):
        grpc.fetch([CODES])


def test_a_restarted_actor_is_asked_again(cluster: None, store: Path) -> None:
    restarted = start(store, max_restarts=1)
    source = ObjectStoreSource(Segment(store).manifest, [restarted], deadline_s=WAIT_S)
    source.fetch([CODES])
    first = status_of(restarted.actor).pid
    kill(restarted, no_restart=False)
    requests, segment = all_requests(store), Segment(store)
    for found, truth in zip(source.fetch(requests), segment.fetch(requests), strict=True):
        assert torch.equal(found, truth), "from whichever process, or the two in turn"
    wait_for_another(restarted.actor, first)
    for found, truth in zip(source.fetch(requests), segment.fetch(requests), strict=True):
        assert torch.equal(found, truth)
    ray.get(restarted.actor.stop.remote(), timeout=WAIT_S)
    ray.kill(restarted.actor)


def test_the_object_store_is_filled_only_up_to_the_limit(cluster: None, store: Path) -> None:
    segment = Segment(store)
    keys = sorted(segment.manifest.experts)
    size = locate(segment.manifest, CODES).num_bytes
    objects = OwnedObjects(segment, ray.put, max_put_bytes=2 * size)
    asked = [objects.refs([RecordRequest(key, "codes")])[0] for key in keys]
    again = objects.refs([RecordRequest(key, "codes") for key in (keys[-1], keys[-2], keys[0])])
    assert again[:2] == [asked[-1], asked[-2]]
    assert again[2] != asked[0]  # had to go, and was put anew
    assert torch.equal(
        torch.tensor(ray.get(asked[0])), segment.fetch([RecordRequest(keys[0], "codes")])[0]
    )
    with pytest.raises(ValueError, match="max_put_bytes"):
        OwnedObjects(segment, ray.put, max_put_bytes=0)


def test_it_announces_itself_where_it_is_told_to(
    cluster: None, store: Path, tmp_path: Path
) -> None:
    actor = StoreActor.options(num_cpus=0).remote(str(store), directory=file_directory(tmp_path))
    listing = status_of(actor).listing
    ray.get(actor.stop.remote(), timeout=WAIT_S)
    told = (tmp_path / "told").read_text().splitlines()
    assert told[0] == f"announce {listing.to_json()}"
    assert told[-2:] == [f"withdraw {listing.name}", "close"]
    ray.kill(actor)


def file_directory(folder: Path) -> OpenDirectory:
    """Opens a directory that writes down what it is told; sent to the actor by value."""

    class FileDirectory:
        def __init__(self) -> None:
            self._file = folder / "told"

        def _tell(self, line: str) -> None:
            with self._file.open("a") as file:
                file.write(line + "\n")

        def announce(self, listing: object) -> None:
            self._tell(f"announce {listing.to_json()}")

        def withdraw(self, name: str) -> None:
            self._tell(f"withdraw {name}")

        def close(self) -> None:
            self._tell("close")

    return FileDirectory
