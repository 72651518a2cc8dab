"""Rules of our own over a whole deployment: budgets, drain times, Secrets, dashboards, and room.

Pure functions over all documents of one overlay, the config in its args, and the names of metrics.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from cluster.config import ClusterConfig
from cluster.deploy.network_rules import pod_labels
from cluster.operator_rules import groups, template
from cluster.pod_rules import pods, quantity
from cluster.settings import OUTLAST_S, split_label

Mapped = Mapping[str, Any]

TOKEN_S = 0.05
"""What one token of an answer is taken to need: 20 a second, a guess on the slow side."""
ANSWER_TOKENS = 4096
"""The longest answer to expect where worker.max_context does not bound it."""
DRAIN_SECONDS = re.compile(r"^\d+$")
METRIC = re.compile(r"\bmoetier_[a-z_]+")
SECRET_KEYS = ("secretKeyRef", "secretName")


def whole_problems(
    documents: Sequence[Mapped],
    rayservice: Mapped,
    config: ClusterConfig,
    *,
    metrics: Collection[str],
) -> Iterator[str]:
    """Every breach, as "place: what is wrong"."""
    cluster = rayservice["spec"].get("rayClusterConfig") or {}
    yield from budget_problems(documents, cluster)
    yield from drain_problems(cluster, config)
    yield from answer_problems(config)
    yield from placement_problems(cluster, config)
    yield from secret_problems(documents)
    yield from dashboard_problems(documents, metrics)
    yield from selector_problems(documents, cluster)
    if config.http.replicas < 2:
        yield f"args: http.replicas: got {config.http.replicas}, expected 2 or more"


def budget_problems(documents: Sequence[Mapped], cluster: Mapped) -> Iterator[str]:
    """One that selects no pod protects nothing; one without disruptions blocks every drain."""
    for document in documents:
        if document["kind"] != "PodDisruptionBudget":
            continue
        spec, name = document["spec"], document["metadata"]["name"]
        wanted = (spec.get("selector") or {}).get("matchLabels") or {}
        chosen = [
            group for _, group in groups(cluster) if wanted.items() <= pod_labels(group).items()
        ]
        if not wanted or not chosen:
            yield f"PodDisruptionBudget/{name}: selects no pod of ours"
        least = sum(group.get("minReplicas") or 0 for group in chosen)
        if spec.get("maxUnavailable") == 0 or (
            isinstance(spec.get("minAvailable"), int) and spec["minAvailable"] >= least > 0
        ):
            yield f"PodDisruptionBudget/{name}: no pod may ever be moved, so no node be drained"


def drain_problems(cluster: Mapped, config: ClusterConfig) -> Iterator[str]:
    """A pod has to have the time that its preStop and Serve take together.

    Ray ends a node that drains when preStop's seconds are up, so those have to be enough for Serve.
    """
    serve_s = config.replicas.drain_s + OUTLAST_S
    for group in cluster.get("workerGroupSpecs") or []:
        place, pod = f"workerGroupSpecs[{group.get('groupName')}]", template(group)
        hook = ((pod.get("containers") or [{}])[0].get("lifecycle") or {}).get("preStop") or {}
        command = [str(word) for word in (hook.get("exec") or {}).get("command") or []]
        if "cluster.drain" not in command:
            yield f"{place}: lifecycle.preStop: expected python -m cluster.drain"
            continue
        given = command[command.index("--seconds") + 1 :] if "--seconds" in command else []
        if not given or not DRAIN_SECONDS.match(given[0]):
            yield f"{place}: lifecycle.preStop: expected --seconds N"
            continue
        if int(given[0]) < serve_s:
            yield (
                f"{place}: lifecycle.preStop: --seconds: got {given[0]}, expected {serve_s:g} or "
                f"more, replicas.drain_s and {OUTLAST_S:g}: answers would be cut before"
            )
        needed_s = int(given[0]) + serve_s
        grace_s = pod.get("terminationGracePeriodSeconds", 30)
        if grace_s < needed_s:
            yield (
                f"{place}: terminationGracePeriodSeconds: got {grace_s}, expected {needed_s:g} or "
                f"more: {given[0]} of preStop and {serve_s:g} of Serve"
            )


def answer_problems(config: ClusterConfig) -> Iterator[str]:
    """A worker that is stopped, by a scale-down or a rollout, has to end its longest answers."""
    tokens = config.worker.max_context or ANSWER_TOKENS
    longest_s = min(config.http.request_timeout_s, tokens * TOKEN_S)
    if config.replicas.drain_s < longest_s:
        yield (
            f"args: replicas.drain_s: got {config.replicas.drain_s:g}, expected {longest_s:g} or "
            f"more: an answer of {tokens} tokens at {TOKEN_S * 1000:g} ms each is cut when its "
            "worker is stopped; raise it, or bound worker.max_context or http.request_timeout_s"
        )


def placement_problems(cluster: Mapped, config: ClusterConfig) -> Iterator[str]:
    """Each kind of actor needs a group with its label, room, and as many pods as it has copies."""
    head = cluster.get("headGroupSpec") or {}
    if (head.get("rayStartParams") or {}).get("num-cpus") != "0":
        yield 'headGroupSpec: rayStartParams.num-cpus: expected "0", so that nothing runs there'
    if head.get("labels"):
        yield "headGroupSpec: labels: expected none; a label would draw actors to the head"
    on_gpu = config.worker.device == "cuda"
    needs = [
        ("store", config.store.label, 0.0, 0.0, config.store.replicas),
        (
            "worker",
            config.replicas.label,
            config.replicas.num_cpus,
            (config.replicas.num_gpus or 1.0) if on_gpu else 0.0,
            1,
        ),
    ]
    if config.ndp.enabled:
        threads = float(config.ndp.num_threads or 1)
        needs.append(("ndp", config.ndp.label, threads, 0.0, config.ndp.replicas))
    for actor, label, num_cpus, num_gpus, copies in needs:
        homes = [
            group
            for group in cluster.get("workerGroupSpecs") or []
            if split_label(label).items() <= (group.get("labels") or {}).items()
            and _limit(group, "cpu") >= num_cpus
            and _limit(group, "nvidia.com/gpu") >= num_gpus
        ]
        if not homes:
            yield f"{actor}: no group with {label}, {num_cpus:g} CPUs and {num_gpus:g} GPUs"
        elif sum(group.get("minReplicas") or 0 for group in homes) < copies:
            yield f"{actor}: {copies} copies, but fewer pods at least in the groups with {label}"


def secret_problems(documents: Sequence[Mapped]) -> Iterator[str]:
    """Values of Secrets do not belong into what is committed or printed."""
    for document in documents:
        if document["kind"] == "Secret":
            yield f"Secret/{document['metadata']['name']}: a Secret among the manifests"
        for place, pod, _ in pods(document):
            for container in [*(pod.get("initContainers") or []), *(pod.get("containers") or [])]:
                for item in container.get("env") or []:
                    name = str(item.get("name"))
                    if re.search(r"(?i)password|token|secret", name) and item.get("value"):
                        yield f"{document['kind']}: {place}: env {name}: use a secretKeyRef"


def needed_secrets(documents: Sequence[Mapped]) -> tuple[tuple[str, str], ...]:
    """(Secret, key) of every reference in the documents, sorted."""
    found: set[tuple[str, str]] = set()
    for document in documents:
        for value in _mappings(document):
            reference = value.get("secretKeyRef")
            if isinstance(reference, Mapping):
                found.add((str(reference["name"]), str(reference["key"])))
            if value.get("mode") == "token" and value.get("secretName"):
                found.add((str(value["secretName"]), "auth_token"))
    return tuple(sorted(found))


def dashboard_problems(documents: Sequence[Mapped], metrics: Collection[str]) -> Iterator[str]:
    """Every metric of ours that a dashboard asks for is one that the server tells."""
    for document in documents:
        if document["kind"] != "ConfigMap":
            continue
        for name, text in (document.get("data") or {}).items():
            if not name.endswith(".json"):
                continue
            place = f"ConfigMap/{document['metadata']['name']}: {name}"
            try:
                panels = json.loads(text)["panels"]
            except (ValueError, KeyError, TypeError) as error:
                yield f"{place}: no Grafana dashboard: {error!r}"
                continue
            asked = {metric for panel in panels for metric in METRIC.findall(json.dumps(panel))}
            for metric in sorted(asked - set(metrics)):
                yield f"{place}: {metric} is no metric of ours"


def selector_problems(documents: Sequence[Mapped], cluster: Mapped) -> Iterator[str]:
    """Services, monitors and policies that select nothing."""
    pods_labels = [pod_labels(group) for _, group in groups(cluster)]
    services = []
    for document in documents:
        spec = document.get("spec") or {}
        if document["kind"] in ("Job", "StatefulSet", "Deployment"):
            pods_labels.append((spec.get("template") or {}).get("metadata", {}).get("labels") or {})
        if document["kind"] == "Service":
            services.append(document["metadata"].get("labels") or {})
    for document in documents:
        spec, kind = document.get("spec") or {}, document["kind"]
        if kind == "Service":
            wanted, among = spec.get("selector") or {}, pods_labels
        elif kind == "NetworkPolicy":
            wanted, among = (spec.get("podSelector") or {}).get("matchLabels") or {}, pods_labels
        elif kind == "PodMonitor":
            wanted, among = spec["selector"].get("matchLabels") or {}, pods_labels
        elif kind == "ServiceMonitor":
            wanted, among = spec["selector"].get("matchLabels") or {}, services
        else:
            continue
        if not any(wanted.items() <= labels.items() for labels in among):
            yield f"{kind}/{document['metadata']['name']}: selects nothing of this deployment"


def _limit(group: Mapped, name: str) -> float:
    container = (template(group).get("containers") or [{}])[0]
    limits = (container.get("resources") or {}).get("limits") or {}
    return float(quantity(limits.get(name, 0)))


def _mappings(value: object) -> Iterator[Mapped]:
    if isinstance(value, Mapping):
        yield value
        for item in value.values():
            yield from _mappings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _mappings(item)
