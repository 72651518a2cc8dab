"""Bytes of the records of a store: as they are fetched, and as they lie on the device.

Pure: from the manifest alone. Who fetches is `gpu_worker/streamer.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from expert_store.format import codes_bytes, device_form, factors_bytes
from expert_store.types import ExpertKey, Manifest, RecordRequest
from gpu_worker.restoring import fetched_blocks


@dataclass(frozen=True, slots=True)
class PlannedCopy:
    """One record to bring to the device.

    `decoded_bytes` is its size once the host has decoded it; None where it goes on as it came.
    """

    request: RecordRequest
    num_bytes: int  # as fetched
    decoded_bytes: int | None = None

    @property
    def device_bytes(self) -> int:
        """What crosses to the device, and stays there."""
        return self.num_bytes if self.decoded_bytes is None else self.decoded_bytes

    @property
    def held_bytes(self) -> int:
        """The most it takes at any time on its way."""
        return max(self.num_bytes, self.device_bytes)


@dataclass(frozen=True, slots=True)
class RecordSizes:
    """Bytes of every record as it is fetched.

    An expert that fetches no factors is not in that mapping. `num_blocks` says how many of its
    blocks an expert fetches, where that is not all; `decoded_codes` what codes are on the device,
    where that is not what was fetched.
    """

    codes: Mapping[ExpertKey, int]
    factors: Mapping[ExpertKey, int]
    num_blocks: Mapping[ExpertKey, int] = field(default_factory=dict)
    decoded_codes: Mapping[ExpertKey, int] = field(default_factory=dict)

    @staticmethod
    def of(manifest: Manifest, factor_share: float = 1.0) -> RecordSizes:
        """The sizes in a store when of each compensator the longest prefix is fetched that has
        `factor_share` (0 to 1) of its bytes or less."""
        shape = manifest.model.expert
        factors, num_blocks, decoded = {}, {}, {}
        for key, info in manifest.experts.items():
            count = fetched_blocks(manifest, key, factor_share)
            if count:
                factors[key] = factors_bytes(shape, info.repair.prefix(count))
            if count < len(info.repair.blocks):
                num_blocks[key] = count
            on_device = device_form(info.form)
            if on_device != info.form:
                decoded[key] = codes_bytes(shape, on_device)
        codes = {key: info.codes.num_bytes for key, info in manifest.experts.items()}
        return RecordSizes(codes, factors, num_blocks, decoded)

    def bytes_of(self, request: RecordRequest) -> int:
        return (self.codes if request.kind == "codes" else self.factors)[request.key]

    def factors_of(self, key: ExpertKey) -> RecordRequest:
        """The read of an expert's factors."""
        return RecordRequest(key, "factors", self.num_blocks.get(key))

    def copy_of(self, request: RecordRequest) -> PlannedCopy:
        """The copy of a record that is not on the device."""
        decoded = self.decoded_codes.get(request.key) if request.kind == "codes" else None
        return PlannedCopy(request, self.bytes_of(request), decoded)


def largest_expert_bytes(manifest: Manifest) -> int:
    """Bytes of codes and factors of the largest expert on its way, decoded or as fetched."""
    sizes = RecordSizes.of(manifest)
    return max(
        sizes.copy_of(RecordRequest(key, "codes")).held_bytes + sizes.factors.get(key, 0)
        for key in manifest.experts
    )


def by_expert(copies: Sequence[PlannedCopy]) -> Iterator[list[PlannedCopy]]:
    """Runs of copies that are of one expert."""
    run: list[PlannedCopy] = []
    for copy in copies:
        if run and run[0].request.key != copy.request.key:
            yield run
            run = []
        run.append(copy)
    if run:
        yield run
