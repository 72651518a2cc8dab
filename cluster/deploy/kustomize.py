"""Overlays of a deploy folder, rendered by kubectl: the documents that `kubectl apply -k` sends."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

from cluster.manifests import parse_documents

DEFAULT_FOLDER = Path(__file__).resolve().parents[2] / "deploy"
BASE = "base"
TIMEOUT_S = 60.0


def overlays(folder: Path) -> tuple[str, ...]:
    """The names that can be rendered: base, then the overlays.

    Raises ValueError for a folder that is no deploy folder.
    """
    if not (folder / BASE / "kustomization.yaml").is_file():
        raise ValueError(
            f"{folder}: expected moetier's deploy folder, with base/ and overlays/ in it; it is in "
            "the repository, not in the installed package: give it with --folder"
        )
    found = sorted(path.parent.name for path in folder.glob("overlays/*/kustomization.yaml"))
    return (BASE, *found)


def render(folder: Path, name: str) -> list[dict[str, Any]]:
    """The documents of one overlay.

    Raises ValueError for a name that is not there, without kubectl, and when kubectl refuses.
    """
    known = overlays(folder)
    if name not in known:
        raise ValueError(f"overlay: got {name!r}, expected one of {', '.join(known)}")
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        raise ValueError(
            "kubectl is not on the PATH, and it renders the kustomizations; install it "
            "(https://kubernetes.io/docs/tasks/tools/), no cluster is needed"
        )
    path = folder / name if name == BASE else folder / "overlays" / name
    try:
        done = subprocess.run(
            [kubectl, "kustomize", str(path)], capture_output=True, text=True, timeout=TIMEOUT_S
        )
    except subprocess.TimeoutExpired as error:
        raise ValueError(f"{path}: kubectl kustomize took over {TIMEOUT_S:g} s") from error
    if done.returncode != 0:
        raise ValueError(f"{path}: kubectl kustomize: {done.stderr.strip()[-2000:]}")
    return parse_documents(done.stdout)
