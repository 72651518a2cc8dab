"""`python -m benchmarks.deploy_try OVERLAY...`: run overlays without Kubernetes, send requests.

Every pod of the rendered manifest becomes a host of its own on this machine (namespaces of network,
processes and mounts), with the manifest's own `ray start` parameters, labels, volumes, Secrets,
init containers and Serve config. Needs root, iproute2, util-linux, kubectl and, for most overlays,
redis-server; about two minutes each.
"""

from __future__ import annotations

import argparse
import datetime
import logging
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.deploy_parts.trial import Report, Trial
from benchmarks.faults.hosts import check_machine
from benchmarks.offload_parts.hosts import HostsUnavailable
from cluster.deploy.kustomize import DEFAULT_FOLDER, render
from cluster.stores import bundled_store

OVERLAYS = ("cpu-local", "gpu-small", "gpu-ha")
REQUESTS = 24
PAGE = Path(__file__).parent / "results" / "deploy-behaviour.md"
WORK_ROOT = "/var/tmp"
"""Not /tmp, of which every host has its own."""
NOT_TRIED = """
Not as in a cluster: there is no API server, operator, kubelet or image; probes, limits of cores and
memory, users and network policies are not enforced, and all hosts share this machine's cores. The
operator's part (words of `ray start`, RAY_AUTH_TOKEN, Redis for the head) is ours, from KubeRay's
own rules. KubeRay's autoscaler did not run. No GPU: a GPU is a number that Ray counts.
"""


def check_tools() -> None:
    """Raises HostsUnavailable when this machine cannot run an overlay, saying what is missing."""
    check_machine()
    missing = [tool for tool in ("kubectl", "redis-server") if shutil.which(tool) is None]
    if missing:
        raise HostsUnavailable(f"{', '.join(missing)} not found; an overlay needs them here")


def attempt(overlay: str, *, requests: int = REQUESTS) -> Report:
    """Run one overlay on the bundled model's store, and leave nothing.

    Raises HostsUnavailable, and RuntimeError when it does not come up, with the end of a log.
    """
    documents = render(DEFAULT_FOLDER, overlay)
    with (
        tempfile.TemporaryDirectory(prefix="moetier-deploy-", dir=WORK_ROOT) as folder,
        Trial(overlay, documents, bundled_store(), Path(folder)) as trial,
    ):
        return trial.run(requests)


def page(reports: Sequence[Report]) -> str:
    """What was started from which fields, and what was answered, in Markdown."""
    today = datetime.datetime.now(tz=datetime.UTC).date().isoformat()
    lines = [
        "# Overlays that ran",
        "",
        f"Written by `python -m benchmarks.deploy_try` on {today}: each pod is a host of its own",
        "(namespaces of network, processes and mounts) of one machine with "
        f"{os.cpu_count()} cores.",
        "",
        "| overlay | pods | until it ran, s | requests | answered | not as promised |",
        "|---|---|---|---|---|---|",
    ]
    for report in reports:
        answered = sum(not each.problem for each in report.asked)
        lines.append(
            f"| {report.overlay} | {len(report.pods)} | {report.started_s:.0f} | "
            f"{len(report.asked)} | {answered} | {'; '.join(report.problems) or 'nothing'} |"
        )
    for report in reports:
        lines += ["", *_overlay(report)]
    return "\n".join(lines) + "\n" + NOT_TRIED


def _overlay(report: Report) -> Iterator[str]:
    yield f"## {report.overlay}"
    yield ""
    yield "| pods | made from | ran |"
    yield "|---|---|---|"
    by_fields: dict[tuple[str, ...], list[str]] = {}
    for pod in report.pods:
        by_fields.setdefault(pod.fields, []).append(pod.name)
    for fields, names in by_fields.items():
        ran = [
            f"{count} {deployment}"
            for deployment, places in report.replicas.items()
            if (count := sum(place in names for place in places))
        ]
        yield f"| {', '.join(names)} | {'; '.join(fields)} | {', '.join(ran) or '-'} |"
    yield ""
    streams = sum(each.is_stream for each in report.asked)
    yield (
        f"Changed in `serveConfigV2`: {', '.join(report.changes) or 'nothing'}. "
        f"{len(report.asked)} requests, {streams} of them streams, to every pod that was ready."
    )


def main() -> int:
    """0 when every overlay did as its manifest promises, 1 when not, 2 when none can run here."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overlays", nargs="*", metavar="OVERLAY", help=f"{' '.join(OVERLAYS)}")
    parser.add_argument("--requests", type=int, default=REQUESTS)
    parser.add_argument("--output", type=Path, metavar="FILE", help=f"with all: {PAGE}")
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s")
    logging.getLogger("benchmarks").setLevel(logging.INFO)
    # So that SIGTERM too takes the way through which every host is ended.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        check_tools()
        reports = []
        for overlay in args.overlays or OVERLAYS:
            reports.append(attempt(overlay, requests=args.requests))
    except (HostsUnavailable, ValueError) as error:
        sys.stderr.write(f"deploy_try: {error}\n")
        return 2
    except RuntimeError as error:
        sys.stderr.write(f"deploy_try: {error}\n")
        return 1
    text = page(reports)
    print(text)
    output = args.output or (None if args.overlays else PAGE)
    if output is not None:
        output.write_text(text, encoding="utf-8")
    return 1 if any(report.problems for report in reports) else 0


if __name__ == "__main__":
    sys.exit(main())
