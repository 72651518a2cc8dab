"""Goal: records are exactly the bytes that `expert_store/format.py` says, and read back as written.

Method: golden bytes, a round-trip property over shapes, forms and blocks, records that do not fit.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from expert_store.errors import StoreFormatError
from expert_store.files import layout
from expert_store.format import (
    FactorBlock,
    PlaneBlock,
    blocks_within,
    codes_bytes,
    encode_codes,
    encode_factors,
    encode_parts,
    factors_bytes,
    form_of,
    parse_codes,
    parse_factors,
)
from expert_store.types import (
    PROJECTIONS,
    CodesForm,
    ExpertKey,
    ExpertShape,
    Projection,
    RecordRequest,
    RepairBlockSpec,
    RepairForm,
)
from kernels.packing import pack, pack_bf16, pack_symmetric
from kernels.reference import dequantize, dequantize_low_rank
from kernels.types import GatedMLP, Grid, QuantizedMatrix

KEY = ExpertKey(3, 7)
WIDTHS: list[tuple[int, Grid]] = [(bits, "affine") for bits in (2, 3, 4, 16)]
WIDTHS += [(bits, "symmetric") for bits in (1, 2, 3, 4)]
SMALL = ExpertShape(hidden=64, ffn=128, activation="silu", has_bias=False)


def ramp_matrix(
    rows: int, cols: int, bits: int, step: int, grid: Grid = "affine"
) -> QuantizedMatrix:
    """A matrix that needs no random numbers: golden bytes must not depend on a generator."""
    numbers = torch.arange(rows * cols).view(rows, cols)
    if bits == 16:
        return pack_bf16((numbers % 251).float() * step)
    codes = ((numbers * step) % (1 << bits)).to(torch.uint8)
    groups = torch.arange(rows * (cols // 64)).view(rows, -1)
    if grid == "symmetric":
        return pack_symmetric(
            codes, (groups * 7 % 256).to(torch.uint8), 0.5 + torch.arange(rows) / 64, bits
        )
    return pack(codes, 0.5 + (groups % 8) / 16, (groups % 4).float(), bits)


def ramp_mlp(shape: ExpertShape, form: CodesForm) -> GatedMLP:
    biases: dict[str, torch.Tensor] = {}
    if shape.has_bias:
        biases = {
            f"{name}_bias": torch.arange(shape.projection(name)[0]).float() for name in PROJECTIONS
        }
    matrices = {
        name: ramp_matrix(*shape.projection(name), bits, step, grid)
        for step, (name, bits, grid) in enumerate(
            zip(PROJECTIONS, form.bits, form.grids, strict=True), start=1
        )
    }
    return GatedMLP(**matrices, activation=shape.activation, **biases)


def ramp_blocks(shape: ExpertShape, repair: RepairForm) -> list[FactorBlock | PlaneBlock]:
    made: list[FactorBlock | PlaneBlock] = []
    for step, block in enumerate(repair.blocks):
        name, (rows, cols) = block.projection, shape.projection(block.projection)
        if block.kind == "plane":
            made.append(PlaneBlock(name, ramp_matrix(rows, cols, 1, step + 1, "symmetric")))
            continue
        right = ramp_matrix(16, cols, repair.bits, step, repair.grid)
        left_t = ramp_matrix(16, rows, repair.bits, step + 1, repair.grid)
        made.append(FactorBlock(name, right, left_t))
    return made


SYMMETRIC_MIX = CodesForm("tiles", (1, 3, 4), ("symmetric", "affine", "symmetric"))


@pytest.mark.parametrize(
    ("form", "has_bias", "num_bytes", "name"),
    [
        (CodesForm.uniform(2), False, 7680, "2"),
        (CodesForm.uniform(3), True, 12032, "3 bias"),
        (CodesForm.uniform(4), False, 13824, "4"),
        (CodesForm.uniform(16), True, 50432, "16 bias"),
        (CodesForm.uniform(2, "symmetric"), False, 7168, "2 symmetric"),
        # 8*144 + 256, 8*448, 8*528 + 128 and 2*512 + 256 bytes of biases: all multiples of 64.
        (SYMMETRIC_MIX, True, 1408 + 3584 + 4352 + 1280, "mix bias"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_golden_codes_record(form: CodesForm, has_bias: bool, num_bytes: int, name: str) -> None:
    shape = replace(SMALL, has_bias=has_bias)
    mlp = ramp_mlp(shape, form)
    record = encode_codes(mlp)
    assert form_of(mlp) == form
    assert record.numel() == num_bytes == codes_bytes(shape, form)
    assert hashlib.sha256(record.numpy()).hexdigest() == GOLDEN[name]


def test_biases_lie_last_as_little_endian_floats() -> None:
    shape = replace(SMALL, has_bias=True)
    record = bytes(encode_codes(ramp_mlp(shape, CodesForm.uniform(2))).numpy())
    ramps = [struct.pack(f"<{n}f", *range(n)) for n in (128, 128, 64)]
    assert record[7680:] == b"".join(ramps)


@pytest.mark.parametrize(
    ("repair", "num_bytes", "name"),
    [
        (RepairForm.of_letters(3, "affine", "ugdu"), 4 * 3 * 448, "factors"),
        # right [16, 64] is 304 bytes, so 320, left [16, 128] 576; a plane 8 * 144 + 256 or 128.
        (RepairForm.of_letters(2, "symmetric", "uGdD"), 2 * (320 + 576) + 1408 + 1280, "planes"),
    ],
    ids=["factors", "planes"],
)
def test_golden_factors_record(repair: RepairForm, num_bytes: int, name: str) -> None:
    blocks = ramp_blocks(SMALL, repair)
    record = encode_factors(blocks)
    assert record.numel() == num_bytes == factors_bytes(SMALL, repair)
    assert tuple(block.spec for block in blocks) == repair.blocks
    assert sum(block.num_bytes for block in blocks) == num_bytes
    assert hashlib.sha256(record.numpy()).hexdigest() == GOLDEN[name]


def test_golden_container_header() -> None:
    header, entries = layout([("expert-00000", "U8", (128,), 128)], {"format": "pt"})
    assert header == (
        (120).to_bytes(8, "little")
        + b'{"__metadata__":{"format":"pt"},'
        + b'"expert-00000":{"dtype":"U8","shape":[128],"data_offsets":[0,128]}}'
        + b" " * 21
    )
    assert entries[0].start == 128


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    sizes = st.integers(1, 3).map(lambda n: 64 * n)
    widths = [draw(st.sampled_from(WIDTHS)) for _ in PROJECTIONS]
    factor_bits, factor_grid = draw(st.sampled_from([w for w in WIDTHS if w[0] != 16]))
    letters = "".join(draw(st.lists(st.sampled_from("gudGUD"), max_size=6)))
    return {
        "shape": ExpertShape(draw(sizes), draw(sizes), "gelu", draw(st.booleans())),
        "form": CodesForm(
            "tiles", tuple(bits for bits, _ in widths), tuple(grid for _, grid in widths)
        ),
        "repair": RepairForm.of_letters(factor_bits, factor_grid, letters),
    }


@settings(max_examples=40, deadline=None)
@given(cases())
def test_records_round_trip(case: dict[str, Any]) -> None:
    shape, form, repair = case["shape"], case["form"], case["repair"]
    mlp = ramp_mlp(shape, form)
    # A view at an odd offset, as the wire may give it.
    padded = torch.full((codes_bytes(shape, form) + 3,), 0xA5, dtype=torch.uint8)
    padded[3:] = encode_codes(mlp)
    codes = parse_codes(KEY, padded[3:], shape, form)
    assert (codes.key, codes.num_bytes) == (KEY, codes_bytes(shape, form))
    assert form_of(codes.mlp) == form
    for name in PROJECTIONS:
        assert torch.equal(getattr(codes.mlp, name).data, getattr(mlp, name).data)
        want, got = getattr(mlp, f"{name}_bias"), getattr(codes.mlp, f"{name}_bias")
        assert (want is None) == (got is None) == (not shape.has_bias)
        assert want is None or torch.equal(want, got)
    parts = ramp_blocks(shape, repair)
    record = encode_factors(parts)
    whole = parse_factors(KEY, record, shape, repair)
    for count in range(len(parts) + 1):
        part = repair.prefix(count)
        size = factors_bytes(shape, part)
        assert size % 64 == 0
        assert size == sum(block.num_bytes for block in parts[:count])
        # The same blocks from the first bytes of the record, and from all of them cut afterwards.
        check_blocks(parse_factors(KEY, record[:size], shape, part), parts[:count])
        check_blocks(whole.prefix(count), parts[:count])


def check_blocks(compensator: Any, parts: list[FactorBlock | PlaneBlock]) -> None:
    assert compensator.form.blocks == tuple(part.spec for part in parts)
    for name in PROJECTIONS:
        own = [p for p in parts if p.projection == name and isinstance(p, FactorBlock)]
        left, right = dequantize_low_rank(getattr(compensator.factors, name))
        assert getattr(compensator.factors, name).rank == compensator.form.rank(name)
        assert compensator.form.rank(name) == 16 * len(own)
        for i, part in enumerate(own):
            rows = slice(16 * i, 16 * i + 16)
            assert torch.equal(right[rows], dequantize(part.right))
            assert torch.equal(left[:, rows], dequantize(part.left_t).T)
        planes = [p for p in parts if p.projection == name and isinstance(p, PlaneBlock)]
        found = getattr(compensator.factors, f"{name}_planes")
        assert len(found) == len(planes) == compensator.form.num_blocks(name, "plane")
        for plane, part in zip(found, planes, strict=True):
            assert torch.equal(plane.data, part.plane.data)


@given(
    letters=st.text("gudGUD", max_size=8),
    share=st.floats(0, 1),
    grid=st.sampled_from(["affine", "symmetric"]),
)
def test_blocks_within_is_the_longest_prefix_that_fits(
    letters: str, share: float, grid: Grid
) -> None:
    shape = ExpertShape(128, 192, "silu", has_bias=False)
    repair = RepairForm.of_letters(3, grid, letters)
    limit = share * factors_bytes(shape, repair)
    sizes = [factors_bytes(shape, repair.prefix(n)) for n in range(len(letters) + 1)]
    expected = max(n for n, size in enumerate(sizes) if size <= limit)
    assert blocks_within(shape, repair, limit) == expected
    assert blocks_within(shape, repair, sizes[-1]) == len(letters)


@pytest.mark.parametrize("wrong", [-1, 1, -64, 64])
def test_a_record_of_the_wrong_length_is_refused(wrong: int) -> None:
    form = CodesForm.uniform(2)
    size = codes_bytes(SMALL, form) + wrong
    with pytest.raises(StoreFormatError, match=f"codes record of layer 3 expert 7.* got {size}"):
        parse_codes(KEY, torch.zeros(size, dtype=torch.uint8), SMALL, form)
    for letters in ("u", "U"):
        repair = RepairForm.of_letters(3, "affine", letters)
        size = factors_bytes(SMALL, repair) + wrong
        with pytest.raises(StoreFormatError, match=f"factors record of layer 3 exp.* got {size}"):
            parse_factors(KEY, torch.zeros(size, dtype=torch.uint8), SMALL, repair)


def test_half_a_set_of_biases_is_refused() -> None:
    shape = replace(SMALL, has_bias=True)
    with pytest.raises(ValueError, match="biases"):
        encode_codes(replace(ramp_mlp(shape, CodesForm.uniform(2)), up_bias=None))


def test_blocks_that_no_record_can_hold_are_refused() -> None:
    one = FactorBlock("up", ramp_matrix(16, 64, 3, 1), ramp_matrix(16, 128, 3, 1))
    other = FactorBlock("up", ramp_matrix(16, 64, 2, 1), ramp_matrix(16, 128, 2, 1))
    with pytest.raises(ValueError, match="expected one width and grid in a record"):
        encode_factors([one, other])
    with pytest.raises(ValueError, match="plane of gate: got 2 bits on grid symmetric"):
        encode_factors([PlaneBlock("gate", ramp_matrix(128, 64, 2, 1, "symmetric"))])


def test_parts_of_any_length_start_at_multiples_of_64() -> None:
    parts = [torch.full((n,), n, dtype=torch.uint8) for n in (65, 1, 64)]
    record = encode_parts(parts, [None, None, None])
    form = CodesForm.streams("cuszp", [65, 1, 64])
    assert record.numel() == codes_bytes(SMALL, form) == 128 + 64 + 64
    assert bytes(record.numpy()) == b"A" * 65 + b"\0" * 63 + b"\1" + b"\0" * 63 + b"@" * 64


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CodesForm.uniform(1), r"bits of gate: got 1, expected one of \(2, 3, 4, 16\)"),
        (lambda: CodesForm.uniform(16, "symmetric"), "bits of gate: got 16.*grid symmetric"),
        (lambda: CodesForm.uniform(2, "cubic"), "grid: got 'cubic', expected one of affine, symm"),
        (lambda: CodesForm("zip", (2, 2, 2), ("affine",) * 3), "codec: got 'zip'"),
        (lambda: CodesForm("tiles", (2, 2), ("affine",) * 3), "expected one each for gate, up"),
        (lambda: CodesForm.streams("sz3", [1, 2, 0]), "three lengths of at least 1"),
        (lambda: RepairForm.of_letters(3, "affine", "gx"), "got 'x', expected letters of gudGUD"),
        (lambda: RepairForm(1, "affine", ()), "factor bits: got 1, expected one of"),
        (lambda: RepairBlockSpec("left", "rank"), "block: got 'left', 'rank'"),
    ],
)
def test_forms_that_do_not_exist_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_mean_bits_count_codes_of_tiles_and_all_of_streams() -> None:
    assert CodesForm("tiles", (2, 3, 4), ("affine",) * 3).mean_bits(1000) == 3
    assert CodesForm.streams("sz3", [100, 200, 300]).mean_bits(800) == 2


def test_a_longer_read_covers_a_shorter_one() -> None:
    def request(blocks: int | None, kind: Any = "factors", key: ExpertKey = KEY) -> RecordRequest:
        return RecordRequest(key, kind, blocks)

    assert request(None).covers(request(3))
    assert request(3).covers(request(3))
    assert request(3).covers(request(2))
    assert not request(2).covers(request(3))
    assert not request(3).covers(request(None))
    assert not request(None).covers(request(None, "codes"))
    assert not request(None).covers(request(1, key=ExpertKey(3, 8)))


def test_letters_are_the_blocks() -> None:
    repair = RepairForm.of_letters(2, "symmetric", "gUdD")
    projections: list[Projection] = ["gate", "up", "down", "down"]
    assert [block.projection for block in repair.blocks] == projections
    assert [block.kind for block in repair.blocks] == ["rank", "plane", "rank", "plane"]
    assert repair.letters == "gUdD"
    assert (repair.rank("down"), repair.num_blocks("down", "plane")) == (16, 1)


GOLDEN = {
    "2": "65145afcc4d467b5b6418c4eb6209064084c522b1f0d089deeaf55739b04101c",
    "3 bias": "d5bdaa9e2b550e2e19a70616f1083de82d06c41a960829902022ba34f72e820d",
    "4": "aac6366a221a93f8475f80a666bda84ee06f7a4a05108ddaa2bfa3e525127a9c",
    "16 bias": "83b0156d5eb661e771d8a3d9b5d918bfb60a9040d2939c31f07bfddf98caad0e",
    "factors": "3ea31668755af9edf5fb48c93615641f9aa3073d9440bd66c0c834f2260974cd",
    "2 symmetric": "4b12c908ed8045f741e1c2603bdfddc949507fe0ae5ef5f246fd1b244178a05d",
    "mix bias": "2e5d07b814dafb84b83a3e56366bb595640db4520f2b81a08f56657f7cfb5244",
    "planes": "e9ecc98937755a92e48dc81fc86010396b879437c8c1055f15a9b0215bdea566",
}
