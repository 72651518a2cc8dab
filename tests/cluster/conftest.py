"""What the command tests share: a cache folder of their own with the bundled model's store."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from cluster import cli
from cluster.stores import bundled_store


@pytest.fixture(scope="session")
def mini_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A MOETIER_CACHE that holds the bundled model's store (about 4 s to make, once)."""
    folder = tmp_path_factory.mktemp("moetier-cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOETIER_CACHE", str(folder))
        bundled_store()
    return folder


@pytest.fixture
def moetier(
    mini_cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Runs the command in this process: exit code, stdout, stderr."""
    monkeypatch.setenv("MOETIER_CACHE", str(mini_cache))

    def run(*arguments: object) -> tuple[int, str, str]:
        code = cli.main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


MEMORY_LABELS = {"moetier.io/store": "true", "moetier.io/ndp": "true"}


@pytest.fixture
def nodes() -> Iterator[Any]:
    """A Ray cluster of this machine: a head without workloads, and three memory nodes."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    try:
        for _ in range(3):
            cluster.add_node(num_cpus=1, labels=MEMORY_LABELS)
        ray.init(address=cluster.address, log_to_driver=False, configure_logging=False)
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()
