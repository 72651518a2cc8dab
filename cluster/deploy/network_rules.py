"""Network policies against what really talks to what: an evaluator of NetworkPolicy, and our flows.

A flow that must pass and does not, or must not and does, is a problem. Pure; knows TCP ports,
labels of pods and of namespaces, and no addresses (a rule with an ipBlock lets nothing of ours by).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.config import ClusterConfig
from cluster.operator_rules import groups
from cluster.settings import split_ports

Mapped = Mapping[str, Any]

COMPONENT = "moetier.io/component"
GCS_PORT = 6379
DASHBOARD_PORT = 8265
PINNED = (
    "node-manager-port",
    "object-manager-port",
    "runtime-env-agent-port",
    "dashboard-agent-grpc-port",
    "dashboard-agent-listen-port",
    "metrics-export-port",
)
"""Start parameters of ports that other nodes connect to; unset, Ray takes any free one."""


@dataclass(frozen=True, slots=True)
class Pod:
    """One end of a flow. `labels` None is something that is no pod (a machine, the internet)."""

    name: str
    labels: Mapping[str, str] | None
    is_ours: bool = True  # in our namespace
    namespace: str = "moetier"


@dataclass(frozen=True, slots=True)
class Flow:
    source: Pod
    target: Pod
    port: int
    why: str
    must_pass: bool = True
    protocol: str = "TCP"


OPERATOR = Pod("the operator", {"app.kubernetes.io/name": "kuberay-operator"}, False, "kuberay")
STRANGER = Pod("any other pod", {"app": "stranger"}, False, "elsewhere")
DNS = Pod("DNS", {"k8s-app": "kube-dns"}, False, "kube-system")
PROMETHEUS = Pod("Prometheus", {"app.kubernetes.io/name": "prometheus"}, False, "monitoring")


def network_problems(
    documents: Sequence[Mapped], rayservice: Mapped, config: ClusterConfig
) -> Iterator[str]:
    """Flows of a whole deployment that go wrong, and ports that have no number."""
    policies = [each for each in documents if each["kind"] == "NetworkPolicy"]
    cluster = rayservice["spec"].get("rayClusterConfig") or {}
    for place, group in groups(cluster):
        yield from unpinned_ports(place, group.get("rayStartParams") or {})
    for section in ("store", "ndp"):
        if getattr(config, section).port_range is None:
            yield f"args: {section}.port_range: nothing given, so no policy can let its port by"
    for flow in flows(documents, cluster, config):
        if passes(flow, policies) != flow.must_pass:
            verb = "cannot reach" if flow.must_pass else "can reach"
            yield (
                f"NetworkPolicy: {flow.source.name} {verb} {flow.target.name} on "
                f"{flow.protocol} {flow.port} ({flow.why})"
            )


def unpinned_ports(place: str, params: Mapped) -> Iterator[str]:
    for name in (*PINNED, "min-worker-port", "max-worker-port"):
        if not str(params.get(name) or "").isdecimal():
            yield f"{place}: rayStartParams.{name}: expected a port number, for the NetworkPolicy"


def flows(documents: Sequence[Mapped], cluster: Mapped, config: ClusterConfig) -> Iterator[Flow]:
    """What must pass between the pods of a deployment, and what must not."""
    ray = [Pod(place, pod_labels(group)) for place, group in groups(cluster)]
    params = [group.get("rayStartParams") or {} for _, group in groups(cluster)]
    head = ray[0]
    for source in ray:
        yield Flow(source, head, GCS_PORT, "GCS")
        yield from (Flow(source, DNS, 53, "names", protocol=p) for p in ("TCP", "UDP"))
        for target, given in zip(ray, params, strict=True):
            for port, why in group_ports(given, config):
                yield Flow(source, target, port, why)
    yield Flow(OPERATOR, head, DASHBOARD_PORT, "Serve's REST API")
    yield Flow(STRANGER, head, GCS_PORT, "GCS", must_pass=False)
    yield Flow(STRANGER, head, DASHBOARD_PORT, "dashboard", must_pass=False)
    for target, given in zip(ray, params, strict=True):
        for port, why in group_ports(given, config):
            yield Flow(STRANGER, target, port, why, must_pass=False)
        if target is not head:
            yield Flow(STRANGER, target, config.http.port, "requests")
        metrics = number(given, "metrics-export-port")
        if metrics is not None:
            yield Flow(PROMETHEUS, target, metrics, "metrics")
    options = cluster.get("gcsFaultToleranceOptions") or {}
    yield from redis_flows(documents, str(options.get("redisAddress") or ""), ray, config)


def redis_flows(
    documents: Sequence[Mapped], address: str, ray: Sequence[Pod], config: ClusterConfig
) -> Iterator[Flow]:
    """To a Redis that is ours, of which nobody else may ask anything, or to one elsewhere."""
    users = ray if config.directory.kind == "redis" else ray[:1]
    host, _, port = address.rpartition(":")
    if not port.isdecimal():
        return
    for document in documents:
        if document["kind"] == "StatefulSet" and document["metadata"]["name"] == host:
            redis = Pod("Redis", document["spec"]["template"]["metadata"]["labels"])
            yield Flow(STRANGER, redis, int(port), "state", must_pass=False)
            break
    else:
        redis = Pod("Redis", None, is_ours=False)
    yield from (Flow(source, redis, int(port), "state") for source in users)


def group_ports(params: Mapped, config: ClusterConfig) -> Iterator[tuple[int, str]]:
    """The ports that other Ray pods connect to on a pod of this group; of ranges both ends."""
    for name in (*PINNED, "min-worker-port", "max-worker-port"):
        port = number(params, name)
        if port is not None:
            yield port, name
    for section in ("store", "ndp"):
        for port in split_ports(getattr(config, section).port_range) or ():
            yield port, f"{section}.port_range"


def number(params: Mapped, name: str) -> int | None:
    text = str(params.get(name) or "")
    return int(text) if text.isdecimal() else None


def pod_labels(group: Mapped) -> Mapping[str, str]:
    labels: Mapping[str, str] = ((group.get("template") or {}).get("metadata") or {}).get(
        "labels"
    ) or {}
    return labels


def passes(flow: Flow, policies: Sequence[Mapped]) -> bool:
    """Whether a connection can be made: each end lets it by, or has no policy in that direction."""
    return _lets(flow, policies, "Egress") and _lets(flow, policies, "Ingress")


def _lets(flow: Flow, policies: Sequence[Mapped], way: str) -> bool:
    ours, other = (flow.source, flow.target) if way == "Egress" else (flow.target, flow.source)
    if not ours.is_ours or ours.labels is None:
        return True
    rules_key, peers_key = ("egress", "to") if way == "Egress" else ("ingress", "from")
    chosen = [
        policy["spec"]
        for policy in policies
        if _selects(policy["spec"].get("podSelector") or {}, ours.labels)
        and way in (policy["spec"].get("policyTypes") or ["Ingress"])
    ]
    if not chosen:
        return True
    rules = [rule for spec in chosen for rule in spec.get(rules_key) or []]
    return any(
        _peer(rule.get(peers_key), other) and _port(rule.get("ports"), flow) for rule in rules
    )


def _peer(peers: Sequence[Mapped] | None, pod: Pod) -> bool:
    if not peers:
        return True
    return any(_is_peer(peer, pod) for peer in peers)


def _is_peer(peer: Mapped, pod: Pod) -> bool:
    if "ipBlock" in peer or pod.labels is None:
        return False
    if "namespaceSelector" in peer:
        names = {"kubernetes.io/metadata.name": pod.namespace}
        if not _selects(peer["namespaceSelector"] or {}, names):
            return False
    elif not pod.is_ours:
        return False
    return _selects(peer.get("podSelector") or {}, pod.labels)


def _port(ports: Sequence[Mapped] | None, flow: Flow) -> bool:
    if not ports:
        return True
    return any(
        each.get("protocol", "TCP") == flow.protocol
        and (
            "port" not in each
            or each["port"] == flow.port
            or ("endPort" in each and each["port"] <= flow.port <= each["endPort"])
        )
        for each in ports
    )


def _selects(selector: Mapped, labels: Mapping[str, str]) -> bool:
    """Of matchLabels and of matchExpressions with In, NotIn, Exists, DoesNotExist."""
    if any(labels.get(key) != value for key, value in (selector.get("matchLabels") or {}).items()):
        return False
    for each in selector.get("matchExpressions") or []:
        there, values = labels.get(each["key"]), each.get("values") or []
        fits = {
            "In": there in values,
            "NotIn": there not in values,
            "Exists": there is not None,
            "DoesNotExist": there is None,
        }
        if not fits.get(each["operator"], False):
            return False
    return True
