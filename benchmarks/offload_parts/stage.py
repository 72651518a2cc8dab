"""Both hosts with their nodes running: the gates, the link's real speed, and the turns.

Knows no page. What a node answers to is in `gpu_node.py` and `memory_node.py`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.offload_parts.contestants import Contestant, StoreName
from benchmarks.offload_parts.hosts import ADDRESS, Node, TwoHosts
from benchmarks.offload_parts.rows import Repetition
from benchmarks.offload_parts.turn import Work

POUR_S = 3.0
GREEDY_PROMPTS = 2
GREEDY_TOKENS = 12
NEAR_DATA_TOLERANCE = 5e-2
"""Relative RMS of log-probabilities: int8 activations near data against float32 here."""


class GateIsRed(Exception):
    """Answers differ that must not; no number is worth printing."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Who runs, and where the stores lie."""

    contestants: Sequence[Contestant]
    stores: Mapping[StoreName, Path]


class Stage:
    """The two nodes on their hosts, which end them. Raises RuntimeError when a node ends."""

    def __init__(self, hosts: TwoHosts, plan: Plan, say: Callable[[str], None]) -> None:
        self._hosts, self._plan, self._say = hosts, plan, say
        stores = {str(plan.stores[item.store]) for item in plan.contestants}
        memory = hosts.start(
            "memory", "benchmarks.offload_parts.memory_node", ADDRESS["memory"], *sorted(stores)
        )
        self._served = memory.hear()
        self._gpu = hosts.start("gpu", "benchmarks.offload_parts.gpu_node")

    def gate(self, work: Work, link_gbit: float) -> None:
        """Raises GateIsRed unless every contestant answers over the link as without it, twice."""
        self._hosts.set_rate(link_gbit)
        self._open()
        prompts = [text[: work.prompt_tokens] for text in work.texts[:GREEDY_PROMPTS]]
        for item in self._plan.contestants:
            question = {"prompts": prompts, "num_tokens": GREEDY_TOKENS}
            first = self._gpu.ask(do="greedy", key=item.key, **question)
            if item.near_data == "off":
                store = str(self._plan.stores[item.store])
                truth = self._gpu.ask(
                    do="greedy_resident", store=store, top_n=item.top_n, **question
                )
                _require(first == truth, f"{item.label}: over the link {first}, resident {truth}")
            if item.near_data != "cost":
                # Who runs a pair under "cost" depends on the cache, and so does its arithmetic.
                again = self._gpu.ask(do="greedy", key=item.key, **question)
                _require(first == again, f"{item.label}: {first}, again {again}")
            if item.near_data != "off":
                error = self._gpu.ask(do="near_data_error", key=item.key, windows=work.texts[:2])
                self._say(f"gate: {item.label}: near data moves log-probabilities by {error:.1e}")
                # Under "cost" a prompt's many tokens may all run here.
                is_used = error > 0 or item.near_data == "cost"
                _require(
                    is_used and error < NEAR_DATA_TOLERANCE,
                    f"{item.label}: log-probabilities are off by {error:.1e}, expected some, less "
                    f"than {NEAR_DATA_TOLERANCE}",
                )
        self._gpu.ask(do="close_all")
        self._say("gate: green: answers are equal resident and streamed, and when asked again")

    def measure(self, link_gbit: float, works: Sequence[Work]) -> list[Repetition]:
        """Every contestant once in each repetition, in a new order every time."""
        self._hosts.set_rate(link_gbit)
        speed = self._pour(link_gbit)
        self._say(f"{link_gbit:g} Gbit/s: a plain socket carries {speed * 8 / 1e9:.3f} Gbit/s")
        self._open()
        shuffled = random.Random(0)
        found = []
        for number, work in enumerate(works):
            order = list(self._plan.contestants)
            shuffled.shuffle(order)
            for item in order:
                answer = self._gpu.ask(do="turn", key=item.key, work=asdict(work))
                found.append(Repetition.of(answer, item.key, number, link_gbit, speed))
                self._say(f"{link_gbit:g} Gbit/s, {number}: {item.label:34} {found[-1].told}")
        self._gpu.ask(do="close_all")
        return found

    def open_resident(self, contestants: Sequence[Contestant]) -> Node:
        """The GPU node, with engines of these whose experts lie all on it."""
        for item in contestants:
            store = str(self._plan.stores[item.store])
            contestant = item.as_plain()
            self._gpu.ask(
                do="open", contestant=contestant, store=store, cache_store=store, endpoints={}
            )
        return self._gpu

    def _pour(self, link_gbit: float) -> float:
        """What a socket gets through, after a first one that woke the link."""
        num_bytes = round(max(64e6, POUR_S * link_gbit * 1e9 / 8))
        where = {"host": ADDRESS["memory"], "port": self._served["pour"]}
        self._gpu.ask(do="pour", **where, num_bytes=num_bytes // 16)
        return float(self._gpu.ask(do="pour", **where, num_bytes=num_bytes))

    def _open(self) -> None:
        for item in self._plan.contestants:
            store = str(self._plan.stores[item.store])
            endpoints = {
                role: self._served[role][store]
                for role in ("records", "near_data")
                if store in self._served[role]
            }
            cache_store = self._plan.stores[item.cache_of or item.store]
            self._gpu.ask(
                do="open",
                contestant=item.as_plain(),
                store=store,
                cache_store=str(cache_store),
                endpoints=endpoints,
            )


def _require(is_so: bool, message: str) -> None:
    if not is_so:
        raise GateIsRed(message)
