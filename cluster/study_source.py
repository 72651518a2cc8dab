"""A store's records with those of some experts compressed on the way, as a recipe would store them.

What a worker fetches from it, decodes and counts is what it would of a store of that codec. Knows
no text and no measure.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from expert_store.codecs import cuszp, sz3
from expert_store.codecs.bound import ErrorBound
from expert_store.format import content_version, encode_parts, parse_codes
from expert_store.types import CodesForm, ExpertKey, Manifest, RecordInfo, RecordRequest
from gpu_worker.protocols import ExpertSource
from kernels import ops

StreamCodec = Literal["cuszp", "sz3"]


@dataclass(frozen=True, slots=True)
class CodedRecord:
    """An expert's codes record as a codec writes it."""

    form: CodesForm
    data: torch.Tensor  # [num_bytes] uint8


class Encoder:
    """Compresses experts of a store of the original weights with one codec and bound, each once."""

    def __init__(self, source: ExpertSource, codec: StreamCodec, bound: ErrorBound) -> None:
        assert source.manifest.recipe.is_original, "only original weights have errors of a codec"
        self._source = source
        self._codec: StreamCodec = codec
        self._bound = bound
        self._records: dict[ExpertKey, CodedRecord] = {}

    def record(self, key: ExpertKey) -> CodedRecord:
        """The expert's record. Raises a StoreError when its weights cannot be read, ValueError when
        the bound is too tight for them."""
        if key not in self._records:
            self._records[key] = self._encoded(key)
        return self._records[key]

    def source(self, keys: Iterable[ExpertKey]) -> CodedSource:
        """The store with these experts compressed."""
        return CodedSource(self._source, {key: self.record(key) for key in sorted(keys)})

    def _encoded(self, key: ExpertKey) -> CodedRecord:
        manifest = self._source.manifest
        (data,) = self._source.fetch([RecordRequest(key, "codes")])
        mlp = parse_codes(key, data, manifest.model.expert, manifest.experts[key].form).mlp
        encode = cuszp.encode if self._codec == "cuszp" else sz3.encode
        parts = [
            encode(ops.dequantize(matrix), self._bound) for matrix in (mlp.gate, mlp.up, mlp.down)
        ]
        form = CodesForm.streams(self._codec, [part.numel() for part in parts])
        return CodedRecord(form, encode_parts(parts, [mlp.gate_bias, mlp.up_bias, mlp.down_bias]))


class CodedSource:
    """`ExpertSource` over another one: `coded` records in place of its own."""

    def __init__(self, source: ExpertSource, coded: Mapping[ExpertKey, CodedRecord]) -> None:
        self._source = source
        self._coded = coded
        self._manifest = _with(source.manifest, coded)
        self.tier = source.tier

    @property
    def manifest(self) -> Manifest:
        """The store's, with the forms and lengths that the records have here."""
        return self._manifest

    def fetch(self, requests: Sequence[RecordRequest]) -> list[torch.Tensor]:
        """As in `ExpertSource`."""
        found = []
        for request in requests:
            if request.kind == "codes" and request.key in self._coded:
                found.append(self._coded[request.key].data)
            else:
                found += self._source.fetch([request])
        return found

    def close(self) -> None:
        """The source below stays its owner's."""


def _with(manifest: Manifest, coded: Mapping[ExpertKey, CodedRecord]) -> Manifest:
    experts = dict(manifest.experts)
    for key, record in coded.items():
        whole = experts[key]
        place = RecordInfo(
            whole.codes.file, whole.codes.offset, record.data.numel(), whole.codes.sha256
        )
        experts[key] = replace(whole, form=record.form, codes=place)
    changed = replace(manifest, experts=experts)
    return replace(changed, version=content_version(changed))
