"""Bytes that a token moves, at every size of cache and number of sequences that are asked for.

Counted by replaying, as sequences that decode, where the tokens of a scoring pass went.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from cluster.eval_model import OpenVariant, cache_bytes
from cluster.eval_rows import Traffic
from cluster.eval_settings import EvalSettings
from gpu_worker.record_sizes import RecordSizes
from gpu_worker.replay import RoutingTrace, replay_decode, uncached_bytes, weights_per_token

LEAST_SEQUENCES = 2
"""Decoded one after another when fewer run side by side: a lone one is little evidence."""


def measure_traffic(
    trace: RoutingTrace, variant: OpenVariant, settings: EvalSettings
) -> tuple[Traffic, ...]:
    """One Traffic for each cache size and batch of the settings."""
    with _one_thread():
        return tuple(
            _traffic(trace, variant, settings, percent, batch)
            for percent in settings.cache_percent
            for batch in settings.batch
        )


@contextmanager
def _one_thread() -> Iterator[None]:
    """A replay adds tiny tensors, which gain nothing by a second thread and wait for it when the
    cores are busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def bits_per_weight_moved(
    trace: RoutingTrace, variant: OpenVariant, settings: EvalSettings
) -> float:
    """Bits that a token moves per weight of its k experts, one sequence alone and without a cache.

    Over all tokens of the trace, not only those that `measure_traffic` decodes. With near data,
    whose low-bit pairs move nothing to the device, over those decoded.
    """
    manifest, config = variant.manifest, variant.model.config
    if config.near_data != "off":
        moved = _traffic(trace, variant, settings, 0.0, 1).moved_bytes
    else:
        sizes = RecordSizes.of(manifest, config.factor_share)
        moved = uncached_bytes(trace, config.pair_policy(manifest), sizes)
    return moved * 8 / weights_per_token(manifest)


def _traffic(
    trace: RoutingTrace,
    variant: OpenVariant,
    settings: EvalSettings,
    percent: float,
    batch: int,
) -> Traffic:
    num_groups = max(1, min(LEAST_SEQUENCES, trace.num_windows) // batch)
    # No fetch threads: the order in which records land, and so who is evicted, is then fixed.
    config = replace(
        variant.model.config,
        cache_bytes=cache_bytes(variant.manifest, percent),
        max_sequences=batch,
        fetch_threads=0,
    )
    counters, num_tokens = replay_decode(
        trace,
        variant.source,
        config,
        variant.near_data,
        batch=batch,
        num_steps=min(settings.decode_tokens, trace.num_tokens),
        num_groups=num_groups,
        warm_up=settings.warm_up,
    )
    return Traffic(
        cache_percent=percent,
        batch=batch,
        cache_bytes=config.cache_bytes,
        moved_bytes=counters.total_moved_bytes / num_tokens,
        device_bytes=sum(counters.device_bytes.values()) / num_tokens,
        codes_bytes=counters.moved_by_kind("codes") / num_tokens,
        factors_bytes=counters.moved_by_kind("factors") / num_tokens,
        planned_bytes=sum(counters.planned_bytes.values()) / num_tokens,
        near_data_bytes=(counters.sent_bytes + counters.received_bytes) / num_tokens,
        num_tokens=num_tokens,
    )
