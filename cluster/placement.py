"""Which node gets which actor: pure functions of what is needed and of the nodes there are.

Knows no Ray; `cluster/orchestrator.py` takes the snapshot of nodes and starts what is placed here.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from cluster.settings import NdpSettings, ReplicaSettings, StoreSettings, split_label
from expert_store.types import ExpertKey

MAX_NODES_TOLD = 16
"""Nodes that an error lists; a cluster may have thousands."""


@dataclass(frozen=True, slots=True)
class Node:
    """A live node of the cluster."""

    node_id: str
    address: str
    labels: Mapping[str, str] = field(default_factory=dict)
    resources: Mapping[str, float] = field(default_factory=dict)  # in all, not what is left


@dataclass(frozen=True, slots=True)
class Need:
    """An actor that wants a node: its label, and the resources it sets aside there."""

    name: str  # "store-0", "ndp-1", "worker-0"
    section: str  # of the config, that says the label: "store", "ndp", "replicas"
    label: str | None
    resources: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Placed:
    """An actor and the node it goes to."""

    need: Need
    node: Node
    keys: frozenset[ExpertKey] | None = None  # the experts it holds or runs; None is all


class PlacementError(ValueError):
    """No node can take an actor; the message names the label, the nodes and what to do."""


def tier_needs(
    store: StoreSettings, ndp: NdpSettings, nodes: Sequence[Node] = ()
) -> tuple[Need, ...]:
    """The store actors, then the near-data workers. They set no CPU aside for themselves.

    Where a number of replicas is not given it is `usual_replicas` of these nodes.
    """
    num_stores = store.replicas or usual_replicas(store.label, nodes)
    num_workers = (ndp.replicas or usual_replicas(ndp.label, nodes)) if ndp.enabled else 0
    stores = [Need(f"store-{i}", "store", store.label) for i in range(num_stores)]
    workers = [Need(f"ndp-{i}", "ndp", ndp.label) for i in range(num_workers)]
    return (*stores, *workers)


def labelled(label: str | None, nodes: Sequence[Node]) -> int:
    """How many nodes carry a label ("key=value"; None is any)."""
    return sum(split_label(label).items() <= node.labels.items() for node in nodes)


def usual_replicas(label: str | None, nodes: Sequence[Node]) -> int:
    """Two where two nodes carry the label, so that one may be lost; else one."""
    return max(1, min(2, labelled(label, nodes)))


def worker_need(replicas: ReplicaSettings, num_gpus: float) -> Need:
    """One GPU worker. Serve places it; this says beforehand whether it can."""
    resources = {"CPU": replicas.num_cpus, "GPU": num_gpus}
    wanted = {name: amount for name, amount in resources.items() if amount}
    return Need("worker-0", "replicas", replicas.label, wanted)


def sole_node_cpus(replicas: ReplicaSettings, cores: int) -> int:
    """CPUs that a cluster of one node must offer: its cores, or more where not all would fit."""
    most = replicas.autoscaling.max_replicas if replicas.autoscaling else replicas.num_replicas
    return max(cores, math.ceil(replicas.num_cpus * most))


def sole_node_labels(
    store: StoreSettings, ndp: NdpSettings, replicas: ReplicaSettings
) -> dict[str, str]:
    """Labels that a cluster of one node must carry so that every actor has a place.

    Raises ValueError when two sections want the same label with different values.
    """
    labels: dict[str, str] = {}
    for section, label in (
        ("store", store.label),
        ("ndp", ndp.label),
        ("replicas", replicas.label),
    ):
        for key, value in split_label(label).items():
            if labels.setdefault(key, value) != value:
                raise ValueError(
                    f"{section}.label: got {label}, but another section wants {key}={labels[key]}; "
                    "one machine cannot carry both, so use different keys or a cluster of several"
                )
    return labels


def place(
    needs: Sequence[Need], nodes: Sequence[Node], beside: Iterable[tuple[str, str]] = ()
) -> tuple[Placed, ...]:
    """A node for every need, actors of one section spread evenly, whatever the order of the nodes;
    `beside` are the (section, node id) of those that run already.

    Raises PlacementError that tells of every need without a node.
    """
    load: Counter[tuple[str, str]] = Counter(beside)
    placed: list[Placed] = []
    missing: dict[str, Need] = {}
    for need in needs:
        fitting = [node for node in nodes if _fits(need, node)]
        if not fitting:
            missing.setdefault(need.section, need)
            continue
        node = min(fitting, key=lambda n: (load[need.section, n.node_id], n.node_id))
        load[need.section, node.node_id] += 1
        placed.append(Placed(need, node))
    if missing:
        raise PlacementError("\n".join(explain_missing(need, nodes) for need in missing.values()))
    return tuple(placed)


def _fits(need: Need, node: Node) -> bool:
    return _has_label(need, node) and not _lacking(need, node)


def _has_label(need: Need, node: Node) -> bool:
    return split_label(need.label).items() <= node.labels.items()


def _lacking(need: Need, node: Node) -> dict[str, float]:
    return {
        name: amount
        for name, amount in need.resources.items()
        if node.resources.get(name, 0.0) < amount
    }


def explain_missing(need: Need, nodes: Sequence[Node]) -> str:
    """Why no node can take an actor, and what to do."""
    labelled = [node for node in nodes if _has_label(need, node)]
    if not labelled:
        return (
            f"cannot place {need.name}: no live node has the label {need.label}; "
            f"nodes: {_told(nodes, _labels)}. Start a node with `ray start --labels {need.label}` "
            f"(KubeRay: the group's `labels`), or change {need.section}.label (null is any node)"
        )
    wanted = ", ".join(f"{amount:g} {name}" for name, amount in need.resources.items())
    where = f"with the label {need.label} " if need.label else ""
    return (
        f"cannot place {need.name}: no live node {where}has {wanted}; "
        f"nodes: {_told(labelled, _resources)}. Add such a node, or change "
        f"{need.section}.num_cpus or {need.section}.num_gpus"
    )


def _told(nodes: Sequence[Node], describe: object) -> str:
    assert callable(describe)
    if not nodes:
        return "none"
    told = [f"{node.address} ({node.node_id[:8]}) has {describe(node)}" for node in nodes]
    more = len(told) - MAX_NODES_TOLD
    return ", ".join(told[:MAX_NODES_TOLD]) + (f", and {more} more" if more > 0 else "")


def _labels(node: Node) -> str:
    own = sorted(f"{k}={v}" for k, v in node.labels.items() if not k.startswith("ray.io/"))
    return " ".join(own) or "no labels"


def _resources(node: Node) -> str:
    shown = [f"{node.resources.get(name, 0.0):g} {name}" for name in ("CPU", "GPU")]
    return " and ".join(shown)
