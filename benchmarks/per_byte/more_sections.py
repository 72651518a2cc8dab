"""Sections of the page that are not about lines: codes on the wire, and the companion's study."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from cluster.report.page import Part, Picture, Section, Table
from cluster.report.plots import heat_map
from cluster.study import StudyRow
from cluster.study_page import heat_grid, lines_of
from expert_store.codecs.entropy import wire_bytes
from expert_store.segment import Segment
from expert_store.types import RecordKind, RecordRequest
from expert_store.wire_form import record_sections

WIRE_EXPERTS = 12
"""Measured of each store, spread over it."""


def wire_section(stores: Mapping[str, Path]) -> Section | None:
    """Bytes of codes and compensators between hosts in the entropy-coded form, by label."""
    cells: list[dict[str, str | None]] = []
    for label, store in stores.items():
        segment = Segment(store)
        try:
            codes, factors = (_shares(segment, kind) for kind in ("codes", "factors"))
        finally:
            segment.close()
        cells.append({"experts": label, "codes": codes, "compensators": factors})
    if not cells:
        return None
    note = (
        f"Bytes of the zstd form over bytes of the record, mean of up to {WIRE_EXPERTS} experts. "
        "Lossless: the codes are the same. Bits moved elsewhere on this page are of the plain form."
    )
    return Section("Codes between hosts, entropy-coded", (Table.of(cells), note))


def _shares(segment: Segment, kind: RecordKind) -> str | None:
    keys = sorted(segment.manifest.experts)
    plain = coded = 0
    for key in keys[:: -(-len(keys) // WIRE_EXPERTS)]:
        if kind == "factors" and segment.manifest.experts[key].factors is None:
            continue
        request = RecordRequest(key, kind)
        (record,) = segment.fetch([request])
        plain += record.numel()
        coded += wire_bytes(record, record_sections(segment.manifest, request))
    return f"{100 * coded / plain:.0f} %" if plain else None


def study_section(rows: Sequence[StudyRow]) -> Section | None:
    """The heat map of `benchmarks.study`, with its figures."""
    if not rows:
        return None
    grid = heat_grid(rows)
    svg = heat_map(
        grid.values,
        rows=grid.rows,
        columns=grid.columns,
        x_label="error bound (cuszp) or energy of noise",
        y_label="layers and experts that have it",
        value_label="log10 of KL",
    )
    caption = "KL from the original when some experts alone are error-bounded, by depth and heat."
    cells = [
        {name: None if value is None else str(value) for name, value in line.items()}
        for line in lines_of(rows)
    ]
    parts: tuple[Part, ...] = (
        Picture("study", svg, caption),
        Table.of(cells),
        "Made by `python -m benchmarks.study`; errors are standard errors over windows.",
    )
    return Section("Error bounds by depth and heat (arXiv 2509.07727)", parts)
