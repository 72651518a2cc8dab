"""What the deployment tests share: the rendered kustomizations and KubeRay's CRDs, each made once.

The CRDs are taken from $MOETIER_CRDS or ../shared/kuberay; kubectl from PATH. Where one is missing
the tests that need it are skipped and say so.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from cluster.manifests import load_crds, parse_documents

ROOT = Path(__file__).resolve().parents[2]
KUSTOMIZATIONS = (
    "deploy/base",
    "deploy/overlays/cpu-local",
    "deploy/overlays/gpu-ha",
    "deploy/overlays/gpu-object-storage",
    "deploy/overlays/gpu-small",
)


@pytest.fixture(scope="session")
def crds() -> dict[tuple[str, str], dict[str, Any]]:
    folder = Path(os.environ.get("MOETIER_CRDS", ROOT.parent / "shared" / "kuberay"))
    if not folder.is_dir():
        pytest.skip(f"no KubeRay CRDs in {folder}; put them there or set MOETIER_CRDS")
    return load_crds(folder)


@pytest.fixture(scope="session")
def rendered() -> dict[str, list[dict[str, Any]]]:
    """Kustomization -> its documents, as `kubectl apply -k` would send them."""
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("kubectl is not installed, so the kustomizations cannot be rendered")
    documents = {}
    for name in KUSTOMIZATIONS:
        done = subprocess.run(
            [kubectl, "kustomize", str(ROOT / name)], capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, f"{name}: {done.stderr}"
        documents[name] = parse_documents(done.stdout)
    return documents


@pytest.fixture(params=KUSTOMIZATIONS)
def documents(request, rendered) -> list[dict[str, Any]]:
    """The documents of one kustomization."""
    return rendered[request.param]


@pytest.fixture
def rayservice(documents) -> dict[str, Any]:
    (found,) = [document for document in documents if document["kind"] == "RayService"]
    return found
