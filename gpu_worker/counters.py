"""What a step moved, found, restored and waited for. Counts only; knows nobody who counts.

A `Tally` is filled while a step runs; `StepCounters` is what leaves with it. Every (token, expert)
pair is counted once as restored, low-bit, degraded or skipped: the four sum to tokens x top-k x MoE
layers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from expert_store.types import RecordKind


@dataclass(frozen=True, slots=True)
class StepCounters:
    """Counts of one step, or of many added up.

    - moved_bytes: bytes the transport delivered, by (tier, kind).
    - device_bytes: bytes that crossed to the device, by kind: as moved, but where the host decodes
      codes first, what they become.
    - wire_bytes: bytes that came over the network for them, where the source counts that (gRPC);
      fewer than moved_bytes where records travel compressed.
    - planned_bytes: bytes the plans asked for, by kind; equal to those moved when nothing failed
      and nothing was fetched ahead in vain.
    - cache_hits, cache_misses: records a plan needed that were, or were not, on the device.
    - restored_pairs, low_bit_pairs, degraded_pairs: pairs whose compensator was applied, whose plan
      was codes alone, and whose compensator could not be had.
    - skipped_pairs: pairs that were not run, because of their small router weight.
    - near_data_pairs: the low-bit pairs that ran near data.
    - sent_bytes, received_bytes: activations to and from near data, counted by the transport.
    - ahead_bytes, ahead_used_bytes: of moved_bytes those fetched by a guess of what a layer would
      need, and those of them that it did need: what moved is what was planned and the difference.
    - guessed_pairs, right_pairs: pairs of layers whose routing was guessed, and those of them that
      went where the guess said.
    - predicted_s, layer_s: seconds that MoE layers were predicted to take, and took; of the layers
      that were predicted, which needs measured costs (near_data "cost", or a target_step_s).
    - wait_s: seconds the step had nothing to compute until a copy or a near-data answer came.
    - near_wait_s: of wait_s, for near-data answers.
    """

    moved_bytes: Mapping[tuple[str, RecordKind], int] = field(default_factory=dict)
    device_bytes: Mapping[RecordKind, int] = field(default_factory=dict)
    wire_bytes: int = 0
    planned_bytes: Mapping[RecordKind, int] = field(default_factory=dict)
    cache_hits: Mapping[RecordKind, int] = field(default_factory=dict)
    cache_misses: Mapping[RecordKind, int] = field(default_factory=dict)
    restored_pairs: int = 0
    low_bit_pairs: int = 0
    degraded_pairs: int = 0
    skipped_pairs: int = 0
    near_data_pairs: int = 0
    sent_bytes: int = 0
    received_bytes: int = 0
    ahead_bytes: int = 0
    ahead_used_bytes: int = 0
    guessed_pairs: int = 0
    right_pairs: int = 0
    predicted_s: float = 0.0
    layer_s: float = 0.0
    wait_s: float = 0.0
    near_wait_s: float = 0.0

    def __add__(self, other: StepCounters) -> StepCounters:
        return StepCounters(
            **{f.name: _sum(getattr(self, f.name), getattr(other, f.name)) for f in fields(self)}
        )

    @property
    def total_moved_bytes(self) -> int:
        """Expert bytes delivered, over all tiers and kinds."""
        return sum(self.moved_bytes.values())

    def moved_by_kind(self, kind: RecordKind) -> int:
        """Expert bytes of one kind delivered, over all tiers."""
        return sum(count for (_, of), count in self.moved_bytes.items() if of == kind)

    def as_dict(self) -> dict[str, Any]:
        """The counts for JSON: mappings become dicts, their keys strings like "disk/codes"."""
        return {f.name: _plain(getattr(self, f.name)) for f in fields(self)}


class Tally:
    """The counters of a step while it runs. Only the thread that runs the step writes it."""

    def __init__(self) -> None:
        self.moved_bytes: Counter[tuple[str, RecordKind]] = Counter()
        self.device_bytes: Counter[RecordKind] = Counter()
        self.wire_bytes = 0
        self.planned_bytes: Counter[RecordKind] = Counter()
        self.cache_hits: Counter[RecordKind] = Counter()
        self.cache_misses: Counter[RecordKind] = Counter()
        self.restored_pairs = 0
        self.low_bit_pairs = 0
        self.degraded_pairs = 0
        self.skipped_pairs = 0
        self.near_data_pairs = 0
        self.sent_bytes = 0
        self.received_bytes = 0
        self.ahead_bytes = 0
        self.ahead_used_bytes = 0
        self.guessed_pairs = 0
        self.right_pairs = 0
        self.predicted_s = 0.0
        self.layer_s = 0.0
        self.wait_s = 0.0
        self.near_wait_s = 0.0

    def freeze(self) -> StepCounters:
        """The counts so far, as a value that no longer changes."""
        return StepCounters(
            **{f.name: _frozen(getattr(self, f.name)) for f in fields(StepCounters)}
        )


def _sum(left: Any, right: Any) -> Any:
    if isinstance(left, Mapping):
        return {key: left.get(key, 0) + right.get(key, 0) for key in (*left, *right)}
    return left + right


def _frozen(value: Any) -> Any:
    return dict(value) if isinstance(value, Counter) else value


def _plain(value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    return {
        "/".join(key) if isinstance(key, tuple) else key: count
        for key, count in sorted(value.items())
    }
