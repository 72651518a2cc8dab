"""Goal: codes of error-bounded codecs are records like any other: written, read, cut and refused.

Method: the codecs' own `encode` and `decode` against what a record gives back; one part spoiled at
a time. The codecs' bounds are `test_codecs.py`'s matter.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from expert_store.codecs import cuszp, sz3
from expert_store.errors import StoreFormatError
from expert_store.format import (
    codes_bytes,
    decode_on_host,
    device_form,
    encode_codes,
    form_of,
    load_manifest,
    parse_codes,
)
from expert_store.inspect import summarize
from expert_store.segment import Segment
from expert_store.types import PROJECTIONS, Codec, CodesForm, ExpertKey, RecordRequest
from expert_store.verify import verify
from kernels import ops
from kernels.types import GatedMLP, QuantizedMatrix
from tests.hand_store import build_store

KEY = ExpertKey(0, 0)
CODEC = pytest.mark.parametrize("codec", ["sz3", "cuszp"])


def opened(folder: Path, codec: Codec, has_bias: bool = False) -> tuple[Segment, torch.Tensor]:
    build_store(folder, layers=(0,), experts=2, codec=codec, has_bias=has_bias)
    segment = Segment(folder)
    return segment, segment.fetch([RecordRequest(KEY, "codes")])[0]


def weights(mlp: GatedMLP) -> list[torch.Tensor]:
    return [ops.dequantize(getattr(mlp, name)) for name in PROJECTIONS]


@pytest.mark.parametrize("has_bias", [False, True])
@CODEC
def test_a_record_gives_back_what_its_parts_decode_to(
    codec: Any, has_bias: bool, tmp_path: Path
) -> None:
    segment, data = opened(tmp_path, codec, has_bias)
    info, shape = segment.manifest.experts[KEY], segment.manifest.model.expert
    assert info.form.codec == codec
    assert data.numel() == info.codes.num_bytes == codes_bytes(shape, info.form)
    codes = parse_codes(KEY, data, shape, info.form)
    assert codes.num_bytes == codes_bytes(shape, device_form(info.form))
    at = 0
    for name, size, found in zip(
        PROJECTIONS, info.form.part_bytes or (), weights(codes.mlp), strict=True
    ):
        part, (rows, cols) = data[at : at + size], shape.projection(name)
        expected = (sz3 if codec == "sz3" else cuszp).decode(part.clone(), rows, cols)
        assert torch.equal(found, ops.dequantize(expected))
        at += -(-size // 64) * 64
        assert (getattr(codes.mlp, f"{name}_bias") is not None) is has_bias


def test_sz3_becomes_a_bfloat16_record_on_the_host(tmp_path: Path) -> None:
    segment, data = opened(tmp_path, "sz3", has_bias=True)
    form, shape = segment.manifest.experts[KEY].form, segment.manifest.model.expert
    assert device_form(form) == CodesForm.uniform(16)
    decoded = decode_on_host(KEY, data, shape, form)
    assert decoded.numel() == codes_bytes(shape, device_form(form)) > data.numel()
    direct = parse_codes(KEY, data, shape, form).mlp
    found = parse_codes(KEY, decoded, shape, device_form(form)).mlp
    for name in PROJECTIONS:
        assert isinstance(getattr(found, name), QuantizedMatrix)
        assert torch.equal(getattr(found, name).data, getattr(direct, name).data)
        assert torch.equal(getattr(found, f"{name}_bias"), getattr(direct, f"{name}_bias"))


def test_all_others_go_to_the_device_as_they_came(tmp_path: Path) -> None:
    segment, data = opened(tmp_path, "cuszp")
    form, shape = segment.manifest.experts[KEY].form, segment.manifest.model.expert
    assert device_form(form) == form
    assert decode_on_host(KEY, data, shape, form) is data
    mlp = parse_codes(KEY, data, shape, form).mlp
    assert form_of(mlp) == form
    assert torch.equal(encode_codes(mlp), data)
    tile = parse_codes(KEY, torch.zeros(7680, dtype=torch.uint8), shape, CodesForm.uniform(2))
    with pytest.raises(ValueError, match="three block codes in a record or none"):
        form_of(replace(mlp, up=tile.mlp.up))


@CODEC
def test_a_damaged_part_names_the_expert_and_the_projection(codec: Any, tmp_path: Path) -> None:
    segment, data = opened(tmp_path, codec)
    form, shape = segment.manifest.experts[KEY].form, segment.manifest.model.expert
    assert form.part_bytes is not None
    spoiled = data.clone()
    start = -(-form.part_bytes[0] // 64) * 64
    spoiled[start] ^= 0xFF  # the magic of up's part
    with pytest.raises(StoreFormatError, match=rf"{KEY}, up: {codec} part.*moetier verify"):
        parse_codes(KEY, spoiled, shape, form)
    with pytest.raises(StoreFormatError, match="codes record of layer 0 expert 0: expected"):
        parse_codes(KEY, data[:-64], shape, form)
    gate, up, down = form.part_bytes
    other = CodesForm.streams(codec, (gate - 1, up, down))
    if codes_bytes(shape, other) == data.numel():
        with pytest.raises(StoreFormatError, match="gate: "):
            parse_codes(KEY, data, shape, other)


@CODEC
def test_manifest_verify_and_inspect_know_the_codec(codec: Any, tmp_path: Path) -> None:
    build_store(tmp_path, codec=codec)
    assert verify(tmp_path).damage == ()
    manifest = load_manifest(tmp_path)
    forms = [info.form for info in manifest.experts.values()]
    assert len({form.part_bytes for form in forms}) > 1  # lengths are the data's own
    num_weights = manifest.model.expert.hidden * manifest.model.expert.ffn
    for layer in summarize(tmp_path).layers:
        assert layer.matrices == {codec: 9}
        own = [i.form for key, i in manifest.experts.items() if key.layer == layer.layer]
        bits = sum(form.mean_bits(num_weights) for form in own) / len(own)
        assert layer.bits == pytest.approx(bits)
        assert 3 < layer.bits < 16
