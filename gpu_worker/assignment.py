"""Which experts of a layer go near data, so that the layer is predicted to end soonest.

Pure, and the same for the same input. Knows costs and loads only (`gpu_worker/cost_model.py`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from gpu_worker.cost_model import ExpertLoad, LayerCosts

MAX_IMPROVED = 12
"""Choices among more experts are not improved: with many small parts the greedy one leaves little,
and trying all exchanges costs the square of their number."""


@dataclass(frozen=True, slots=True)
class Choice:
    """One expert's two ways: on the device, with what has to be copied for it, or near data."""

    local: ExpertLoad
    near: ExpertLoad


def choose_near(choices: Sequence[Choice], costs: LayerCosts) -> frozenset[int]:
    """Indices of the choices that go near data.

    Copies share the link, near-data experts share the workers, and both run at the same time: the
    layer takes as long as the slowest. Experts are sent near by falling seconds they save per
    second they cost there; of all such beginnings the best is taken (of equal ones the shortest),
    and where experts are few it is improved by moving one, or exchanging two, while that helps.
    """
    if not choices or costs.near is None:
        return frozenset()
    layer = _Layer(costs, choices)
    best, best_s = layer.best_beginning()
    return _improved(best, best_s, layer) if len(choices) <= MAX_IMPROVED else best


class _Layer:
    """What one layer's choices add up to."""

    def __init__(self, costs: LayerCosts, choices: Sequence[Choice]) -> None:
        assert costs.near is not None, "nothing to choose without near-data workers"
        self._costs, self._near = costs, costs.near
        self._parts = [self._part(choice.local, choice.near) for choice in choices]

    @property
    def num_choices(self) -> int:
        return len(self._parts)

    def seconds(self, near: frozenset[int]) -> float:
        """The layer's time when these go near data."""
        sums = _Sums()
        for index, part in enumerate(self._parts):
            if index in near:
                sums.add_near(part)
            else:
                sums.add_local(part)
        return self._time(sums)

    def best_beginning(self) -> tuple[frozenset[int], float]:
        """Of all beginnings of the order by worth the one that ends soonest, and its time."""
        order = sorted(range(len(self._parts)), key=lambda index: (-self._worth(index), index))
        sums = _Sums()
        for part in self._parts:
            sums.add_local(part)
        best_length, best_s = 0, self._time(sums)
        for length, index in enumerate(order, start=1):
            sums.move(self._parts[index])
            if (total_s := self._time(sums)) < best_s:
                best_length, best_s = length, total_s
        return frozenset(order[:best_length]), best_s

    def _worth(self, index: int) -> float:
        """Seconds saved on the device's side per second that near data takes for it."""
        part = self._parts[index]
        local_s = part.copy_bytes / self._costs.link.bytes_per_s + part.device_s
        near_s = part.near_s + part.act_bytes / self._near.act_bytes_per_s
        return local_s / near_s if near_s > 0 else math.inf

    def _time(self, sums: _Sums) -> float:
        near_s = self._near.of_sums(sums.near_s, sums.longest_near_s, sums.act_bytes)
        # Taking parts away again leaves rounding errors: no sum may fall below 0 by them.
        copy_bytes = sums.copy_bytes if sums.num_streamed else 0.0
        streamed_s = max(0.0, sums.streamed_s)
        resident_s = max(0.0, sums.resident_s)
        return self._costs.of_sums(max(0.0, copy_bytes), streamed_s, resident_s, near_s).total_s

    def _part(self, local: ExpertLoad, near: ExpertLoad) -> _Part:
        return _Part(
            copy_bytes=local.copy_bytes,
            device_s=self._costs.device.seconds(local.num_pairs, local.run_bytes),
            near_s=self._near.run.seconds(near.num_pairs, near.run_bytes),
            act_bytes=near.act_bytes,
        )


@dataclass(frozen=True, slots=True)
class _Part:
    """A choice, in what it adds to the sums."""

    copy_bytes: float
    device_s: float
    near_s: float
    act_bytes: float


@dataclass(slots=True)
class _Sums:
    """What the experts on the device, and those near data, add up to."""

    copy_bytes: float = 0.0
    num_streamed: int = 0
    streamed_s: float = 0.0
    resident_s: float = 0.0
    near_s: float = 0.0
    longest_near_s: float = 0.0
    act_bytes: float = 0.0

    def add_local(self, part: _Part, sign: int = 1) -> None:
        if part.copy_bytes > 0:
            self.copy_bytes += sign * part.copy_bytes
            self.num_streamed += sign
            self.streamed_s += sign * part.device_s
        else:
            self.resident_s += sign * part.device_s

    def add_near(self, part: _Part) -> None:
        self.near_s += part.near_s
        self.longest_near_s = max(self.longest_near_s, part.near_s)
        self.act_bytes += part.act_bytes

    def move(self, part: _Part) -> None:
        """From the device to near data."""
        self.add_local(part, sign=-1)
        self.add_near(part)


def _improved(near: frozenset[int], near_s: float, layer: _Layer) -> frozenset[int]:
    """Move one expert, or exchange two, as long as the layer gets shorter for it."""
    # Every round is shorter than the last, so this ends; the limit bounds what it may cost.
    for _ in range(layer.num_choices):
        outside = [index for index in range(layer.num_choices) if index not in near]
        moves = [near ^ {index} for index in range(layer.num_choices)]
        moves += [near ^ {one, other} for one in sorted(near) for other in outside]
        timed = [(layer.seconds(move), order) for order, move in enumerate(moves)]
        move_s, order = min(timed)
        if move_s >= near_s:
            return near
        near, near_s = moves[order], move_s
    return near
