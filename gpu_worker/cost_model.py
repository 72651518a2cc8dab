"""Seconds that a layer's experts take: copied, run near their bytes, run on the device.

Pure: bytes and counts in, seconds out, from costs that were measured or are given. Knows no
manifest, no transport and no clock. The planner chooses by it, the governor asks it what a byte
costs, and `moetier plan` puts figures of other hardware in.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LinkCost:
    """Copying from the tier to the device.

    One request brings `request_bytes` at most (None: all that is asked for) and takes `call_s`
    besides its bytes. Requests follow each other: several under way share the same bytes/s.
    """

    bytes_per_s: float
    call_s: float = 0.0
    request_bytes: int | None = None

    def __post_init__(self) -> None:
        _positive("bytes_per_s", self.bytes_per_s)
        _not_negative("call_s", self.call_s)

    def num_calls(self, num_bytes: float) -> int:
        if num_bytes <= 0:
            return 0
        return 1 if self.request_bytes is None else math.ceil(num_bytes / self.request_bytes)

    def seconds(self, num_bytes: float) -> float:
        """From asking to having all of them; nothing asked for takes no time."""
        return self.num_calls(num_bytes) * self.call_s + num_bytes / self.bytes_per_s


@dataclass(frozen=True, slots=True)
class RunCost:
    """Running experts on one processor: a start each, and then bytes or arithmetic, the slower.

    Few tokens read the weights as fast as memory gives them; many compute as fast as the kernel
    can. An expert is never faster than either.
    """

    pair_s: float  # a (token, expert) pair, when many share an expert
    bytes_per_s: float = math.inf  # of codes and factors, as they lie there
    expert_s: float = 0.0  # an expert more, whatever its size

    def __post_init__(self) -> None:
        _positive("bytes_per_s", self.bytes_per_s)
        _not_negative("pair_s", self.pair_s)
        _not_negative("expert_s", self.expert_s)

    def seconds(self, num_pairs: int, num_bytes: float) -> float:
        """One expert for that many tokens."""
        if num_pairs == 0:
            return 0.0
        return self.expert_s + max(num_bytes / self.bytes_per_s, num_pairs * self.pair_s)

    def scaled(self, factor: float) -> RunCost:
        """The same processor, everything taking `factor` times as long."""
        return RunCost(self.pair_s * factor, self.bytes_per_s / factor, self.expert_s * factor)


@dataclass(frozen=True, slots=True)
class NearCost:
    """One call to the near-data workers of a layer: activations there, running, activations back.

    `run` is one worker's; a layer's experts spread over `num_workers`.
    """

    run: RunCost
    call_s: float = 0.0
    act_bytes_per_s: float = math.inf
    num_workers: int = 1

    def __post_init__(self) -> None:
        _not_negative("call_s", self.call_s)
        _positive("act_bytes_per_s", self.act_bytes_per_s)
        if self.num_workers < 1:
            raise ValueError(f"num_workers: got {self.num_workers}, expected at least 1")

    def seconds(self, loads: Iterable[ExpertLoad]) -> float:
        """From the call to the last answer; no sooner than the largest expert, which is not cut."""
        total_s = longest_s = act_bytes = 0.0
        for load in loads:
            run_s = self.run.seconds(load.num_pairs, load.run_bytes)
            total_s, longest_s = total_s + run_s, max(longest_s, run_s)
            act_bytes += load.act_bytes
        return self.of_sums(total_s, longest_s, act_bytes)

    def of_sums(self, run_s: float, longest_s: float, act_bytes: float) -> float:
        """The same from the experts' seconds together, those of the longest, and activations."""
        if run_s <= 0 and act_bytes <= 0:
            return 0.0
        spread_s = max(run_s / self.num_workers, longest_s)
        return self.call_s + spread_s + act_bytes / self.act_bytes_per_s


@dataclass(frozen=True, slots=True)
class ExpertLoad:
    """One expert's part of a layer, where it runs."""

    num_pairs: int  # (token, expert) pairs
    run_bytes: float  # codes, and factors where pairs are restored: read to compute it
    copy_bytes: float = 0.0  # of them not on the device yet; near data copies none
    act_bytes: float = 0.0  # activations there and back, for near data


@dataclass(frozen=True, slots=True)
class LayerTime:
    """What a layer is predicted to take, and why.

    Copies and near-data calls run at the same time, and the device computes what is there
    meanwhile; `tail_s` is what it can only compute after the last bytes came.
    """

    link_s: float = 0.0
    tail_s: float = 0.0
    device_s: float = 0.0  # all of the device's computing, with the tail
    near_s: float = 0.0
    fixed_s: float = 0.0

    @property
    def total_s(self) -> float:
        return self.fixed_s + max(self.link_s + self.tail_s, self.device_s, self.near_s)


@dataclass(frozen=True, slots=True)
class LayerCosts:
    """All that a layer's time depends on. `near` None: there are no near-data workers.

    `fixed_s` is what a layer takes whatever its experts do: routing, planning, adding up.
    """

    link: LinkCost
    device: RunCost
    near: NearCost | None = None
    fixed_s: float = 0.0

    def __post_init__(self) -> None:
        _not_negative("fixed_s", self.fixed_s)

    def layer(self, local: Iterable[ExpertLoad], near: Iterable[ExpertLoad] = ()) -> LayerTime:
        """The time of a layer with these experts on the device and those near data."""
        copy_bytes = streamed_s = resident_s = 0.0
        for load in local:
            run_s = self.device.seconds(load.num_pairs, load.run_bytes)
            if load.copy_bytes > 0:
                copy_bytes, streamed_s = copy_bytes + load.copy_bytes, streamed_s + run_s
            else:
                resident_s += run_s
        loads = tuple(near)
        assert not loads or self.near is not None, "no near-data workers, but work for them"
        near_s = self.near.seconds(loads) if self.near is not None else 0.0
        return self.of_sums(copy_bytes, streamed_s, resident_s, near_s)

    def of_sums(
        self, copy_bytes: float, streamed_s: float, resident_s: float, near_s: float
    ) -> LayerTime:
        """The same from sums: bytes to copy, device seconds of experts that need some of them and
        of those that need none, seconds of near data."""
        num_calls = self.link.num_calls(copy_bytes)
        return LayerTime(
            link_s=self.link.seconds(copy_bytes),
            # Experts of earlier requests are computed while the last one is under way.
            tail_s=streamed_s / num_calls if num_calls else 0.0,
            device_s=streamed_s + resident_s,
            near_s=near_s,
            fixed_s=self.fixed_s,
        )


def _positive(name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{name}: got {value}, expected a positive number")


def _not_negative(name: str, value: float) -> None:
    if not 0 <= value < math.inf:
        raise ValueError(f"{name}: got {value}, expected 0 or more, and finite")
