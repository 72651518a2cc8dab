"""Goal: searched levels beat hqq's and the control's on every matrix, and survive odd weights.

Method: compare errors on random and on trained weights, plain and weighted by a moment; compare
with trying very many levels; then rows that a search could stumble over.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from expert_store.matrix import grid as grid_module
from expert_store.matrix.grid import quantize_grid
from expert_store.matrix.hqq import quantize_hqq
from expert_store.matrix.loss import relative_error, weighted_error
from expert_store.matrix.moments import Moment
from expert_store.matrix.rtn import quantize_rtn
from kernels.packing import unpack_symmetric
from kernels.reference import dequantize
from kernels.types import Grid
from tests.expert_store.matrix.matrices import correlated_moment, gaussian, heavy_tailed, trained

WEIGHTS: dict[str, Callable[[], torch.Tensor]] = {
    "Gaussian": gaussian,
    "heavy-tailed": heavy_tailed,
    "trained gate": lambda: trained("w1"),
    "trained down": lambda: trained("w2"),
    "trained up, layer 3": lambda: trained("w3", layer=3),
}
GRIDS: tuple[Grid, ...] = ("affine", "symmetric")


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("name", WEIGHTS)
def test_no_worse_than_hqq(name: str, bits: int) -> None:
    weight = WEIGHTS[name]()
    theirs, ours = quantize_hqq(weight, bits), quantize_grid(weight, bits, grid="affine")
    assert ours.data.numel() == theirs.data.numel()
    found = dequantize(ours)
    assert relative_error(weight, found) < 0.95 * relative_error(weight, dequantize(theirs))
    moment = correlated_moment(weight.shape[1])
    aware = quantize_grid(weight, bits, grid="affine", moment=moment)
    assert relative_error(weight, dequantize(aware), moment) < 0.9 * relative_error(
        weight, dequantize(theirs), moment
    )


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("name", WEIGHTS)
def test_better_than_the_control(name: str, grid: Grid, bits: int) -> None:
    weight = WEIGHTS[name]()
    control = relative_error(weight, dequantize(quantize_rtn(weight, bits, grid=grid)))
    assert relative_error(weight, dequantize(quantize_grid(weight, bits, grid=grid))) < control


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("name", WEIGHTS)
def test_symmetric_is_near_the_best_of_very_many_scales(name: str, bits: int) -> None:
    weight = WEIGHTS[name]()
    groups = weight.view(-1, 64)
    middle = (2**bits - 1) / 2
    widest = groups.abs().amax(1, keepdim=True) / middle
    least = torch.full((len(groups),), torch.inf)
    for clip in torch.linspace(0.05, 1, 300):
        scale = widest * clip
        levels = (groups / scale + middle).round().clamp(0, 2 * middle) - middle
        least = torch.minimum(least, (levels * scale - groups).square().sum(1))
    found = weighted_error(dequantize(quantize_grid(weight, bits, grid="symmetric")) - weight)
    assert found <= 1.015 * float(least.sum())


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_affine_is_near_the_best_of_very_many_levels(bits: int) -> None:
    groups = gaussian(10, 64)
    low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
    least = torch.full((10,), torch.inf)
    for clip in torch.linspace(0.3, 1, 71):
        step = (high - low) * clip / (2**bits - 1)
        for shift in torch.linspace(-1.5, 1.5, 61):
            start = (low + high) / 2 - step * ((2**bits - 1) / 2 + shift)
            codes = ((groups - start) / step).round().clamp(0, 2**bits - 1)
            least = torch.minimum(least, (codes * step + start - groups).square().sum(1))
    found = weighted_error(dequantize(quantize_grid(groups, bits, grid="affine")) - groups)
    assert found <= 1.06 * float(least.sum())


@pytest.mark.parametrize("grid", GRIDS)
def test_a_moment_lowers_the_error_that_it_measures(grid: Grid) -> None:
    weight, moment = gaussian(), correlated_moment(192)
    plain = dequantize(quantize_grid(weight, 2, grid=grid))
    aware = dequantize(quantize_grid(weight, 2, grid=grid, moment=moment))
    assert relative_error(weight, aware, moment) < 0.9 * relative_error(weight, plain, moment)
    assert relative_error(weight, aware) > relative_error(weight, plain)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("scale", [0.0, 1.0, 1e6])
def test_inputs_that_are_all_alike_change_nothing(grid: Grid, scale: float) -> None:
    weight, alike = gaussian(), Moment(Moment.identity(192).values * scale)
    plain = quantize_grid(weight, 2, grid=grid)
    assert torch.equal(quantize_grid(weight, 2, grid=grid, moment=alike).data, plain.data)


@pytest.mark.parametrize("grid", GRIDS)
def test_chunks_and_rows_do_not_matter(grid: Grid, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, moment = gaussian(), correlated_moment(192)
    whole = quantize_grid(weight, 3, grid=grid, moment=moment)
    again = quantize_grid(weight, 3, grid=grid, moment=moment)
    assert torch.equal(whole.data, again.data)
    monkeypatch.setattr(grid_module, "CHUNK_GROUPS", 7)
    chunked = quantize_grid(weight, 3, grid=grid, moment=moment)
    torch.testing.assert_close(dequantize(chunked), dequantize(whole), rtol=0, atol=1e-3)


def odd_weights() -> dict[str, torch.Tensor]:
    outlier, spike_row = gaussian(), torch.zeros(48, 192)
    outlier[2, 5] = 3e4
    spike_row[7, 100] = -1.0
    constant, tiny = gaussian(), gaussian() * 1e-5
    constant[3, :64], constant[5], constant[6] = 0.0, 0.25, -1e-7
    return {
        "zero": torch.zeros(48, 192),
        "constant": constant,
        "outlier": outlier,
        "one weight": spike_row,
        "tiny": tiny,
        "huge": gaussian() * 3e5,
    }


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("name", odd_weights())
def test_odd_weights_survive(name: str, grid: Grid, bits: int) -> None:
    if bits == 1 and grid == "affine":
        bits = 3
    weight = odd_weights()[name]
    limit = 0.45 if bits == 1 else 0.2
    if grid == "symmetric" and name in ("one weight", "outlier"):
        limit = 1.0  # no level is zero: the outlier's neighbours get half a step each
    for moment in (None, correlated_moment(192)):
        found = dequantize(quantize_grid(weight, bits, grid=grid, moment=moment))
        assert found.isfinite().all()
        assert relative_error(weight, found, moment) < limit
    if name == "constant" and grid == "affine":
        assert torch.equal(found[3, :64], torch.zeros(64))
        torch.testing.assert_close(found[5], torch.full((192,), 0.25))


def test_symmetric_scales_are_fractions_of_the_rows_largest() -> None:
    _, scale8, row_scale = unpack_symmetric(quantize_grid(gaussian(), 2, grid="symmetric"))
    assert torch.equal(scale8.amax(1), torch.full((48,), 255, dtype=torch.uint8))
    assert bool((row_scale > 0).all())


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"expected \[rows, multiple of 64\], got \(8, 96\)"):
        quantize_grid(torch.zeros(8, 96), 2, grid="affine")
    with pytest.raises(ValueError, match="bits: got 1, the affine grid has"):
        quantize_grid(torch.zeros(8, 64), 1, grid="affine")
    with pytest.raises(ValueError, match="moment: expected 64 inputs, got 128"):
        quantize_grid(torch.zeros(8, 64), 2, grid="affine", moment=Moment.identity(128))
