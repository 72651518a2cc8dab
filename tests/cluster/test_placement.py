"""Goal: actors go to nodes that carry their label, evenly; what cannot be placed is said in full.

Method: hand-made node lists; the same nodes in any order give the same answer (hypothesis).
"""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.autoscaling_settings import AutoscalingSettings
from cluster.placement import (
    Need,
    Node,
    PlacementError,
    place,
    sole_node_cpus,
    sole_node_labels,
    tier_needs,
    worker_need,
)
from cluster.settings import NdpSettings, ReplicaSettings, StoreSettings

STORE = {"moetier.io/store": "true"}
BOTH = {**STORE, "moetier.io/ndp": "true", "ray.io/node-id": "x"}


def node(name: str, labels: dict[str, str] | None = None, **resources: float) -> Node:
    return Node(name, f"10.0.0.{name}", labels or {}, {"CPU": 4.0, **resources})


def test_needs_follow_the_config() -> None:
    assert [n.name for n in tier_needs(StoreSettings(replicas=2), NdpSettings())] == [
        "store-0",
        "store-1",
    ]
    needs = tier_needs(StoreSettings(label=None), NdpSettings(enabled=True, label="a=b"))
    assert [(n.name, n.label) for n in needs] == [("store-0", None), ("ndp-0", "a=b")]


def test_labels_decide() -> None:
    needs = tier_needs(StoreSettings(), NdpSettings(enabled=True))
    placed = place(needs, [node("1"), node("2", STORE), node("3", BOTH)])
    assert [(p.need.name, p.node.node_id) for p in placed] == [("store-0", "2"), ("ndp-0", "3")]


def test_copies_are_spread() -> None:
    needs = tier_needs(StoreSettings(replicas=5), NdpSettings())
    placed = place(needs, [node("1", STORE), node("2", STORE)])
    assert Counter(p.node.node_id for p in placed) == {"1": 3, "2": 2}


def test_no_label_is_any_node() -> None:
    (placed,) = place([Need("store-0", "store", None)], [node("7")])
    assert placed.node.node_id == "7"


def test_a_missing_label_is_told_with_the_nodes_and_the_remedy() -> None:
    needs = tier_needs(StoreSettings(replicas=2), NdpSettings(enabled=True))
    with pytest.raises(PlacementError) as caught:
        place(needs, [node("1", STORE), node("2", {"ray.io/node-id": "abc"})])
    message = str(caught.value)
    assert message.count("\n") == 0, "stores were placed, two near-data workers are one problem"
    for words in (
        "ndp-0",
        "no live node has the label moetier.io/ndp=true",
        "10.0.0.1 (1) has moetier.io/store=true",
        "10.0.0.2 (2) has no labels",
        "ray start --labels moetier.io/ndp=true",
        "ndp.label",
    ):
        assert words in message, message


def test_every_missing_section_is_told_and_no_nodes_are_none() -> None:
    with pytest.raises(PlacementError) as caught:
        place(tier_needs(StoreSettings(), NdpSettings(enabled=True)), [])
    assert [line.split(":")[0] for line in str(caught.value).splitlines()] == [
        "cannot place store-0",
        "cannot place ndp-0",
    ]
    assert "nodes: none" in str(caught.value)


def test_missing_resources_are_told() -> None:
    need = worker_need(ReplicaSettings(num_cpus=8), num_gpus=1)
    labels = {"moetier.io/worker": "true"}
    with pytest.raises(PlacementError) as caught:
        place([need], [node("1", labels), node("2", GPU=8.0)])
    for words in ("worker-0", "has 8 CPU, 1 GPU", "10.0.0.1 (1) has 4 CPU and 0 GPU", "num_gpus"):
        assert words in str(caught.value)
    assert "10.0.0.2" not in str(caught.value), "a node without the label is not the answer"


def test_a_large_cluster_is_told_in_part() -> None:
    with pytest.raises(PlacementError, match="and 84 more"):
        place(tier_needs(StoreSettings(), NdpSettings()), [node(str(i)) for i in range(100)])


@given(st.permutations([str(i) for i in range(6)]), st.integers(1, 12))
def test_the_order_of_nodes_does_not_matter_and_loads_differ_by_one(
    names: list[str], replicas: int
) -> None:
    needs = tier_needs(StoreSettings(replicas=replicas), NdpSettings())
    placed = place(needs, [node(name, STORE) for name in names])
    assert placed == place(needs, [node(name, STORE) for name in sorted(names)])
    load = Counter(p.node.node_id for p in placed)
    counts = [load[name] for name in names]
    assert max(counts) - min(counts) <= 1


def test_one_node_can_carry_a_whole_cluster() -> None:
    store, ndp = StoreSettings(label="a=1"), NdpSettings(enabled=True, label="b=1")
    replicas = ReplicaSettings(label=None, num_cpus=1.5, num_replicas=3)
    labels = sole_node_labels(store, ndp, replicas)
    assert labels == {"a": "1", "b": "1"}
    cpus = sole_node_cpus(replicas, 2)
    assert cpus == 5
    assert sole_node_cpus(replicas, 64) == 64
    scaled = ReplicaSettings(autoscaling=AutoscalingSettings(max_replicas=7))
    assert sole_node_cpus(scaled, 2) == 7
    here = Node("1", "10.0.0.1", labels, {"CPU": float(cpus)})
    assert len(place([*tier_needs(store, ndp), worker_need(replicas, 0)], [here])) == 3


def test_labels_that_exclude_each_other_need_two_nodes() -> None:
    with pytest.raises(ValueError, match="ndp.label: got a=2, but another section wants a=1"):
        sole_node_labels(StoreSettings(label="a=1"), NdpSettings(label="a=2"), ReplicaSettings())
