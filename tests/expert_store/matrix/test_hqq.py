"""Goal: our matrices are hqq's codes, in our layout.

Method: compare with hqq's own dequantisation; the float16 scales are the only difference allowed.
"""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
import torch
from hqq.core.quantize import Quantizer

from expert_store.matrix import hqq
from expert_store.matrix.hqq import quantize_hqq
from kernels.packing import unpack
from kernels.reference import dequantize


def random_weight(rows: int, cols: int, seed: int = 0, scale: float = 0.05) -> torch.Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed)) * scale


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize(("rows", "cols"), [(64, 64), (7, 128), (48, 192)])
def test_codes_are_those_of_hqq(bits: int, rows: int, cols: int) -> None:
    weight = random_weight(rows, cols)
    codes, meta = Quantizer.quantize(
        weight, nbits=bits, group_size=64, axis=1, bitpack=False, device="cpu"
    )
    matrix = quantize_hqq(weight, bits)
    assert (matrix.rows, matrix.cols, matrix.bits) == (rows, cols, bits)
    found, scale, _ = unpack(matrix)
    assert torch.equal(found.float(), codes.view(rows, cols))
    torch.testing.assert_close(scale, meta["scale"].view(rows, -1), rtol=1e-3, atol=0)
    theirs = Quantizer.dequantize(codes, meta | {"compute_dtype": torch.float32})
    torch.testing.assert_close(dequantize(matrix), theirs, rtol=2e-3, atol=2e-4)


def test_error_falls_with_bits() -> None:
    weight = random_weight(128, 256)
    errors = [
        float((dequantize(quantize_hqq(weight, bits)) - weight).norm() / weight.norm())
        for bits in (2, 3, 4)
    ]
    # A Gaussian in groups of 64: about 0.43, 0.18, 0.084 (FACTS).
    assert errors == pytest.approx([0.43, 0.18, 0.084], rel=0.1)


def test_large_matrices_go_in_row_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = random_weight(40, 128)
    monkeypatch.setattr(hqq, "CHUNK_WEIGHTS", 16 * 128)
    chunked = quantize_hqq(weight, 2)
    parts = [dequantize(quantize_hqq(part, 2)) for part in weight.split(16)]
    assert torch.equal(dequantize(chunked), torch.cat(parts))


def test_constant_and_zero_groups_survive() -> None:
    weight = random_weight(16, 128)
    weight[3, :64], weight[5] = 0.0, 0.25
    found = dequantize(quantize_hqq(weight, 2))
    assert found.isfinite().all()
    assert torch.equal(found[3, :64], torch.zeros(64))
    torch.testing.assert_close(found[5], torch.full((128,), 0.25))


def test_a_shape_that_groups_do_not_divide() -> None:
    with pytest.raises(ValueError, match=r"expected \[rows, multiple of 64\], got \(8, 96\)"):
        quantize_hqq(torch.zeros(8, 96), 2)


def test_what_hqq_needs_but_does_not_ask_for_is_a_dependency_of_ours() -> None:
    # Where hqq lies without these three, no transformers model can be imported at all.
    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())
    assert {"termcolor", "einops", "tqdm"} <= set(project["project"]["dependencies"])
