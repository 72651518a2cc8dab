"""Goal: simulated time obeys what must hold whatever the model: no part does more than it can, more
of a part never makes a cluster slower, and a lone worker takes what its cost model says.

Method: small systems with round figures, worked out by hand where they can be; seeded draws.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch

from cluster.plan.answer import answer
from cluster.plan.estimate import estimate
from cluster.plan.events import Events, Server
from cluster.plan.inputs import PlanInputs
from cluster.plan.routing import DrawnRouting, ReplayedRouting, routing_of
from cluster.plan.shapes import SHAPES, ModelShape
from cluster.plan.simulation import Simulated, simulate_decode, simulate_steps
from cluster.plan.system import System, system_of
from expert_store.types import ExpertKey
from gpu_worker.cost_model import RunCost
from gpu_worker.record_sizes import RecordSizes

KEYS = [ExpertKey(layer, expert) for layer in range(2) for expert in range(4)]
SYSTEM = System(
    num_gpus=1,
    num_nodes=1,
    num_experts=4,
    layers=(0, 1),
    layer_scale=1.0,
    sizes=RecordSizes(dict.fromkeys(KEYS, 1000), dict.fromkeys(KEYS, 500)),
    cache_bytes=0,
    row_bytes=10,
    near_data="off",
    dense=RunCost(pair_s=1e-12, expert_s=0.25),
    dense_bytes=0.0,
    ends=RunCost(pair_s=1e-12, expert_s=0.5),
    ends_bytes=0.0,
    device=RunCost(pair_s=0.125),
    near=RunCost(pair_s=1.0),
    fixed_s=0.0625,
    gpu_bytes_per_s=1e18,
    node_bytes_per_s=1000.0,
    call_s=0.5,
    near_call_s=0.25,
)
# Two tokens; experts 0 and 1, then 0 and 2; the first column is restored.
IDS = torch.tensor([[0, 1], [0, 2]])
STEP = {0: routing_of(IDS, 1), 1: routing_of(IDS, 1)}


def steps_of(system: System, num_steps: int = 1) -> list[float]:
    return simulate_steps(system, ReplayedRouting([STEP] * num_steps), num_steps)


def test_copies_take_what_the_link_says() -> None:
    """A layer: dense, half a call, three codes and one factors record, half a call, computing four
    pairs after the one request landed, the rest."""
    layer_s = 0.25 + 0.5 + 3.5 + 4 * 0.125 + 0.0625
    assert steps_of(SYSTEM) == [pytest.approx(2 * layer_s + 0.5, abs=1e-6)]


def test_requests_of_limited_size_let_computing_begin() -> None:
    """One expert a request: only the last one's pair is left to compute when all have landed."""
    layer_s = 0.25 + 0.5 + 3.5 + 1 * 0.125 + 0.0625
    found = steps_of(replace(SYSTEM, request_bytes=1))
    assert found == [pytest.approx(2 * layer_s + 0.5, abs=1e-6)]


def test_near_data_takes_rows_there_pairs_back_and_its_own_time() -> None:
    """Two rows of 10 bytes there, four pairs of a second each, four answers back."""
    layer_s = 0.25 + 0.25 + 0.02 + 4.0 + 0.04 + 0.0625
    found = steps_of(replace(SYSTEM, near_data="all"))
    assert found == [pytest.approx(2 * layer_s + 0.5, abs=1e-6)]


def test_activations_do_not_wait_behind_records() -> None:
    """Low-bit experts 1 and 2 near data, two pairs; 0 is restored and copied: 1500 bytes.

    The rows go there and back while they are under way, unless they have to wait.
    """
    system = replace(SYSTEM, near_data="low_bit", near=RunCost(pair_s=1e-12))
    copied_s = 0.25 + 1.5 + 0.25 + 2 * 0.125
    found = steps_of(system)
    assert found == [pytest.approx(2 * (0.25 + copied_s + 0.0625) + 0.5, abs=1e-6)]
    # The answers want to leave at 0.52 s; behind the records they leave at 1.75.
    late = replace(system, near_call_s=1.0)
    assert steps_of(late) == found
    waits_s = 1.75 + 0.02 + 0.5
    waiting = steps_of(replace(late, activations_wait=True))
    assert waiting == [pytest.approx(2 * (0.25 + waits_s + 0.0625) + 0.5, abs=1e-6)]


def test_what_was_copied_is_kept_and_costs_no_second_copy() -> None:
    first, second = steps_of(replace(SYSTEM, cache_bytes=10**6), 2)
    layer_s = 0.25 + 4 * 0.125 + 0.0625
    assert first == pytest.approx(steps_of(SYSTEM)[0])
    assert second == pytest.approx(2 * layer_s + 0.5, abs=1e-6)


def test_two_nodes_share_the_copies() -> None:
    two = replace(SYSTEM, num_nodes=2, gpu_bytes_per_s=1000.0)
    # The GPU's own link bounds it, but of four pairs three are computed before the last lands.
    assert steps_of(two)[0] == pytest.approx(steps_of(SYSTEM)[0] - 2 * 3 * 0.125)
    wide = replace(two, gpu_bytes_per_s=1e18)
    assert steps_of(wide)[0] < steps_of(SYSTEM)[0] - 1.0


def small_cluster(**changes: object) -> Simulated:
    system = replace(SYSTEM, near_data="cost", cache_bytes=3000, **changes)  # type: ignore[arg-type]
    routings = [
        DrawnRouting(
            num_experts=4, top_k=2, top_n=1, skew=0.5, seed=7, worker=w, tokens_per_step=[3]
        )
        for w in range(system.num_gpus)
    ]
    return simulate_decode(system, routings, batch=3, warm_up=5, steps=20)


def test_the_same_seed_gives_the_same_figures() -> None:
    assert small_cluster(num_gpus=3) == small_cluster(num_gpus=3)


def test_more_workers_do_more_but_no_more_than_their_share() -> None:
    one, four = small_cluster(), small_cluster(num_gpus=4)
    assert one.tokens_per_s < four.tokens_per_s < 4 * one.tokens_per_s
    assert four.busy.node_link <= 1.0
    assert four.busy.node_worker <= 1.0
    assert small_cluster(num_gpus=4, num_nodes=4).tokens_per_s > four.tokens_per_s


def test_no_step_is_shorter_than_its_bottleneck_lets_it() -> None:
    """Deterministic policies: the closed form's busiest part bounds the simulation."""
    for name in ("Mixtral-8x7B", "DeepSeek-MoE-16B"):
        for near_data in ("off", "all"):
            for gpus, nodes in ((1, 1), (4, 2)):
                found = answer(
                    SHAPES[name],
                    PlanInputs(
                        num_gpus=gpus, num_nodes=nodes, near_data=near_data, max_layers=2, prompt=16
                    ),
                )
                # Draws differ between the two, and the last steps' work is cut off.
                assert found.decode.tokens_per_s < 1.15 * found.bound_tokens_per_s


def test_a_lone_worker_s_closed_form_is_its_simulation() -> None:
    routing = ReplayedRouting([STEP] * 4)
    for near_data in ("off", "all"):
        system = replace(SYSTEM, near_data=near_data)
        found = estimate(system, routing, range(1))
        assert found.step_s == pytest.approx(steps_of(system)[0], rel=0.01)
    assert estimate(SYSTEM, routing, range(1)).bottleneck == "node links"


def test_every_node_has_experts_as_even_as_can_be() -> None:
    for name, nodes in (("Mixtral-8x7B", 256), ("Mixtral-8x7B", 100), ("Qwen3-30B-A3B", 256)):
        system = system_of(SHAPES[name], PlanInputs(num_nodes=nodes, max_layers=1))
        counts = Counter(system.node_of(key) for key in system.sizes.codes)
        assert set(counts) == set(range(nodes))
        assert max(counts.values()) - min(counts.values()) <= 1


def test_a_shape_s_answer_follows_the_link_and_the_widths() -> None:
    shape: ModelShape = SHAPES["Qwen3-30B-A3B"]
    base = PlanInputs(near_data="off", max_layers=2, prompt=16, steps=2, warm_up=2)
    found = answer(shape, base)
    assert found.estimate.bottleneck in ("GPU links", "node links")
    slow = answer(shape, replace(base, link_gbps=10))
    assert slow.decode.tokens_per_s < 0.2 * found.decode.tokens_per_s
    wide = answer(shape, replace(base, recipe=replace(base.recipe, bits=4)))
    assert wide.decode.gpu_in_bytes > 1.5 * found.decode.gpu_in_bytes
    assert wide.first_token_s > found.first_token_s


def test_drawn_tokens_choose_different_experts_and_the_popular_ones_more() -> None:
    routing = DrawnRouting(
        num_experts=16, top_k=4, top_n=2, skew=1.0, seed=1, worker=0, tokens_per_step=[500]
    )
    drawn = routing.layer(0, 3)
    ids = drawn.topk_ids_TK
    assert all(len(set(row)) == 4 for row in ids.tolist())
    assert drawn.restore_TK.sum(dim=1).tolist() == [2] * 500
    counts = torch.bincount(ids.flatten(), minlength=16)
    order = routing.popular(3)
    assert counts[order[0]] > 2 * counts[order[-1]] > 0
    uniform = DrawnRouting(
        num_experts=16, top_k=4, top_n=2, skew=0.0, seed=1, worker=0, tokens_per_step=[4000]
    )
    even = torch.bincount(uniform.layer(0, 0).topk_ids_TK.flatten(), minlength=16)
    assert even.min() > 850  # 1000 each, and a deviation of 27
    assert even.max() < 1150


def test_events_happen_in_order_and_servers_one_after_another() -> None:
    events, seen = Events(), []
    for time_s, name in ((2.0, "c"), (1.0, "a"), (1.0, "b"), (3.0, "d")):
        events.at(time_s, lambda now_s, name=name: seen.append((now_s, name)))
    events.at(2.5, lambda now_s: events.stop())
    events.run()
    assert seen == [(1.0, "a"), (1.0, "b"), (2.0, "c")]
    server = Server()
    assert server.take(1.0, 2.0, 10) == (1.0, 3.0)
    assert server.take(2.0, 1.0, 5) == (3.0, 4.0)
    assert server.take(9.0, 1.0) == (9.0, 10.0)
    assert (server.busy_s, server.num_bytes) == (4.0, 15)


def test_what_goes_first_delays_what_waits() -> None:
    server = Server()
    assert server.take(0.0, 10.0) == (0.0, 10.0)
    assert server.take_first(1.0, 2.0, 7) == (1.0, 3.0)
    assert server.take_first(2.0, 1.0) == (3.0, 4.0)
    assert server.take(2.0, 1.0) == (13.0, 14.0)
    assert (server.busy_s, server.num_bytes) == (14.0, 7)
