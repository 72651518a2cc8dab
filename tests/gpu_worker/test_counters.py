"""Goal: counters add up, freeze, and become plain JSON without losing a number.

Method: small tallies by hand; addition over random ones is checked field by field.
"""

from __future__ import annotations

import json
import pickle

from hypothesis import given
from hypothesis import strategies as st

from gpu_worker.counters import StepCounters, Tally

_kinds = st.dictionaries(st.sampled_from(["codes", "factors"]), st.integers(0, 99))
_moved = st.dictionaries(
    st.tuples(st.sampled_from(["disk", "grpc"]), st.sampled_from(["codes", "factors"])),
    st.integers(0, 99),
)
_counters = st.builds(
    StepCounters,
    moved_bytes=_moved,
    planned_bytes=_kinds,
    cache_hits=_kinds,
    cache_misses=_kinds,
    restored_pairs=st.integers(0, 9),
    low_bit_pairs=st.integers(0, 9),
    degraded_pairs=st.integers(0, 9),
    near_data_pairs=st.integers(0, 9),
    wire_bytes=st.integers(0, 9),
    sent_bytes=st.integers(0, 9),
    received_bytes=st.integers(0, 9),
    wait_s=st.integers(0, 9).map(float),
)


@given(_counters, _counters)
def test_a_sum_has_every_count_of_both(left: StepCounters, right: StepCounters) -> None:
    total = left + right
    assert total.total_moved_bytes == left.total_moved_bytes + right.total_moved_bytes
    for kind in ("codes", "factors"):
        assert total.moved_by_kind(kind) == left.moved_by_kind(kind) + right.moved_by_kind(kind)
        for name in ("planned_bytes", "cache_hits", "cache_misses"):
            parts = [getattr(side, name).get(kind, 0) for side in (left, right)]
            assert getattr(total, name).get(kind, 0) == sum(parts)
    for name in ("restored_pairs", "low_bit_pairs", "degraded_pairs", "near_data_pairs"):
        assert getattr(total, name) == getattr(left, name) + getattr(right, name)
    for name in ("wire_bytes", "sent_bytes", "received_bytes", "wait_s"):
        assert getattr(total, name) == getattr(left, name) + getattr(right, name)


def test_frozen_counters_do_not_change_with_their_tally() -> None:
    tally = Tally()
    tally.moved_bytes["disk", "codes"] += 5
    tally.restored_pairs += 1
    frozen = tally.freeze()
    tally.moved_bytes["disk", "codes"] += 7
    tally.restored_pairs += 1
    assert frozen.moved_bytes == {("disk", "codes"): 5}
    assert frozen.restored_pairs == 1


def test_as_dict_is_json_with_named_keys_and_counters_travel_between_processes() -> None:
    tally = Tally()
    tally.moved_bytes["disk", "codes"] += 5
    tally.cache_misses["factors"] += 2
    counters = tally.freeze()
    plain = json.loads(json.dumps(counters.as_dict()))
    assert plain["moved_bytes"] == {"disk/codes": 5}
    assert plain["cache_misses"] == {"factors": 2}
    assert plain["wait_s"] == 0.0
    assert pickle.loads(pickle.dumps(counters)) == counters
