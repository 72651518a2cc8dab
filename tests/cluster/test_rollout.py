"""Goal: a rollout changes the GPU workers alone, and refuses what must not be rolled out.

Method: the application is built for two stores and its deployments' versions are compared, as Serve
compares them; stores made by hand are checked against each other. Ray is in test_rollout_ray.py.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hand_store import build_store
from ray.serve._private.build_app import build_app
from ray.serve.schema import ServeDeploySchema

from cluster.app import build
from cluster.cli import installed_version
from cluster.config import ClusterConfig, config_from_mapping
from cluster.deployed import Deployed
from cluster.deployments import compose, worker_options
from cluster.rollout import progress
from cluster.successor import (
    MARKER,
    check_release,
    check_successor,
    serve_file_section,
    with_store,
)
from expert_store.errors import CorruptRecordError, StoreFormatError
from expert_store.format import content_version, load_manifest, save_manifest
from gpu_worker.actor import GpuWorker, WorkerSettings
from gpu_worker.config import WorkerConfig
from gpu_worker.messages import WorkerStats


def config_for(store: str | Path, **http: Any) -> ClusterConfig:
    args = {"store": {"path": str(store)}, "http": http, "replicas": {"label": None}}
    return config_from_mapping(args, source="test").resolve()


def deployments(config: ClusterConfig, **how: Any) -> dict[str, Any]:
    built = build_app(compose(config, **how), name="test")
    return {each.name: each for each in built.deployments}


def changed(before: dict[str, Any], after: dict[str, Any]) -> set[str]:
    """The deployments whose replicas Serve would restart."""
    return {name for name in before if before[name]._version != after[name]._version}


def test_another_store_restarts_the_workers_alone() -> None:
    first = deployments(config_for("/a"))
    assert all(each._version for each in first.values())
    assert changed(first, deployments(config_for("/a"))) == set(), "the same again changes nothing"
    second = deployments(config_for("/b"), previous_store="/a")
    assert changed(first, second) == {"GpuWorker"}
    for name in ("GpuWorker", "TierManager"):
        assert second[name]._deployment_config.user_config == {"store": "/b"}
    assert changed(first, deployments(config_for("/a", max_queued=3))) == {"Ingress"}


def test_the_ingress_remembers_what_is_deployed() -> None:
    config = config_for("/b", port=1234)
    ingress = deployments(config, previous_store="/a")["Ingress"]
    told = json.loads(json.dumps(ingress._deployment_config.user_config))
    assert Deployed.of_mapping(told) == Deployed(config, "moetier", installed_version(), "/a")
    by_file = build_app(build({"store": {"path": "/b"}}), name="test").deployments
    (told,) = [d._deployment_config.user_config for d in by_file if d.name == "Ingress"]
    assert Deployed.of_mapping(told).by == "serve"
    with pytest.raises(ValueError, match="got by 'who'"):
        Deployed.of_mapping({**told, "by": "who"})


def test_only_a_cluster_of_this_release_and_command_is_rolled() -> None:
    ours = Deployed(config_for("/a"), "moetier", "1.2")
    check_release(ours, "1.2")
    with pytest.raises(ValueError, match=r"runs moetier 1\.2, this is 1\.3"):
        check_release(ours, "1.3")
    with pytest.raises(ValueError, match="rollout --print"):
        check_release(replace(ours, by="serve"), "1.2")


@pytest.fixture
def stores(tmp_path: Path) -> tuple[Path, Path]:
    build_store(tmp_path / "a")
    build_store(tmp_path / "b", seed=1)
    return tmp_path / "a", tmp_path / "b"


def test_a_store_that_fits_is_taken(stores: tuple[Path, Path]) -> None:
    served, store = stores
    manifest = check_successor(with_store(config_for(served), store), served, force=False)
    assert manifest.version == load_manifest(store).version != load_manifest(served).version


def test_another_models_store_needs_force(stores: tuple[Path, Path]) -> None:
    served, store = stores
    manifest = load_manifest(store)
    other = replace(manifest, model=replace(manifest.model, name="other"))
    save_manifest(store, replace(other, version=content_version(other)))
    config = with_store(config_for(served), store)
    with pytest.raises(ValueError, match=r"the model 'other', the cluster serves .*--force"):
        check_successor(config, served, force=False)
    assert check_successor(config, served, force=True).model.name == "other"


def test_a_damaged_store_or_none_is_refused(stores: tuple[Path, Path], tmp_path: Path) -> None:
    served, store = stores
    config = with_store(config_for(served), store)
    file = next((store / "codes").iterdir())
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(CorruptRecordError, match=r"damaged in 1 places, first codes.*expected"):
        check_successor(config, served, force=True)
    (store / "manifest.json").write_text("{")
    with pytest.raises(StoreFormatError):
        check_successor(config, served, force=True)
    with pytest.raises(ValueError, match="is not a store"):
        check_successor(with_store(config, tmp_path / "none"), served, force=True)


def test_a_serve_files_section_is_in_serves_schema_and_restarts_the_workers() -> None:
    config = config_for("/b")
    section = yaml.safe_load(serve_file_section(config, worker_options(config)))
    application = {"name": "moetier", "import_path": "cluster.app:build", **section}
    schema = ServeDeploySchema.model_validate({"applications": [application]})
    tiers, worker = schema.applications[0].deployments
    assert tiers.user_config == worker.user_config == {"store": "/b"}
    options = worker.ray_actor_options.model_dump(exclude_unset=True)
    assert options["runtime_env"] == {"env_vars": {MARKER: "/b"}}
    assert options["num_cpus"] == 1


def test_progress_counts_who_reports() -> None:
    stats = [WorkerStats(str(i), 0, 0, 0, version=v) for i, v in enumerate(("a", "b", None))]
    assert progress(stats, "b") == "1 of 3 workers that report run version b"


def test_a_worker_never_changes_its_store(caplog: pytest.LogCaptureFixture) -> None:
    opened: list[str] = []

    class Opening(GpuWorker):
        async def _open(self, store: str) -> None:
            opened.append(store)
            self._store = store

        def __del__(self) -> None:  # type: ignore[override]
            """Nothing was opened."""

    async def scenario() -> None:
        worker = Opening(WorkerSettings(WorkerConfig(), 1), None, lambda *_: None)  # type: ignore[arg-type,return-value]
        for wrong in ({}, {"store": ""}, {"store": "/a", "more": 1}):
            with pytest.raises(ValueError, match="user_config of GpuWorker"):
                await worker.reconfigure(wrong)
        for store in ("/a", "/a", "/b"):
            await worker.reconfigure({"store": store})

    with caplog.at_level(logging.ERROR):
        asyncio.run(scenario())
    assert opened == ["/a"]
    assert "goes on with /a, not /b" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((), "STORE: give either"),
        (("s", "--back"), "STORE: give either"),
        (("--back", "--force"), "--back: goes with"),
        (("--back", "--print"), "--back: goes with"),
        (("s", "--address", "nowhere"), "--address: got 'nowhere'"),
    ],
)
def test_options_that_do_not_go_together(
    moetier: Callable[..., tuple[int, str, str]], arguments: tuple[str, ...], told: str
) -> None:
    code, _, stderr = moetier("rollout", *arguments)
    assert code == 2
    assert told in stderr
