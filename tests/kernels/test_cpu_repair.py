"""Goal: the native fused MLP restores tokens as the reference does, on every instruction set, with
inputs rounded to int8 and in float32. Method: ranks 0, 16 and 48, planes 0 to 2, biases, mixed
masks, several calls at once; a token's result to the bit alone and in any batch, whichever
neighbours are restored; the float32 form to the bit against its products one by one."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import get_args

import pytest
import torch
from kernel_matrices import (
    FP32_TOLERANCE,
    INT8_MLP_TOLERANCE,
    poisoned,
    random_factors,
    random_inputs,
    random_mlp,
    relative_rms,
)

from kernels import cpu_native, reference
from kernels.cpu_native import Isa, Numbers
from kernels.gated import compose_gated_mlp
from kernels.types import GatedMLP, GatedRepair, Grid, MlpCall

if not cpu_native.is_available():
    pytest.skip("the native kernels were not built here", allow_module_level=True)

ISAS = get_args(Isa)[: get_args(Isa).index(cpu_native.best_isa()) + 1]
HIDDEN, FFN = 192, 128
TOKEN_COUNTS = (1, 2, 5, 33, 70)  # 33 and 70 fill more than one buffer of 32 tokens

TOLERANCE = {"int8": INT8_MLP_TOLERANCE, "fp32": FP32_TOLERANCE}

every_isa = pytest.mark.parametrize("isa", ISAS)
in_both = pytest.mark.parametrize("numbers", get_args(Numbers))


def setting(
    num_blocks: int, num_planes: int, grid: Grid = "symmetric", biases: bool = False
) -> tuple[GatedMLP, GatedRepair]:
    mlp = random_mlp(HIDDEN, FFN, 2, biases=biases, grid=grid)
    return mlp, random_factors(HIDDEN, FFN, 3, num_blocks, grid, num_planes)


def masks(num_tokens: int) -> list[torch.Tensor | None]:
    """Nobody, everybody in two ways, every third token, and only the last."""
    every = torch.ones(num_tokens, dtype=torch.bool)
    last = torch.arange(num_tokens) == num_tokens - 1
    return [~every, every, None, torch.arange(num_tokens) % 3 == 0, last]


@every_isa
@in_both
@pytest.mark.parametrize("grid", get_args(Grid))
@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("num_blocks", [0, 1, 3])
@pytest.mark.parametrize("num_planes", [0, 1, 2])
def test_restored_tokens_are_the_reference(
    isa: Isa, numbers: Numbers, grid: Grid, biases: bool, num_blocks: int, num_planes: int
) -> None:
    mlp, repair = setting(num_blocks, num_planes, grid, biases)
    for num_tokens in TOKEN_COUNTS:
        x = random_inputs(num_tokens, HIDDEN, seed=num_tokens)
        for restored in masks(num_tokens):
            out = poisoned(num_tokens, HIDDEN)
            call = MlpCall(x, mlp, repair, restored)
            cpu_native.gated_mlp_many([call], numbers=numbers, isa=isa, num_threads=2, outs=[out])
            expected = reference.gated_mlp(x, mlp, repair, restored)
            assert relative_rms(out, expected) < TOLERANCE[numbers], (num_tokens, restored)


@every_isa
@in_both
def test_a_token_is_the_same_alone_and_in_any_batch_and_mask(isa: Isa, numbers: Numbers) -> None:
    mlp, repair = setting(3, 2, biases=True)
    x = random_inputs(70, HIDDEN)
    (plain,) = cpu_native.gated_mlp_many([MlpCall(x, mlp)], numbers=numbers, isa=isa)
    (whole,) = cpu_native.gated_mlp_many([MlpCall(x, mlp, repair)], numbers=numbers, isa=isa)
    assert not torch.equal(plain, whole)
    for restored in masks(70):
        (got,) = cpu_native.gated_mlp_many(
            [MlpCall(x, mlp, repair, restored)], numbers=numbers, isa=isa
        )
        is_restored = torch.ones(70, dtype=torch.bool) if restored is None else restored
        assert torch.equal(got, torch.where(is_restored[:, None], whole, plain))
    for first, last in ((0, 1), (69, 70), (31, 34), (40, 48)):
        part = slice(first, last)
        (alone,) = cpu_native.gated_mlp_many(
            [MlpCall(x[part], mlp, repair)], numbers=numbers, isa=isa
        )
        assert torch.equal(alone, whole[part])


@every_isa
@in_both
def test_several_calls_with_and_without_repair_are_each(isa: Isa, numbers: Numbers) -> None:
    mlp, repair = setting(2, 1)
    other, other_repair = setting(0, 2, "affine")
    third = torch.arange(5) % 3 == 0
    calls = [
        MlpCall(random_inputs(5, HIDDEN), mlp, repair, third),
        MlpCall(random_inputs(0, HIDDEN), mlp, repair, torch.zeros(0, dtype=torch.bool)),
        MlpCall(random_inputs(40, HIDDEN), other),
        MlpCall(random_inputs(40, HIDDEN), other, other_repair),
        MlpCall(random_inputs(3, HIDDEN), mlp, repair, torch.zeros(3, dtype=torch.bool)),
    ]
    together = cpu_native.gated_mlp_many(calls, numbers=numbers, isa=isa, num_threads=2)
    for got, call in zip(together, calls, strict=True):
        assert torch.equal(got, cpu_native.gated_mlp_many([call], numbers=numbers, isa=isa)[0])


@every_isa
@in_both
def test_parts_may_be_missing_from_some_of_the_three_matrices(isa: Isa, numbers: Numbers) -> None:
    """As a prefix of a compensator leaves them; each part that is there counts."""
    mlp, whole = setting(3, 2)
    x = random_inputs(4, HIDDEN)
    prefix = GatedRepair(
        whole.gate.prefix(0), whole.up.prefix(2), whole.down, gate_planes=whole.gate_planes[:1]
    )
    (got,) = cpu_native.gated_mlp_many([MlpCall(x, mlp, prefix)], numbers=numbers, isa=isa)
    assert relative_rms(got, reference.gated_mlp(x, mlp, prefix)) < TOLERANCE[numbers]
    for fewer in (
        replace(prefix, gate_planes=()),
        replace(prefix, up=whole.up.prefix(0)),
        replace(prefix, down=whole.down.prefix(2)),
    ):
        (less,) = cpu_native.gated_mlp_many([MlpCall(x, mlp, fewer)], numbers=numbers, isa=isa)
        assert relative_rms(less, got) > INT8_MLP_TOLERANCE


@every_isa
def test_float32_is_the_composed_products_up_to_the_activation(isa: Isa) -> None:
    """With relu, whose values are exact, the fused call has the bits of one product after another:
    so a batch that is too large to be fused differs by BLAS only."""
    mlp, repair = setting(3, 2, biases=True)
    mlp = replace(mlp, activation="relu")
    x, restored = random_inputs(9, HIDDEN), torch.arange(9) % 3 == 0
    (got,) = cpu_native.gated_mlp_many([MlpCall(x, mlp, repair, restored)], numbers="fp32", isa=isa)
    expected = compose_gated_mlp(
        x,
        mlp,
        repair,
        restored,
        matmul=partial(cpu_native.matmul_fp32, isa=isa),
        low_rank_matmul=partial(cpu_native.low_rank_matmul_fp32, isa=isa),
    )
    assert torch.equal(got, expected)


@every_isa
@in_both
def test_a_bad_activation_spoils_its_own_token_only(isa: Isa, numbers: Numbers) -> None:
    mlp, repair = setting(1, 1)
    x, restored = random_inputs(4, HIDDEN), torch.tensor([True, False, True, False])
    (clean,) = cpu_native.gated_mlp_many(
        [MlpCall(x, mlp, repair, restored)], numbers=numbers, isa=isa
    )
    x[2, 7] = float("nan")
    (got,) = cpu_native.gated_mlp_many(
        [MlpCall(x, mlp, repair, restored)], numbers=numbers, isa=isa
    )
    assert got[2].isnan().all()
    assert torch.equal(got[[0, 1, 3]], clean[[0, 1, 3]])


def test_scattered_repair_bytes_are_refused() -> None:
    mlp, repair = setting(0, 1)
    plane = repair.up_planes[0]
    spread = torch.zeros(plane.data.numel(), 2, dtype=torch.uint8)[:, 0]
    bad = replace(repair, up_planes=(replace(plane, data=spread),))
    with pytest.raises(ValueError, match="plane: expected contiguous bytes"):
        cpu_native.gated_mlp_many([MlpCall(random_inputs(1, HIDDEN), mlp, bad)])
