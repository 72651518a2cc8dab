"""Goal: an error-bounded codec serves no weight farther off than its bound, says so when it cannot,
and refuses damaged bytes. Method: property tests over heavy tails, zeros, constants and scales from
denormal to huge, on what is served (bfloat16 or float32); bytes cut, flipped and exchanged."""

from __future__ import annotations

import zlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from expert_store.codecs import cuszp, sz3
from expert_store.codecs.bound import ErrorBound, assert_within, largest_error
from expert_store.errors import StoreError, StoreFormatError
from kernels.block_code import decode_block_code
from kernels.packing import bf16_weight

BOUNDS = [
    ErrorBound(value, mode)
    for mode, values in (("absolute", (0.003, 1.0)), ("row", (0.02, 0.5)), ("group", (0.1, 1.0)))
    for value in values
]


def nasty(rows: int, cols: int, seed: int, power: float, exponent: int = 0) -> torch.Tensor:
    """bfloat16 weights as float32: heavy tails, rows of unlike scale, zeros, a constant row."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, cols, generator=generator)
    weight = weight.sign() * weight.abs() ** power
    weight[1::5] = 0
    weight[2::7] = 1.5
    weight *= (torch.rand(rows, 1, generator=generator) * 12 - 6).exp2()
    return (weight.double() * 2.0**exponent).to(torch.bfloat16).float()


def served_by_sz3(weight: torch.Tensor, bound: ErrorBound, **kwargs: str) -> torch.Tensor:
    rows, cols = weight.shape
    return bf16_weight(sz3.decode(sz3.encode(weight, bound, **kwargs), rows, cols)).float()


def served_by_cuszp(weight: torch.Tensor, bound: ErrorBound, **kwargs: bool) -> torch.Tensor:
    rows, cols = weight.shape
    return decode_block_code(cuszp.decode(cuszp.encode(weight, bound, **kwargs), rows, cols))


SERVED = {"sz3": served_by_sz3, "cuszp": served_by_cuszp}
every_codec = pytest.mark.parametrize("codec", SERVED)


@every_codec
@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 12),
    groups=st.integers(1, 3),
    bound=st.sampled_from(BOUNDS),
    power=st.sampled_from([1.0, 2.0, 6.0]),
    exponent=st.integers(-150, 90),
    seed=st.integers(0, 2**16),
)
def test_the_bound_holds_on_what_is_served(
    codec: str, rows: int, groups: int, bound: ErrorBound, power: float, exponent: int, seed: int
) -> None:
    if bound.mode == "absolute":
        exponent = min(exponent, 3)
    weight = nasty(rows, 64 * groups, seed, power, exponent)
    largest = float((weight.abs().double().amax(1) / bound.of(weight).amin(1)).max())
    if largest > 2**20:
        with pytest.raises(ValueError, match="too tight"):
            SERVED[codec](weight, bound)
    else:
        assert largest_error(weight, SERVED[codec](weight, bound), bound.of(weight)) <= 1


@pytest.mark.parametrize("predictor", ["none", "interpolation", "lorenzo"])
@pytest.mark.parametrize("bound", BOUNDS, ids=str)
def test_every_predictor_keeps_the_bound(predictor: sz3.Predictor, bound: ErrorBound) -> None:
    weight = nasty(40, 192, 0, 2.0)
    served = served_by_sz3(weight, bound, predictor=predictor)
    assert largest_error(weight, served, bound.of(weight)) <= 1


@pytest.mark.parametrize("bound", BOUNDS, ids=str)
def test_differences_keep_the_bound(bound: ErrorBound) -> None:
    weight = nasty(40, 192, 0, 2.0)
    served = served_by_cuszp(weight, bound, differenced=True)
    assert largest_error(weight, served, bound.of(weight)) <= 1


def test_rounding_to_bfloat16_is_within_the_bound() -> None:
    """A fine bound: many of the nearest bfloat16 would break it, and plain rounding does."""
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    weight = weight.to(torch.bfloat16).float()
    bound = ErrorBound(0.003, "row")
    assert largest_error(weight, served_by_sz3(weight, bound), bound.of(weight)) <= 1
    rounded = served_by_cuszp(weight, bound).to(torch.bfloat16).float()
    assert largest_error(weight, rounded, bound.of(weight)) > 1
    assert (served_by_sz3(weight, bound) != weight).any()


def test_a_bound_finer_than_bfloat16_is_refused_with_what_would_do() -> None:
    """Float32 weights that bfloat16 cannot hold; at the bound that the message gives it works."""
    weight = torch.full((2, 64), 1 + 2.0**-9)
    with pytest.raises(ValueError, match="finer than bfloat16.*at least absolute:0.00195"):
        sz3.encode(weight, ErrorBound(0.001, "absolute"))
    assert (
        largest_error(
            weight, served_by_cuszp(weight, b := ErrorBound(0.001, "absolute")), b.of(weight)
        )
        <= 1
    )
    bound = ErrorBound(2.0**-9, "absolute")
    assert largest_error(weight, served_by_sz3(weight, bound), bound.of(weight)) <= 1


@every_codec
def test_weights_that_are_no_weights_are_refused(codec: str) -> None:
    bound = ErrorBound(0.1, "row")
    for value in (float("nan"), float("inf"), -float("inf")):
        weight = torch.ones(3, 64)
        weight[2, 5] = value
        with pytest.raises(ValueError, match="NaN or infinity"):
            SERVED[codec](weight, bound)
    with pytest.raises(ValueError, match="float"):
        SERVED[codec](torch.ones(3, 64, dtype=torch.int64), bound)
    encode = sz3.encode if codec == "sz3" else cuszp.encode
    with pytest.raises(ValueError, match="rows, cols"):
        encode(torch.ones(64), bound)
    with pytest.raises(ValueError, match="groups of 64"):
        SERVED[codec](torch.ones(3, 60), ErrorBound(0.1, "group"))


def test_a_broken_codec_is_seen() -> None:
    """The check that every write passes through: an error of 1.01 bounds, and NaN."""
    weight = torch.ones(2, 64)
    bound = ErrorBound(0.1, "absolute")
    assert_within(weight, weight + 0.0999, bound, "sz3")
    for wrong in (0.101, float("nan")):
        served = weight.clone()
        served[1, 7] += wrong
        with pytest.raises(AssertionError, match="sz3: a weight of .2, 64. is"):
            assert_within(weight, served, bound, "sz3")


def test_sz3_takes_any_shape_and_bounds_relative_to_a_row() -> None:
    """Cols need no multiple of 64; a row of zeros among others stays zero; one row's outlier does
    not coarsen another row."""
    weight = nasty(7, 37, 3, 2.0)
    weight[0, 0] = 1e6
    served = served_by_sz3(weight, ErrorBound(0.1, "row"))
    assert torch.equal(served[1], torch.zeros(37))
    small = ErrorBound(0.1, "row").of(weight)[3, 0]
    assert float((served[3] - weight[3]).abs().max()) <= small < 100
    assert served_by_sz3(torch.ones(1, 1), ErrorBound(0.1, "row")).item() == pytest.approx(
        1, abs=0.1
    )


def test_looser_bounds_need_fewer_bytes() -> None:
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0)).bfloat16().float()
    for encode in (sz3.encode, cuszp.encode):
        sizes = [encode(weight, ErrorBound(v, "row")).numel() for v in (0.01, 0.1, 0.5, 1.0, 2.0)]
        assert sizes == sorted(sizes, reverse=True)
        assert sizes[0] > 3 * sizes[-1]


@every_codec
def test_cut_and_exchanged_parts_are_refused(codec: str) -> None:
    encode, decode = (sz3.encode, sz3.decode) if codec == "sz3" else (cuszp.encode, cuszp.decode)
    data = encode(nasty(9, 128, 0, 2.0), ErrorBound(0.1, "group"))
    for size in (0, 3, 31, 40, data.numel() // 2, data.numel() - 1):
        with pytest.raises(StoreFormatError, match=f"{codec} part"):
            decode(data[:size], 9, 128)
    with pytest.raises(StoreFormatError, match=f"{codec} part"):
        decode(torch.cat((data, data[:4])), 9, 128)
    for shape in ((128, 9 * 64), (9, 64), (10, 128)):
        with pytest.raises(StoreFormatError, match=f"{codec} part.*header says"):
            decode(data, *shape)
    other = cuszp if codec == "sz3" else sz3
    with pytest.raises(StoreFormatError, match="part"):
        other.decode(data, 9, 128)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_damaged_sz3_parts_are_refused_before_sz3_sees_them(data: st.DataObject) -> None:
    """Any one byte: the checksum covers all that the lengths do not."""
    part = sz3.encode(nasty(5, 64, 0, 2.0), ErrorBound(0.1, "group")).clone()
    place = data.draw(st.integers(0, part.numel() - 1))
    part[place] ^= data.draw(st.integers(1, 255))
    with pytest.raises(StoreFormatError, match="sz3 part"):
        sz3.decode(part, 5, 64)


def test_a_table_larger_than_its_matrix_is_not_unpacked() -> None:
    """A part with right lengths and checksum whose table would unpack to 64 MiB, or is no zlib."""
    for table in (zlib.compress(bytes(1 << 26)), zlib.compress(bytes(19)), b"no zlib"):
        body = table + bytes(16)
        head = sz3.HEADER.pack(b"MTS3", 1, 0, 0, 5, 64, len(table), 16, zlib.crc32(body))
        part = torch.frombuffer(bytearray(head + body), dtype=torch.uint8)
        with pytest.raises(StoreFormatError, match="its table"):
            sz3.decode(part, 5, 64)


def test_without_the_library_only_this_codec_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, bound = nasty(4, 64, 0, 1.0), ErrorBound(0.1, "row")
    data = sz3.encode(weight, bound)
    monkeypatch.setattr(sz3, "pysz", None)
    for use in (lambda: sz3.encode(weight, bound), lambda: sz3.decode(data, 4, 64)):
        with pytest.raises(StoreError, match="pip install pysz==1.1.0.*codec cuszp"):
            use()
    cuszp.encode(weight, bound)


def test_a_bound_is_parsed_and_written() -> None:
    for text, value, mode in (
        ("row:0.1", 0.1, "row"),
        ("group:1.0", 1.0, "group"),
        ("absolute:0.003", 0.003, "absolute"),
    ):
        bound = ErrorBound.parse(text)
        assert (bound.value, bound.mode, str(bound)) == (value, mode, text)
    assert ErrorBound.parse("row:1e-3") == ErrorBound(0.001, "row")
    for wrong in ("", "row", "row:", "row:x", "tensor:0.1", ":0.1", "0.1", "row:0.1:2", "row=0.1"):
        with pytest.raises(ValueError, match="expected MODE:VALUE.*row:0.1"):
            ErrorBound.parse(wrong)
    for wrong in ("row:0", "row:-1", "row:nan", "row:inf", "group:5", "row:1e-9", "absolute:1e-40"):
        with pytest.raises(ValueError, match="error bound: got"):
            ErrorBound.parse(wrong)
    with pytest.raises(ValueError, match="got mode 'tensor'"):
        ErrorBound(0.1, "tensor")


def test_a_bound_is_relative_to_its_row_or_group() -> None:
    weight = torch.ones(2, 128)
    weight[1, :64] = 3
    weight[0] = 0
    assert ErrorBound(0.5, "absolute").of(weight).tolist() == [[0.5], [0.5]]
    row = ErrorBound(0.5, "row").of(weight)
    assert row[:, 0].tolist() == [2.0**-100, pytest.approx(0.5 * 5**0.5)]
    group = ErrorBound(0.5, "group").of(weight)
    assert group[0].tolist() == [2.0**-100] * 2
    assert group[1].tolist() == pytest.approx([1.5, 0.5])
    weight[1, 64:] = 0  # counts as a thousandth of its row
    assert ErrorBound(0.5, "group").of(weight)[1, 1] == pytest.approx(0.5 * 4.5**0.5 / 1024)


def test_codes_go_to_memory_that_is_theirs() -> None:
    """Encoding leaves the weight alone, and a view of it (not contiguous) gives the same bytes."""
    weight = nasty(64, 70, 1, 2.0)
    before = weight.clone()
    view = weight.T[:64].T
    for encode in (sz3.encode, cuszp.encode):
        assert torch.equal(
            encode(view, ErrorBound(0.1, "row")), encode(view.clone(), ErrorBound(0.1, "row"))
        )
        assert torch.equal(
            encode(view.bfloat16(), ErrorBound(0.1, "row")), encode(view, ErrorBound(0.1, "row"))
        )
    assert torch.equal(weight, before)
