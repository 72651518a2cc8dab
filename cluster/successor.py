"""Whether a store may take the place of the one that is served, and what a Serve file says for it.

Pure but for reading the stores. Knows no Ray; the rolling itself is `cluster/rollout.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from cluster.config import ClusterConfig
from cluster.deployed import Deployed
from cluster.door import check_store, check_worker
from expert_store.errors import CorruptRecordError
from expert_store.format import is_store, load_manifest
from expert_store.types import Manifest
from expert_store.verify import verify

MARKER = "MOETIER_STORE"
"""Set in a GPU worker's environment by a Serve file. Nobody reads it: Serve restarts replicas whose
ray_actor_options changed, and only those."""


def with_store(config: ClusterConfig, store: Path) -> ClusterConfig:
    """The same cluster over another store."""
    path = str(store.expanduser().absolute())
    return replace(config, store=replace(config.store, path=path))


def check_release(deployed: Deployed, release: str) -> None:
    """Raises ValueError unless this moetier can change that deployment and only its workers."""
    if deployed.by == "serve":
        raise ValueError(
            "the application there was deployed from a Serve config file, which would bring back "
            "its own store: put what `moetier rollout --print` says into that file and apply it"
        )
    if deployed.release != release:
        raise ValueError(
            f"the cluster runs moetier {deployed.release}, this is {release}: it would replace the "
            "tiers too; run rollout with the release that the cluster runs"
        )


def check_successor(config: ClusterConfig, served: Path, *, force: bool) -> Manifest:
    """The manifest of `config`'s store, every checksum of which was read.

    `served` is the store whose place it takes: its model's name must be the same without `force`.
    Sizes and tokenizer may differ. Raises ValueError for a store that does not fit,
    StoreFormatError or CorruptRecordError for one that is not whole.
    """
    manifest = check_fit(config)
    if is_store(served) and not force:
        before = load_manifest(served).model.name
        if manifest.model.name != before:
            raise ValueError(
                f"STORE: got a store of the model {manifest.model.name!r}, the cluster serves "
                f"{before!r}; use --force if that is meant"
            )
    damage = verify(Path(config.store.path)).damage
    if damage:
        raise CorruptRecordError(
            f"{config.store.path} is damaged in {len(damage)} places, first {damage[0]}; "
            "`moetier verify` names all"
        )
    return manifest


def check_fit(config: ClusterConfig) -> Manifest:
    """The manifest of `config`'s store. Raises ValueError when there is none, or when the worker's
    settings do not fit it.
    """
    manifest = check_store(config.store)
    check_worker(config.worker, manifest, is_here=False)
    return manifest


def serve_file_section(config: ClusterConfig, ray_actor_options: Mapping[str, Any]) -> str:
    """YAML for `applications[].deployments` of a Serve config file that rolls to `config`'s store.

    `args` of the application stay as they are: any change there restarts every deployment.
    `ray_actor_options` are a GPU worker's own, since a file's replace them.
    """
    store = config.store.path
    options = {**ray_actor_options, "runtime_env": {"env_vars": {MARKER: store}}}
    sections = [
        {"name": "TierManager", "user_config": {"store": store}},
        {"name": "GpuWorker", "user_config": {"store": store}, "ray_actor_options": options},
    ]
    return yaml.safe_dump({"deployments": sections}, sort_keys=False)
