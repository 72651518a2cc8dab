"""Goal: one expert's records hold what its figures say. Method: decode them and measure again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from expert_store.calibration import save_calibration
from expert_store.config import CompressionConfig
from expert_store.errors import CheckpointError
from expert_store.format import factors_bytes, parse_codes, parse_factors
from expert_store.matrix.loss import weighted_error
from expert_store.methods import METHODS
from expert_store.plan import ExpertPlan
from expert_store.recipe import (
    check_finite,
    compress_expert,
    energies,
    kurtosis_of,
    weightings,
)
from expert_store.types import PROJECTIONS, CodesForm, ExpertKey, ExpertShape, ExpertWeights
from kernels.reference import dequantize, dequantize_low_rank
from tests.expert_store.calibrations import calibration_parts

KEY = ExpertKey(4, 11)
SHAPE = ExpertShape(hidden=128, ffn=192, activation="silu", has_bias=False)


def compressed(weights: ExpertWeights, shape: ExpertShape, config: CompressionConfig, rank: int):
    """The expert as `compress` makes it where planning gave it this rank."""
    how = config.how
    plan = ExpertPlan.uniform(how.bits[0], how.grids[0], ("rank",) * (rank // 16))
    return compress_expert(weights, shape, plan, how, factor_bits=config.factor_bits)


def random_expert(seed: int = 0, bias: bool = False) -> ExpertWeights:
    generator = torch.Generator().manual_seed(seed)
    weights = {
        name: 0.05 * torch.randn(SHAPE.projection(name), generator=generator)
        for name in PROJECTIONS
    }
    if bias:
        for name in PROJECTIONS:
            weights[f"{name}_bias"] = torch.randn(SHAPE.projection(name)[0], generator=generator)
    return ExpertWeights(KEY, **weights)


@pytest.mark.parametrize(("bits", "rank"), [(2, 0), (2, 32), (3, 16), (4, 128)])
def test_figures_are_those_of_the_records(bits: int, rank: int) -> None:
    weights = random_expert()
    result = compressed(weights, SHAPE, CompressionConfig(recipe="paper", bits=bits), rank)
    assert result.form == CodesForm.uniform(bits)
    codes = parse_codes(KEY, result.codes, SHAPE, result.form)
    factors = parse_factors(KEY, result.factors, SHAPE, result.repair)
    assert sorted(result.repair.letters) == sorted("gud" * (rank // 16))
    assert (result.repair.bits, result.repair.grid) == (3, "affine")
    energy = lost = kept = 0.0
    for name in PROJECTIONS:
        weight = getattr(weights, name)
        low_bit = dequantize(getattr(codes.mlp, name))
        left, right = dequantize_low_rank(getattr(factors.factors, name))
        energy += float(weight.square().sum())
        lost += float((weight - low_bit).square().sum())
        kept += float((weight - low_bit - left @ right).square().sum())
    assert result.error == pytest.approx((lost / energy) ** 0.5, rel=1e-5)
    assert result.restored_error == pytest.approx((kept / energy) ** 0.5, rel=1e-4)
    assert (result.restored_error < result.error) == (rank > 0)


def test_every_longer_prefix_repairs_more() -> None:
    weights = random_expert()
    result = compressed(weights, SHAPE, CompressionConfig(recipe="paper"), 32)
    codes = parse_codes(KEY, result.codes, SHAPE, result.form)
    errors = []
    for count in range(len(result.repair.blocks) + 1):
        repair = result.repair.prefix(count)
        data = result.factors[: factors_bytes(SHAPE, repair)]
        part = parse_factors(KEY, data, SHAPE, repair)
        error = 0.0
        for name in PROJECTIONS:
            left, right = dequantize_low_rank(getattr(part.factors, name))
            low_bit = dequantize(getattr(codes.mlp, name))
            error += float((getattr(weights, name) - low_bit - left @ right).square().sum())
        errors.append(error)
    gains = [before - after for before, after in zip(errors, errors[1:], strict=False)]
    assert min(gains) > 0
    # The manifest's shares say the same of every prefix.
    shares = [gain / errors[0] for gain in gains]
    assert result.block_gains == pytest.approx(shares, rel=1e-3)
    left = 1 - sum(result.block_gains)
    assert result.restored_error == pytest.approx(result.error * left**0.5, rel=1e-5)
    # Falling order, up to the cross terms that quantised factors leave.
    for before, after in zip(gains, gains[1:], strict=False):
        assert after < 1.05 * before


def test_original_is_bit_exact_bfloat16() -> None:
    weights = random_expert(bias=True)
    shape = replace(SHAPE, has_bias=True)
    result = compressed(weights, shape, CompressionConfig(recipe="original"), 0)
    codes = parse_codes(KEY, result.codes, shape, CodesForm.uniform(16))
    for name in PROJECTIONS:
        expected = getattr(weights, name).bfloat16().float()
        assert torch.equal(dequantize(getattr(codes.mlp, name)), expected)
        bias = getattr(codes.mlp, f"{name}_bias")
        assert torch.equal(bias, getattr(weights, f"{name}_bias"))
    assert result.factors.numel() == 0


def test_kurtosis() -> None:
    assert kurtosis_of(random_expert()) == pytest.approx(3.0, abs=0.1)
    flat = ExpertWeights(KEY, *(torch.full(SHAPE.projection(name), 0.5) for name in PROJECTIONS))
    assert kurtosis_of(flat) == 0.0
    signs = random_expert()
    signs = ExpertWeights(KEY, *(getattr(signs, name).sign() for name in PROJECTIONS))
    assert kurtosis_of(signs) == pytest.approx(1.0, abs=1e-3)
    spiked = random_expert()
    spiked.down[0, 0] = 10.0
    assert kurtosis_of(spiked) > 100


def test_an_expert_of_zeros_has_no_error() -> None:
    zeros = ExpertWeights(KEY, *(torch.zeros(SHAPE.projection(name)) for name in PROJECTIONS))
    result = compressed(zeros, SHAPE, CompressionConfig(recipe="paper"), 16)
    assert (result.error, result.restored_error) == (0.0, 0.0)
    assert result.block_gains == (0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("values", "counts"),
    [
        ([float("nan")] * 3, "3 NaN, 0 infinite and 0 larger"),
        ([float("inf"), -float("inf")], "0 NaN, 2 infinite and 0 larger"),
        ([1e6], "0 NaN, 0 infinite and 1 larger"),
    ],
)
@pytest.mark.parametrize("name", [*PROJECTIONS, "up_bias"])
def test_weights_that_are_not_finite(name: str, values: list[float], counts: str) -> None:
    weights = random_expert(bias=True)
    check_finite(weights)
    getattr(weights, name).view(-1)[: len(values)] = torch.tensor(values)
    where = f"layer 4 expert 11, {name.replace('_', ' ')}: expected finite"
    with pytest.raises(CheckpointError, match=f"{where}.*{counts} of "):
        check_finite(weights)


def test_only_feedback_reads_products_of_inputs(tmp_path: Path) -> None:
    parts = calibration_parts(layers=(4,), experts=12, ffn=192, tokens=(900,) * 12)
    statistics = save_calibration(tmp_path, *parts).expert(KEY)
    whole, single = (weightings(statistics, METHODS[name]) for name in ("best", "fast"))
    for name in PROJECTIONS:
        truth, seen = whole[name].moment, single[name].moment
        assert truth is not None
        assert seen is not None
        assert (truth.is_full, seen.is_full) == (True, False)
        assert torch.equal(seen.diagonal(), truth.diagonal())
        assert seen.values.count_nonzero() == seen.cols
    assert all(each.moment is None for each in weightings(None, METHODS["fast"]).values())
    assert all(each.moment is None for each in weightings(statistics, METHODS["mixed"]).values())


def test_fast_with_a_calibration_repairs_what_is_heard(tmp_path: Path) -> None:
    parts = calibration_parts(layers=(4,), experts=12, ffn=192, tokens=(900,) * 12)
    order_K = torch.randperm(SHAPE.hidden, generator=torch.Generator().manual_seed(0))
    scale_K = torch.logspace(-1.5, 1, SHAPE.hidden)[order_K]
    for tensors in parts[1].values():
        for moment in (tensors.input_E, tensors.pooled):
            moment.mul_(scale_K).mul_(scale_K[:, None])
    statistics = save_calibration(tmp_path, *parts).expert(KEY)
    weights, lost = random_expert(), []
    plan = ExpertPlan.uniform(2, "symmetric", ("rank", "plane"))
    for known in (None, statistics):
        made = compress_expert(
            weights, SHAPE, plan, METHODS["fast"], factor_bits=3, statistics=known
        )
        codes = parse_codes(KEY, made.codes, SHAPE, made.form)
        left_NK = weights.gate - dequantize(codes.mlp.gate)
        lost.append(weighted_error(left_NK, statistics.moment_in, statistics.gate_weight_F))
    assert lost[1] < 0.9 * lost[0]


def test_energies_are_those_of_the_weights_as_heard(tmp_path: Path) -> None:
    weights = random_expert()
    squares = [float(getattr(weights, name).square().sum()) for name in PROJECTIONS]
    assert energies(weights, None) == pytest.approx(squares, rel=1e-5)
    parts = calibration_parts(layers=(4,), experts=12, ffn=192, tokens=(900,) * 12)
    statistics = save_calibration(tmp_path, *parts).expert(KEY)
    heard = weightings(statistics, METHODS["best"])
    errors = [heard[name].error(getattr(weights, name)) for name in PROJECTIONS]
    assert energies(weights, statistics) == pytest.approx(errors, rel=1e-6)
