"""A variant's model, open in this process: its store, its near-data worker, its worker config.

Knows no text and no measure.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from cluster.eval_settings import EvalSettings, Variant
from expert_store.segment import Segment
from expert_store.types import Manifest, RecordRequest
from gpu_worker.build import OpenModel, open_model
from gpu_worker.config import WorkerConfig
from gpu_worker.protocols import NearData
from gpu_worker.record_sizes import RecordSizes
from ndp_worker.executor import Executor
from ndp_worker.rpc import NdpClient, NdpServer

NEAR_DATA_DEADLINE_S = 60.0
MAX_DECODED_BYTES = 8 << 30
"""Of codes that the host decoded, kept while a text is scored on a CPU."""


@dataclass(frozen=True, slots=True)
class OpenVariant:
    """A model that runs, and where its experts come from."""

    model: OpenModel
    source: Segment
    near_data: NearData | None

    @property
    def manifest(self) -> Manifest:
        return self.source.manifest


@contextmanager
def opened(variant: Variant, settings: EvalSettings | None = None) -> Iterator[OpenVariant]:
    """The variant, until the `with` ends.

    On a CPU it keeps every expert that it has read, on a GPU those that fit the largest cache of
    the settings. Raises StoreError for the store, ValueError for the
    policies.
    """
    settings = settings or EvalSettings()
    source = Segment(variant.store)
    try:
        with near_data_worker(source, enabled=variant.near_data) as near_data:
            config = WorkerConfig(
                **variant.policies(),
                near_data="low_bit" if variant.near_data else "off",
                max_sequences=max(settings.batch),
            )
            on_cpu = config.resolve(source.manifest).device == "cpu"
            share = max(settings.cache_percent)
            kept = kept_on_cpu(source) if on_cpu else cache_bytes(source.manifest, share)
            config = replace(config, cache_bytes=kept)
            model = open_model(variant.store, source, near_data, config)
            try:
                yield OpenVariant(model, source, near_data)
            finally:
                model.close()
    finally:
        source.close()


@contextmanager
def near_data_worker(source: Segment, *, enabled: bool) -> Iterator[NearData | None]:
    """A near-data worker in this process, called over a unix socket as a far one would be."""
    if not enabled:
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="moetier-") as folder:
        server = NdpServer(Executor(source), [f"unix:{folder}/near-data"])
        client = NdpClient(
            server.addresses, version=source.manifest.version, deadline_s=NEAR_DATA_DEADLINE_S
        )
        try:
            yield client
        finally:
            client.close()
            server.close()


def kept_on_cpu(source: Segment) -> int:
    """A cache for all experts: views of the mapped store, but memory for codes that are decoded."""
    if not RecordSizes.of(source.manifest).decoded_codes:
        return source.num_bytes
    return min(source.num_bytes + cache_bytes(source.manifest, 100), MAX_DECODED_BYTES)


def cache_bytes(manifest: Manifest, percent: float) -> int:
    """Device memory for `percent` of the codes of all experts: as many experts for every recipe."""
    sizes = RecordSizes.of(manifest)
    codes = sum(sizes.copy_of(RecordRequest(key, "codes")).device_bytes for key in sizes.codes)
    return int(codes * percent / 100)
