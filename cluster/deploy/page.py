"""The page of `moetier deploy validate --output`: every check of every overlay, and what is not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from cluster.deploy.checks import Check
from cluster.deploy.schemas import KUBERNETES

NOT_CHECKED = """\
Not checked, since there is no cluster here: an API server's admission, the operator itself, a
kubelet's probes, and whether the images of others (redis, rclone) can be pulled. The kinds of
Prometheus' operator are compared with a small schema of ours, not with its CRDs. CEL rules that
speak of `oldSelf` are about changes, and hold for anything new.
"""


def validation_page(found: Mapping[str, Sequence[Check]], crds: str | None, *, date: str) -> str:
    """Markdown: overlays as columns, checks as rows, then every problem."""
    names = list(found)
    rows: dict[str, dict[str, str]] = {}
    for overlay, checks in found.items():
        for check in checks:
            rows.setdefault(check.name, {})[overlay] = check.outcome
    lines = [
        "# Validation of the deployment",
        "",
        f"Written by `moetier deploy validate --all --output FILE` on {date}. Kubernetes schemas "
        f"{KUBERNETES}; KubeRay's CRDs {'given' if crds else 'not given'}.",
        "",
        f"| check | {' | '.join(names)} |",
        f"|---|{'---|' * len(names)}",
    ]
    for row, outcomes in rows.items():
        cells = " | ".join(outcomes.get(name, "") for name in names)
        lines.append(f"| {row} | {cells} |")
    problems = [
        f"- {name}: {problem}"
        for name, checks in found.items()
        for check in checks
        for problem in check.problems
    ]
    lines += ["", *(problems or ["No problems were found."]), "", NOT_CHECKED.rstrip()]
    return "\n".join(lines) + "\n"
