"""Goal: the truth is true. Method: against weights and a gated MLP written out by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from kernel_matrices import (
    FORMS,
    FP32_TOLERANCE,
    random_factors,
    random_inputs,
    random_low_rank,
    random_matrix,
    random_mlp,
    relative_rms,
)

from kernels import reference
from kernels.activations import apply_gate
from kernels.packing import unpack, unpack_symmetric
from kernels.types import GatedRepair, Grid


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize(("rows", "cols"), [(1, 64), (37, 448), (16, 128)])
def test_dequantize_is_the_formula(bits: int, rows: int, cols: int) -> None:
    matrix = random_matrix(rows, cols, bits)
    codes, scale, zero_scaled = unpack(matrix)
    weight = reference.dequantize(matrix)
    assert weight.shape == (rows, cols)
    for n, k in ((0, 0), (rows - 1, cols - 1), (rows // 2, cols // 3)):
        expected = scale[n, k // 64] * codes[n, k] - zero_scaled[n, k // 64]
        assert weight[n, k] == expected


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize(("rows", "cols"), [(1, 64), (37, 448), (16, 128)])
def test_dequantize_is_the_symmetric_formula(bits: int, rows: int, cols: int) -> None:
    """In float64, to float32's rounding: three products, each within 2**-24 of its value."""
    matrix = random_matrix(rows, cols, bits, grid="symmetric")
    codes, scale8, row_scale = (part.double() for part in unpack_symmetric(matrix))
    level = codes - (2**bits - 1) / 2
    expected = row_scale[:, None] * (scale8 / 255).repeat_interleave(64, dim=1) * level
    weight = reference.dequantize(matrix)
    assert weight.shape == (rows, cols)
    assert ((weight - expected).abs() <= 4 * 2**-24 * expected.abs()).all()
    # The scale and zero that `unpack` gives for either grid say the same.
    _, scale, zero_scaled = unpack(matrix)
    wide = [part.double().repeat_interleave(64, dim=1) for part in (scale, zero_scaled)]
    assert torch.allclose(wide[0] * codes - wide[1], expected, rtol=0, atol=1e-6)


def test_bf16_baseline() -> None:
    matrix = random_matrix(5, 70, 16)
    assert reference.dequantize(matrix).shape == (5, 70)
    assert reference.matmul(matrix, random_inputs(3, 70)).shape == (3, 5)


@pytest.mark.parametrize("num_blocks", [0, 1, 4])
@pytest.mark.parametrize(("grid", "bits"), FORMS)
def test_low_rank_is_left_times_right(num_blocks: int, grid: Grid, bits: int) -> None:
    factors = random_low_rank(64, 128, bits, num_blocks, grid=grid)
    left, right = reference.dequantize_low_rank(factors)
    assert left.shape == (64, 16 * num_blocks)
    assert right.shape == (16 * num_blocks, 128)
    x = random_inputs(3, 128)
    got = reference.low_rank_matmul(factors, x)
    assert got.shape == (3, 64)
    assert torch.allclose(got, x @ (left @ right).T, atol=1e-5)


@pytest.mark.parametrize("grid", ["affine", "symmetric"])
def test_a_prefix_of_blocks_is_a_smaller_low_rank(grid: Grid) -> None:
    factors = random_low_rank(64, 128, 4, 3, grid=grid)
    assert factors.prefix(2).grid == grid
    left, right = reference.dequantize_low_rank(factors)
    small_left, small_right = reference.dequantize_low_rank(factors.prefix(2))
    assert torch.equal(small_left, left[:, :32])
    assert torch.equal(small_right, right[:32])


@pytest.mark.parametrize("num_blocks", [0, 2])
@pytest.mark.parametrize("num_planes", [0, 1, 2])
def test_gated_mlp_with_a_repair_on_some_tokens_and_biases(
    num_blocks: int, num_planes: int
) -> None:
    """Each token alone, with the matrices made dense: codes, or codes + planes + left @ right."""
    mlp = random_mlp(64, 128, 2, biases=True)
    factors = random_factors(64, 128, 3, num_blocks, num_planes=num_planes)
    x = random_inputs(4, 64)
    restored = torch.tensor([True, False, False, True])
    got = reference.gated_mlp(x, mlp, factors, restored)
    for t in range(4):
        weights = []
        for name in ("gate", "up", "down"):
            weight = reference.dequantize(getattr(mlp, name))
            if restored[t]:
                left, right = reference.dequantize_low_rank(getattr(factors, name))
                weight = weight + left @ right
                for plane in getattr(factors, f"{name}_planes"):
                    weight = weight + reference.dequantize(plane)
            weights.append(weight)
        gate, up, down = weights
        h = F.silu(gate @ x[t] + mlp.gate_bias) * (up @ x[t] + mlp.up_bias)
        assert relative_rms(got[t], down @ h + mlp.down_bias) < FP32_TOLERANCE


def test_no_restored_token_is_no_factors_and_none_is_all() -> None:
    mlp, factors = random_mlp(64, 64, 3), random_factors(64, 64, 3, 1)
    x = random_inputs(3, 64)
    plain = reference.gated_mlp(x, mlp)
    nobody = reference.gated_mlp(x, mlp, factors, torch.zeros(3, dtype=torch.bool))
    assert torch.equal(nobody, plain)
    empty = GatedRepair(factors.gate.prefix(0), factors.up.prefix(0), factors.down.prefix(0))
    assert empty.is_empty
    assert torch.equal(reference.gated_mlp(x, mlp, empty), plain)
    one_plane = replace(empty, down_planes=(random_matrix(64, 64, 1, grid="symmetric"),))
    assert not one_plane.is_empty
    assert not torch.equal(reference.gated_mlp(x, mlp, one_plane), plain)
    refined = reference.gated_mlp(x, mlp, one_plane, torch.zeros(3, dtype=torch.bool))
    assert torch.equal(refined, plain)
    everybody = reference.gated_mlp(x, mlp, factors, torch.ones(3, dtype=torch.bool))
    assert torch.equal(reference.gated_mlp(x, mlp, factors), everybody)
    assert not torch.equal(everybody, plain)


def test_rank_may_differ_between_the_three_matrices() -> None:
    mlp, factors = random_mlp(64, 64, 3), random_factors(64, 64, 3, 2)
    uneven = GatedRepair(factors.gate.prefix(0), factors.up.prefix(1), factors.down)
    got = reference.gated_mlp(random_inputs(2, 64), mlp, uneven)
    assert torch.isfinite(got).all()
    assert not torch.equal(got, reference.gated_mlp(random_inputs(2, 64), mlp, factors))


def test_activations_are_their_formulas() -> None:
    gate, up = torch.tensor([-9.0, -1.0, 0.5, 9.0]), torch.tensor([9.0, -9.0, 2.0, 3.0])
    assert torch.equal(apply_gate("relu", gate, up), torch.tensor([-0.0, 0.0, 1.0, 27.0]))
    assert torch.allclose(apply_gate("silu", gate, up), gate / (1 + torch.exp(-gate)) * up)
    normal = torch.distributions.Normal(0.0, 1.0)
    assert torch.allclose(apply_gate("gelu", gate, up), gate * normal.cdf(gate) * up, atol=1e-6)
    inner = (2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3)
    by_hand = 0.5 * gate * (1 + torch.tanh(inner)) * up
    assert torch.allclose(apply_gate("gelu_tanh", gate, up), by_hand, atol=1e-6)
    clamped_gate = torch.tensor([-9.0, -1.0, 0.5, 7.0])
    clamped_up = torch.tensor([7.0, -7.0, 2.0, 3.0])
    by_hand = (clamped_up + 1) * clamped_gate / (1 + torch.exp(-1.702 * clamped_gate))
    assert torch.allclose(apply_gate("clamped_swiglu", gate, up), by_hand)


def test_unknown_activation_is_refused() -> None:
    with pytest.raises(ValueError, match="swish"):
        apply_gate("swish", torch.ones(1), torch.ones(1))  # type: ignore[arg-type]
