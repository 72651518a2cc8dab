"""Goal: the truth is true. Method: against weights and a gated MLP written out by hand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from kernel_matrices import (
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
from kernels.packing import unpack
from kernels.types import GatedRepair


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


def test_bf16_baseline() -> None:
    matrix = random_matrix(5, 70, 16)
    assert reference.dequantize(matrix).shape == (5, 70)
    assert reference.matmul(matrix, random_inputs(3, 70)).shape == (3, 5)


@pytest.mark.parametrize("num_blocks", [0, 1, 4])
def test_low_rank_is_left_times_right(num_blocks: int) -> None:
    factors = random_low_rank(64, 128, 3, num_blocks)
    left, right = reference.dequantize_low_rank(factors)
    assert left.shape == (64, 16 * num_blocks)
    assert right.shape == (16 * num_blocks, 128)
    x = random_inputs(3, 128)
    got = reference.low_rank_matmul(factors, x)
    assert got.shape == (3, 64)
    assert torch.allclose(got, x @ (left @ right).T, atol=1e-5)


def test_a_prefix_of_blocks_is_a_smaller_low_rank() -> None:
    factors = random_low_rank(64, 128, 4, 3)
    left, right = reference.dequantize_low_rank(factors)
    small_left, small_right = reference.dequantize_low_rank(factors.prefix(2))
    assert torch.equal(small_left, left[:, :32])
    assert torch.equal(small_right, right[:32])


def test_gated_mlp_with_factors_on_some_tokens_and_biases() -> None:
    """Each token alone, with the matrices made dense: codes only, or codes plus left @ right."""
    mlp, factors = random_mlp(64, 128, 2, biases=True), random_factors(64, 128, 3, 2)
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
    assert torch.equal(reference.gated_mlp(x, mlp, empty), plain)
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
