"""Goal: the quantisers' report is put together whole. Method: replace sections of a small page."""

from __future__ import annotations

import torch

from benchmarks.quantizers import PARTS, methods, with_section
from expert_store.matrix.moments import Moment
from kernels.types import matrix_bytes


def test_sections_are_replaced_and_keep_their_order() -> None:
    headings = [heading for heading, _ in PARTS.values()]
    page = "# Title\n"
    for heading in reversed(headings):
        page = with_section(page, heading, f"body of {heading}\n\nline")
    assert [line[3:] for line in page.splitlines() if line.startswith("## ")] == headings
    again = with_section(page, headings[1], "new")
    assert again.count("\n## ") == len(headings)
    assert f"## {headings[1]}\n\nnew\n" in again
    assert f"body of {headings[1]}" not in again
    assert again.startswith("# Title\n\n## ")


def test_every_method_gives_the_size_it_is_listed_with() -> None:
    weight = torch.randn(16, 128, generator=torch.Generator().manual_seed(0))
    values = torch.eye(128) + 0.2
    for method in methods():
        matrix = method.run(weight, 2, Moment(values))
        assert matrix.data.numel() == matrix_bytes(16, 128, 2, method.grid), method.name
