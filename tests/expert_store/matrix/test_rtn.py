"""Goal: the control is what its name says. Method: compare with the formula, weight by weight."""

from __future__ import annotations

import pytest
import torch

from expert_store.matrix.rtn import quantize_rtn
from kernels.reference import dequantize
from tests.expert_store.matrix.matrices import gaussian


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_affine_levels_end_at_the_smallest_and_largest_weight(bits: int) -> None:
    weight = gaussian(20, 128)
    groups = weight.view(20, 2, 64)
    low, high = groups.amin(2, keepdim=True), groups.amax(2, keepdim=True)
    step = (high - low) / (2**bits - 1)
    expected = (((groups - low) / step).round() * step + low).view(20, 128)
    found = dequantize(quantize_rtn(weight, bits, grid="affine"))
    # float16 scales move a level by a thousandth, and a weight between two levels by a step.
    assert float(((found - expected).abs() < 2e-3 * weight.abs().max()).float().mean()) > 0.99
    torch.testing.assert_close(found.view(20, 2, 64).amin(2), groups.amin(2), rtol=2e-3, atol=1e-4)
    torch.testing.assert_close(found.view(20, 2, 64).amax(2), groups.amax(2), rtol=4e-3, atol=1e-4)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_symmetric_levels_end_at_the_largest_magnitude(bits: int) -> None:
    weight = gaussian(20, 128)
    matrix = quantize_rtn(weight, bits, grid="symmetric")
    assert (matrix.grid, matrix.bits) == ("symmetric", bits)
    found = dequantize(matrix).view(20, 2, 64)
    largest = weight.view(20, 2, 64).abs().amax(2)
    torch.testing.assert_close(
        found.abs().amax(2), largest, rtol=0, atol=float(largest.max()) / 250
    )
    step = 2 * largest / (2**bits - 1)
    assert bool(((found - weight.view(20, 2, 64)).abs() <= 0.51 * step[:, :, None]).all())


def test_constant_and_zero_groups_survive() -> None:
    weight = gaussian(16, 128)
    weight[3, :64], weight[5] = 0.0, 0.25
    found = dequantize(quantize_rtn(weight, 2, grid="affine"))
    assert torch.equal(found[3, :64], torch.zeros(64))
    assert torch.equal(found[5], torch.full((128,), 0.25))
    found = dequantize(quantize_rtn(weight, 2, grid="symmetric"))
    assert torch.equal(found[3, :64], torch.zeros(64))
    torch.testing.assert_close(found[5], torch.full((128,), 0.25), rtol=1e-3, atol=0)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"expected \[rows, multiple of 64\], got \(8, 96\)"):
        quantize_rtn(torch.zeros(8, 96), 2, grid="affine")
    with pytest.raises(ValueError, match="bits: got 1, the affine grid has"):
        quantize_rtn(torch.zeros(8, 64), 1, grid="affine")
    with pytest.raises(ValueError, match="bits: got 16, the symmetric grid has"):
        quantize_rtn(torch.zeros(8, 64), 16, grid="symmetric")
