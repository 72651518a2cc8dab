"""One expert of a manifest <-> JSON: forms, records and figures, field by field, with limits.

Also names the file and tensor that hold a record. The rules are stated in `expert_store/format.py`.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from expert_store.errors import StoreFormatError
from expert_store.factor_records import factors_bytes
from expert_store.forms import CODECS, GRIDS
from expert_store.json_fields import SHA256, Fields
from expert_store.recipe_json import (
    MAX_EXPERTS_PER_LAYER,
    MAX_LAYERS,
    group_size_json,
    read_group_size,
)
from expert_store.records import ALIGNMENT, codes_bytes
from expert_store.types import (
    PROJECTIONS,
    CodesForm,
    ExpertInfo,
    ExpertKey,
    ExpertShape,
    RecordInfo,
    RecordKind,
    RepairForm,
)
from kernels.types import GRID_BITS, check_group_size

MAX_OFFSET = 1 << 50
MAX_GAIN = 1e6
"""Largest size of a block's gain: gains are shares, so far over 1 something is damaged."""


def record_file(kind: RecordKind, layer: int) -> str:
    """Path, relative to the store, of the file that holds one layer's records of one kind."""
    return f"{kind}/layer-{layer:05d}.safetensors"


def record_name(expert: int) -> str:
    """Name of one expert's tensor in its layer's file."""
    return f"expert-{expert:05d}"


def form_json(form: CodesForm) -> dict[str, Any]:
    """The form of a codes record as plain values; a group size of 64 is not written."""
    return {
        "codec": form.codec,
        "bits": list(form.bits),
        "grids": list(form.grids),
        "part_bytes": None if form.part_bytes is None else list(form.part_bytes),
        **group_size_json(form.group_size),
    }


def read_form(fields: Fields) -> CodesForm:
    """The form of a codes record in these fields. Raises StoreFormatError naming the field."""
    codec = fields.choice("codec", CODECS)
    gate_bits, up_bits, down_bits = fields.integers("bits", 0, 16, count=3)
    gate_grid, up_grid, down_grid = fields.choices("grids", GRIDS, count=3)
    sizes = None
    if not fields.is_null("part_bytes"):
        gate, up, down = fields.integers("part_bytes", 0, MAX_OFFSET, count=3)
        sizes = (gate, up, down)
    group_size = read_group_size(fields)
    fields.close()
    try:
        return CodesForm(
            codec,
            (gate_bits, up_bits, down_bits),
            (gate_grid, up_grid, down_grid),
            sizes,
            group_size,
        )
    except ValueError as error:
        raise StoreFormatError(f"{fields.where}: {error}") from error


def repair_json(repair: RepairForm) -> dict[str, Any]:
    """The form of a factors record as plain values."""
    return {"bits": repair.bits, "grid": repair.grid, "blocks": repair.letters}


def read_repair(fields: Fields) -> RepairForm:
    """The form of a factors record in these fields. Raises StoreFormatError naming the field."""
    grid = fields.choice("grid", GRIDS)
    bits = fields.choice("bits", GRID_BITS[grid])
    repair = RepairForm.of_letters(bits, grid, fields.string("blocks", r"[gudGUD]*"))
    fields.close()
    return repair


def expert_json(info: ExpertInfo) -> dict[str, Any]:
    """One expert as plain values."""
    return {
        "layer": info.key.layer,
        "expert": info.key.expert,
        "form": form_json(info.form),
        "repair": repair_json(info.repair),
        "block_gains": [float(gain) for gain in info.block_gains],
        "kurtosis": float(info.kurtosis),
        "error": float(info.error),
        "restored_error": float(info.restored_error),
        "codes": asdict(info.codes),
        "factors": asdict(info.factors) if info.factors else None,
    }


def read_expert(fields: Fields, shape: ExpertShape) -> ExpertInfo:
    """The expert in these fields. Raises StoreFormatError naming the field."""
    key = ExpertKey(
        fields.integer("layer", 0, MAX_LAYERS), fields.integer("expert", 0, MAX_EXPERTS_PER_LAYER)
    )
    form, repair = read_form(fields.fields("form")), read_repair(fields.fields("repair"))
    _check_groups(form, shape, fields)
    codes = _record(fields.fields("codes"), "codes", key, codes_bytes(shape, form))
    factors = None
    if repair.blocks:
        expected = factors_bytes(shape, repair)
        factors = _record(fields.fields("factors"), "factors", key, expected)
    elif fields.take("factors") is not None:
        raise fields.bad("factors", "null where there are no blocks", "a record")
    gains = fields.numbers("block_gains", -MAX_GAIN, MAX_GAIN, count=len(repair.blocks))
    info = ExpertInfo(
        key=key,
        form=form,
        codes=codes,
        factors=factors,
        repair=repair,
        kurtosis=fields.number("kurtosis"),
        error=fields.number("error"),
        restored_error=fields.number("restored_error"),
        block_gains=tuple(gains),
    )
    fields.close()
    return info


def _check_groups(form: CodesForm, shape: ExpertShape, fields: Fields) -> None:
    """StoreFormatError for groups that do not divide the inputs of this shape's matrices."""
    for i, name in enumerate(PROJECTIONS):
        if form.codec == "tiles" and form.bits[i] != 16:
            try:
                check_group_size(form.group_size, shape.projection(name)[1])
            except ValueError as error:
                raise StoreFormatError(f"{fields.where}: form of {name}: {error}") from error


def _record(fields: Fields, kind: RecordKind, key: ExpertKey, num_bytes: int) -> RecordInfo:
    # Only the one name that the layout allows: a path can never lead out of the store.
    expected = record_file(kind, key.layer)
    if (file := fields.string("file")) != expected:
        raise fields.bad("file", expected, repr(file))
    offset = fields.integer("offset", 0, MAX_OFFSET)
    if offset % ALIGNMENT:
        raise fields.bad("offset", f"a multiple of {ALIGNMENT}", offset)
    found = fields.integer("num_bytes", 0, MAX_OFFSET)
    if found != num_bytes:
        raise fields.bad("num_bytes", f"{num_bytes} for this shape", found)
    record = RecordInfo(file, offset, found, fields.string("sha256", SHA256))
    fields.close()
    return record
