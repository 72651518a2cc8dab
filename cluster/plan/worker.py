"""One simulated GPU worker: goes through its layers, plans them as a real one does, waits in links.

Planner, expert cache and learning of costs are the worker's own code; only time is simulated.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from typing import cast

from cluster.plan.events import Events, Machine, Server
from cluster.plan.routing import RoutingSource
from cluster.plan.system import System
from expert_store.types import ExpertKey, RecordRequest
from gpu_worker.cost_model import ExpertLoad
from gpu_worker.cost_table import CopyTime, CostTable
from gpu_worker.expert_cache import CacheBudgets, ExpertCache
from gpu_worker.expert_math import Record
from gpu_worker.planner import DispatchPlan, ExpertWork, Policy, plan
from gpu_worker.record_sizes import PlannedCopy


class SimulatedWorker:
    """Runs steps until it is stopped; `on_step` is told the time each one ended. Its first step may
    begin with a later layer, so that workers do not go through the layers side by side.

    In a layer copies and near-data calls go out at once; the device computes what is there
    meanwhile, and each request's experts as it lands.
    """

    def __init__(
        self,
        system: System,
        events: Events,
        machine: Machine,
        nodes: Sequence[Machine],
        routing: RoutingSource,
        on_step: Callable[[SimulatedWorker, float], None],
        *,
        first_layer: int = 0,
    ) -> None:
        self._system = system
        self._events = events
        self._machine = machine
        self._nodes = nodes
        self._routing = routing
        self.on_step = on_step
        self._table = CostTable(system.layer_costs())
        self.cache = warm_cache(system, routing)
        self.steps_done = 0
        self.reset_counts()
        self._layer = first_layer  # place among the system's layers
        self._outstanding = 0
        self._landed_s = 0.0
        self._pinned: list[RecordRequest] = []

    def reset_counts(self) -> None:
        """Begin to count: layers, records by where they were, pairs by who ran them."""
        self.layers_done = self.num_hits = self.num_copies = self.num_pairs = 0
        self.num_near_pairs = 0

    def start(self) -> None:
        self._events.at(self._events.now_s, self._begin_layer)

    def _begin_layer(self, now_s: float) -> None:
        num_tokens = self._routing.num_tokens(self.steps_done)
        _, end_s = self._machine.compute.take(now_s, self._system.dense_s(num_tokens))
        self._events.at(end_s, self._run_experts)

    def _run_experts(self, now_s: float) -> None:
        system, layer = self._system, self._system.layers[self._layer]
        policy = Policy(system.near_data, self._table.costs(), system.row_bytes)
        self.cache.begin_turn(layer)
        dispatch = plan(
            layer,
            self._routing.layer(self.steps_done, layer),
            on_device=self.cache.of_layer(layer),
            sizes=system.sizes,
            policy=policy,
        )
        self._count(dispatch)
        for request in dispatch.hits:
            self.cache.pin(request)
            self._pinned.append(request)
        self._landed_s = now_s
        self._outstanding = 1  # what begins here
        self._send_copies(now_s, dispatch)
        self._send_calls(now_s, dispatch.remote)
        for work in dispatch.resident:
            self._compute(now_s, work)
        self._done(now_s)

    def _count(self, dispatch: DispatchPlan) -> None:
        self.num_hits += len(dispatch.hits)
        self.num_copies += len(dispatch.copies)
        self.num_pairs += dispatch.num_pairs()
        self.num_near_pairs += sum(len(work.token_rows) for work in dispatch.remote)

    def _compute(self, now_s: float, work: ExpertWork) -> None:
        self._machine.compute.take(now_s, self._system.device_s(work))

    def _load(self, work: ExpertWork) -> ExpertLoad:
        system, pairs = self._system, len(work.token_rows)
        return ExpertLoad(pairs, system.run_bytes(work), act_bytes=2 * pairs * system.row_bytes)

    def _send_copies(self, now_s: float, dispatch: DispatchPlan) -> None:
        """One request to each node, cut where it is larger than a request may be."""
        works = {work.key: work for work in dispatch.streamed}
        by_node: dict[int, list[list[PlannedCopy]]] = defaultdict(list)
        copies: dict[ExpertKey, list[PlannedCopy]] = defaultdict(list)
        for copy in dispatch.copies:
            copies[copy.request.key].append(copy)
        limit = self._system.request_bytes
        for key, group in copies.items():
            requests = by_node[self._system.node_of(key)]
            if not requests or (limit is not None and _bytes([*requests[-1], *group]) > limit):
                requests.append([])
            requests[-1].extend(group)
        waiting = [sum(map(len, by_node.values()))]
        self._outstanding += waiting[0]

        def landed(request: list[PlannedCopy], asked: list[ExpertWork], time_s: float) -> None:
            waiting[0] -= 1
            if not waiting[0]:
                self._table.copied(CopyTime(_bytes(dispatch.copies), 1, time_s - now_s))
            self._landed(request, asked, time_s)

        for node, requests in by_node.items():
            for request in requests:
                keys = dict.fromkeys(copy.request.key for copy in request)
                then = partial(landed, request, [works[key] for key in keys])
                self._fetch(now_s, self._nodes[node], _bytes(request), then)

    def _fetch(
        self, now_s: float, node: Machine, num_bytes: float, then: Callable[[float], None]
    ) -> None:
        """Bytes from a node: asking takes half a call, they wait for its link and for ours."""
        half_s = self._system.call_s / 2
        self._events.at(
            now_s + half_s,
            partial(self._transfer, node, self._machine, num_bytes, half_s, then, are_records=True),
        )

    def _transfer(
        self,
        sender: Machine,
        receiver: Machine,
        num_bytes: float,
        delay_s: float,
        then: Callable[[float], None],
        now_s: float,
        *,
        are_records: bool = False,
    ) -> None:
        """Through the sender's link and the receiver's at the same time, whichever is slower."""
        take = Server.take_first
        if are_records or self._system.activations_wait:
            take = Server.take
        is_from_node = sender is not self._machine
        node_s = num_bytes / self._system.node_bytes_per_s
        gpu_s = num_bytes / self._system.gpu_bytes_per_s
        out_s, in_s = (node_s, gpu_s) if is_from_node else (gpu_s, node_s)
        begin_s, sent_s = take(sender.out, now_s, out_s, num_bytes)

        def receive(time_s: float) -> None:
            _, received_s = take(receiver.into, time_s, in_s, num_bytes)
            self._events.at(max(sent_s, received_s) + delay_s, then)

        self._events.at(begin_s, receive)

    def _landed(self, request: list[PlannedCopy], works: list[ExpertWork], now_s: float) -> None:
        for copy in request:
            # The cache never looks into a record; here there is none.
            if self.cache.put_pinned(copy.request, cast(Record, None), copy.device_bytes):
                self._pinned.append(copy.request)
        for work in works:
            self._compute(now_s, work)
        self._done(now_s)

    def _send_calls(self, now_s: float, remote: Sequence[ExpertWork]) -> None:
        """One call to each node that holds some of these experts, with the rows they need."""
        by_node: dict[int, list[ExpertWork]] = defaultdict(list)
        for work in remote:
            by_node[self._system.node_of(work.key)].append(work)
        if not by_node:
            return
        self._outstanding += len(by_node)
        loads = [self._load(work) for work in remote]
        waiting = [len(by_node)]

        def answered(time_s: float) -> None:
            waiting[0] -= 1
            if not waiting[0]:
                self._table.ran_near(loads, time_s - now_s)
            self._done(time_s)

        for node, works in by_node.items():
            self._call(now_s, self._nodes[node], works, answered)

    def _call(
        self,
        now_s: float,
        node: Machine,
        works: list[ExpertWork],
        answered: Callable[[float], None],
    ) -> None:
        system = self._system
        rows = {row for work in works for row in work.token_rows}
        num_pairs = sum(len(work.token_rows) for work in works)
        run_s = sum(map(system.near_s, works))

        def run(time_s: float) -> None:
            _, ran_s = node.compute.take(time_s, run_s)
            self._events.at(ran_s, answer)

        def answer(time_s: float) -> None:
            num_bytes = num_pairs * system.row_bytes
            self._transfer(node, self._machine, num_bytes, system.near_call_s / 2, answered, time_s)

        sent_bytes = len(rows) * system.row_bytes
        self._transfer(self._machine, node, sent_bytes, system.near_call_s / 2, run, now_s)

    def _done(self, now_s: float) -> None:
        """A part of the layer is here; after the last one the layer ends."""
        self._outstanding -= 1
        self._landed_s = max(self._landed_s, now_s)
        if self._outstanding:
            return
        self.cache.unpin(self._pinned)
        self._pinned.clear()
        end_s = max(self._landed_s, self._machine.compute.free_s) + self._system.fixed_s
        self._events.at(end_s, self._end_layer)

    def _end_layer(self, now_s: float) -> None:
        self.layers_done += 1
        self._layer += 1
        if self._layer < len(self._system.layers):
            self._begin_layer(now_s)
            return
        self._layer = 0
        ends_s = self._system.ends_s(self._routing.num_tokens(self.steps_done))
        _, end_s = self._machine.compute.take(now_s, ends_s)
        self._events.at(end_s, self._end_step)

    def _end_step(self, now_s: float) -> None:
        self.steps_done += 1
        self._table.end_step()
        self.on_step(self, now_s)
        self.start()  # unless this was the end


def warm_cache(system: System, routing: RoutingSource) -> ExpertCache:
    """That of a worker that has run for long: the codes of the most used experts of every layer."""
    cache = ExpertCache(CacheBudgets(system.cache_bytes))
    ranked = [routing.popular(layer) for layer in system.layers]
    kept = []
    for place in range(min(map(len, ranked))):
        for layer, experts in zip(system.layers, ranked, strict=True):
            request = RecordRequest(ExpertKey(layer, experts[place]), "codes")
            copy = system.sizes.copy_of(request)
            if cache.put_pinned(request, cast(Record, None), copy.device_bytes):
                kept.append(request)
    cache.unpin(kept)
    return cache


def _bytes(copies: Sequence[PlannedCopy]) -> int:
    return sum(copy.num_bytes for copy in copies)
