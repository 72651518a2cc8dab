"""What copies, near data and the device cost on this machine, learned from every real one.

The arithmetic of learning is pure; `CostTable` holds the present costs for threads that measure and
the one that plans. Who measures: `gpu_worker/meters.py`; start values: `gpu_worker/cost_probe.py`.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace

from gpu_worker.cost_model import ExpertLoad, LayerCosts, LayerTime, LinkCost, NearCost

GAIN = 0.2
"""Weight of one measurement, on a logarithmic scale: half a lasting change is seen after three."""
MAX_RATIO = 4.0
"""A measurement counts as this many times the expected time, or its inverse, at most: one that
waited for something else (a busy core, a page from disk) moves a cost by a third, not tenfold."""
FORGET = 0.01
"""How far, each step, a cost that was not measured in it goes back to its start value. What has
become dear is not used, and so not measured: without this it would never be tried again."""
MAX_NEAR_FACTOR = 1e4
"""Near data is never believed to take more times its start value. Where a policy sends it work
whatever it costs, a worker that is gone for good is lost again in every layer."""
LEAST_FIXED_S = 1e-7
"""No layer does its own work in less; a cost of 0 could never grow again."""


@dataclass(frozen=True, slots=True)
class CopyTime:
    """Some requests to the source, in `seconds` from the first's begin to the last's end."""

    num_bytes: int
    num_calls: int
    seconds: float


def after_copy(link: LinkCost, seen: CopyTime) -> LinkCost:
    """The link's cost once a copy was seen: of its two parts the one that took longer learns."""
    bytes_s = seen.num_bytes / link.bytes_per_s
    calls_s = seen.num_calls * link.call_s
    if bytes_s + calls_s <= 0:
        return link
    if bytes_s >= calls_s:
        factor = _step((seen.seconds - calls_s) / bytes_s)
        return replace(link, bytes_per_s=link.bytes_per_s / factor)
    return replace(link, call_s=link.call_s * _step((seen.seconds - bytes_s) / calls_s))


def slower(near: NearCost, factor: float) -> NearCost:
    """Near data with everything taking `factor` times as long."""
    return replace(
        near,
        run=near.run.scaled(factor),
        call_s=near.call_s * factor,
        act_bytes_per_s=near.act_bytes_per_s / factor,
    )


class CostTable:
    """The present costs. Thread-safe.

    `device_bytes_per_s` bounds a copy's speed from behind: what the host can pass on to the device.
    """

    def __init__(self, start: LayerCosts, *, device_bytes_per_s: float = math.inf) -> None:
        self._start = self._now = start
        self._device_bytes_per_s = device_bytes_per_s
        self._near_factor = 1.0  # of the start value
        self._seen: set[str] = set()
        self._lock = threading.Lock()

    def costs(self) -> LayerCosts:
        """As of now."""
        with self._lock:
            now = self._now
        if now.link.bytes_per_s <= self._device_bytes_per_s:
            return now
        return replace(now, link=replace(now.link, bytes_per_s=self._device_bytes_per_s))

    def copied(self, seen: CopyTime) -> None:
        """Requests to the source were answered."""
        with self._lock:
            self._now = replace(self._now, link=after_copy(self._now.link, seen))
            self._seen.add("link")

    def ran_near(self, loads: Sequence[ExpertLoad], seconds: float) -> None:
        """A near-data call was answered."""
        near = self.costs().near
        assert near is not None, "a near-data call without near-data workers"
        self._near_took(seconds / max(near.seconds(loads), _LEAST_S))

    def lost_near(self) -> None:
        """A near-data call failed: it costs more than was thought, whatever that was."""
        self._near_took(MAX_RATIO)

    def ran_layer(self, time: LayerTime, layer_s: float, busy_s: float | None) -> None:
        """A layer took `layer_s` that was predicted to take `time`; `busy_s` of it the device, and
        who works for it, were not waiting (None: not known).

        The device learns where it was to take longer than all that is fixed. What is fixed learns
        from what is left of the layer once copies, device and near data had their predicted time:
        it takes in what the model does not know, such as threads that wait for a core.
        """
        rest_s = layer_s - (time.total_s - time.fixed_s)
        with self._lock:
            now = self._now
            device, fixed_s = now.device, now.fixed_s
            if busy_s is not None and time.device_s > time.fixed_s:
                device = device.scaled(_step((busy_s - time.fixed_s) / time.device_s))
            if time.fixed_s > 0:
                fixed_s = max(LEAST_FIXED_S, fixed_s * _step(rest_s / time.fixed_s))
            self._now = replace(now, device=device, fixed_s=fixed_s)

    def end_step(self) -> None:
        """What was not measured in this step goes a little back to what it was at the start."""
        with self._lock:
            if "link" not in self._seen:
                link, start = self._now.link, self._start.link
                self._now = replace(
                    self._now,
                    link=replace(
                        link,
                        bytes_per_s=_back(link.bytes_per_s, start.bytes_per_s),
                        call_s=_back(link.call_s, start.call_s),
                    ),
                )
            if "near" not in self._seen:
                self._set_near(_back(self._near_factor, 1.0))
            self._seen.clear()

    def _near_took(self, ratio: float) -> None:
        with self._lock:
            self._set_near(min(MAX_NEAR_FACTOR, self._near_factor * _step(ratio)))
            self._seen.add("near")

    def _set_near(self, factor: float) -> None:
        if self._start.near is None:
            return
        self._near_factor = factor
        self._now = replace(self._now, near=slower(self._start.near, factor))


_LEAST_S = 1e-9


def _step(ratio: float) -> float:
    """By what to multiply a cost of which `ratio` times the expected time was seen."""
    # Rounding, or a part of the time that was all of it, may leave nothing or less: the least.
    return max(1 / MAX_RATIO, min(MAX_RATIO, ratio)) ** GAIN


def _back(now: float, start: float) -> float:
    """A little of the way back, on a logarithmic scale; what is 0 at the start stays as it is."""
    if now <= 0 or start <= 0:
        return now
    return now * (start / now) ** FORGET
