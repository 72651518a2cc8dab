"""Goal: a frame says exactly what was put into it, and a malformed one is a ValueError, no worse.

Method: round trips and mutations by hypothesis; one frame written out byte by byte.
"""

from __future__ import annotations

import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from expert_store.errors import (
    CorruptRecordError,
    ExpertUnavailableError,
    StoreError,
    StoreFormatError,
)
from expert_store.types import ExpertKey, ExpertOutputs, ExpertTokens
from ndp_worker import wire

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def tokens_of(
    key: ExpertKey, pairs: list[tuple[int, bool]], num_blocks: int | None
) -> ExpertTokens:
    rows, flags = tuple(row for row, _ in pairs), tuple(flag for _, flag in pairs)
    return ExpertTokens(key, rows, flags, num_blocks) if any(flags) else ExpertTokens(key, rows)


@st.composite
def calls(draw: st.DrawFn) -> tuple[torch.Tensor, tuple[ExpertTokens, ...]]:
    num_tokens, hidden = draw(st.integers(1, 5)), draw(st.sampled_from([1, 3, 8]))
    hidden_TH = torch.arange(num_tokens * hidden).view(num_tokens, hidden)
    layer = draw(st.integers(0, 2**32 - 1))
    keys = st.builds(ExpertKey, st.just(layer), st.integers(0, 300))
    pairs = st.lists(st.tuples(st.integers(0, num_tokens - 1), st.booleans()), max_size=4)
    blocks = st.none() | st.integers(0, 2**31 - 1)
    items = st.builds(tokens_of, keys, pairs, blocks)
    work = tuple(draw(st.lists(items, min_size=1, max_size=4)))
    return hidden_TH.to(draw(st.sampled_from(DTYPES))), work


@settings(deadline=None)
@given(st.integers(1, 2**64 - 1), calls())
def test_calls_survive_the_wire(
    request_id: int, call: tuple[torch.Tensor, tuple[ExpertTokens, ...]]
) -> None:
    hidden_TH, work = call
    frame = wire.encode_call(request_id, hidden_TH, work)
    found = wire.decode_call(frame)
    assert (found.request_id, found.work) == (request_id, work)
    assert found.hidden_TH.dtype == hidden_TH.dtype
    assert torch.equal(found.hidden_TH, hidden_TH)
    assert wire.request_id_of(frame) == request_id


@settings(deadline=None)
@given(st.integers(1, 2**64 - 1), calls(), st.sets(st.integers(0, 4095), max_size=5))
def test_answers_survive_the_wire(
    request_id: int, call: tuple[torch.Tensor, tuple[ExpertTokens, ...]], degraded: set[int]
) -> None:
    outputs = ExpertOutputs(call[0], tuple(sorted(degraded)))
    found = wire.decode_answer(wire.encode_answer(request_id, outputs))
    assert found.request_id == request_id
    assert isinstance(found.result, ExpertOutputs)
    assert found.result.degraded == outputs.degraded
    assert found.result.output_PH.dtype == call[0].dtype
    assert torch.equal(found.result.output_PH, call[0])


@settings(deadline=None)
@given(calls(), st.data())
def test_a_mutated_call_is_decoded_or_a_value_error(
    call: tuple[torch.Tensor, tuple[ExpertTokens, ...]], data: st.DataObject
) -> None:
    frame = bytearray(wire.encode_call(7, *call))
    for _ in range(data.draw(st.integers(0, 4))):
        frame[data.draw(st.integers(0, len(frame) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.just(len(frame)) | st.integers(0, len(frame)))
    try:
        found = wire.decode_call(bytes(frame[:cut]))
    except ValueError:
        return
    rows = [row for item in found.work for row in item.token_rows]
    assert all(0 <= row < found.hidden_TH.shape[0] for row in rows)


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_noise_is_a_value_error(noise: bytes) -> None:
    for decode in (wire.decode_call, wire.decode_answer):
        with pytest.raises(ValueError, match=":"):
            decode(noise)
    assert wire.request_id_of(noise) >= 0


def header(**changes: int) -> bytes:
    fields = {
        "version": 2, "kind": 1, "id": 9, "layer": 3, "experts": 1, "rows": 1,
        "tokens": 1, "hidden": 2, "dtype": 0, "reserved": 0, **changes,
    }  # fmt: skip
    return struct.pack("<4sHHQIIIIIHH", b"MTND", *fields.values())


ACTIVATIONS = struct.pack("<ff", 0.5, -2.0)
# expert, count, blocks, row; then its flag and three bytes of padding
BODY = struct.pack("<iiii4B", 5, 1, -1, 0, 0, 0, 0, 0) + ACTIVATIONS
RESTORED = struct.pack("<iiii4B", 5, 1, 3, 0, 1, 0, 0, 0) + ACTIVATIONS


def test_the_bytes_of_a_call_are_fixed() -> None:
    hidden_TH = torch.tensor([[0.5, -2.0]])
    low_bit = ExpertTokens(ExpertKey(3, 5), (0,))
    assert wire.encode_call(9, hidden_TH, [low_bit]) == header() + BODY
    restored = ExpertTokens(ExpertKey(3, 5), (0,), (True,), 3)
    assert wire.encode_call(9, hidden_TH, [restored]) == header() + RESTORED


def test_the_bytes_of_an_answer_are_fixed() -> None:
    outputs = ExpertOutputs(torch.tensor([[0.5, -2.0]]), (1, 4))
    frame = wire.encode_answer(9, outputs)
    expected = header(kind=2, layer=0, experts=2, tokens=0)
    assert frame == expected + struct.pack("<ii", 1, 4) + ACTIVATIONS


def body(expert: int = 5, count: int = 1, blocks: int = -1, row: int = 0, flags: int = 0) -> bytes:
    return struct.pack("<iiiiI", expert, count, blocks, row, flags) + ACTIVATIONS


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (header(version=1) + BODY, "wire version: got 1"),
        (header(version=3) + BODY, "wire version: got 3"),
        (header(kind=2) + BODY, "kind: got 2"),
        (header(dtype=3) + BODY, "dtype and reserved: got 3"),
        (header(reserved=1) + BODY, "got 0 and 1"),
        (header(experts=5000) + BODY, "experts: got 5000, at most 4096"),
        (header(rows=2**21) + BODY, "rows: got 2097152"),
        (header(tokens=2**17) + BODY, "tokens: got 131072"),
        (header(hidden=2**17) + BODY, "hidden: got 131072"),
        (header(tokens=2) + BODY, "announces 76"),
        (header() + BODY + b"x", "got 69 bytes"),
        (header() + body(expert=-5), "expert ids: negative"),
        (header() + body(count=2), "do not add up to the 1 rows"),
        (header() + body(row=1), "token rows: outside 0 to 0"),
        (header() + body(row=-1), "token rows: outside 0 to 0"),
        (header() + body(blocks=-2), "block counts: below -1"),
        (header() + body(flags=2), "restored: a flag other than 0 and 1"),
        (header() + body(flags=1 << 8), "padding other than 0"),
        (header() + body(blocks=3), r"restored of layer 3 expert 5: got \(\) with num_blocks 3"),
        (b"", "a header has 40"),
        (b"X" * 60, "magic"),
    ],
)
def test_malformed_calls_are_named(frame: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        wire.decode_call(frame)


@pytest.mark.parametrize(
    ("degraded", "message"),
    [
        ((-1,), "degraded: places in a call are 0 or more and rise"),
        ((3, 3), "degraded: places"),
        ((2, 1), "degraded: places"),
        ((), "announces 52"),
    ],
)
def test_malformed_answers_are_named(degraded: tuple[int, ...], message: str) -> None:
    places = struct.pack(f"<{len(degraded)}i", *degraded)
    frame = header(kind=2, layer=0, experts=len(degraded) or 1, tokens=0) + places + ACTIVATIONS
    with pytest.raises(ValueError, match=message):
        wire.decode_answer(frame)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (ValueError("row 9"), ValueError),
        (CorruptRecordError("layer 1"), CorruptRecordError),
        (ExpertUnavailableError("gone"), ExpertUnavailableError),
        (StoreFormatError("cut"), ExpertUnavailableError),  # for the caller: not to be had there
    ],
)
def test_errors_keep_their_type_and_text(
    error: StoreError | ValueError, kind: type[Exception]
) -> None:
    found = wire.decode_answer(wire.encode_error(4, error))
    assert found.request_id == 4
    assert type(found.result) is kind
    assert str(found.result) == str(error)
    long = wire.encode_error(4, ValueError("é" * 5000))
    assert len(long) <= 40 + wire.MAX_ERROR_BYTES
    assert isinstance(wire.decode_answer(long).result, ValueError)


def test_limits_hold_on_the_way_out_too() -> None:
    one = ExpertTokens(ExpertKey(0, 0), (0,))
    with pytest.raises(ValueError, match="experts: got 4097"):
        wire.encode_call(1, torch.zeros(1, 1), [one] * 4097)
    with pytest.raises(ValueError, match="dtype: got torch.float64"):
        wire.encode_call(1, torch.zeros(1, 1, dtype=torch.float64), [one])


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(0, 20), max_size=5).map(tuple), max_size=5))
def test_only_used_rows_travel(rows: list[tuple[int, ...]]) -> None:
    work = [ExpertTokens(ExpertKey(0, i), item) for i, item in enumerate(rows)]
    used, moved = wire.used_rows(work)
    assert set(used) == {row for item in rows for row in item}
    for before, after in zip(work, moved, strict=True):
        assert tuple(used[row] for row in after.token_rows) == before.token_rows
