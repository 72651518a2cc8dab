"""Goal: a step of several MLPs in a few launches computes what the reference computes one by one.

Method: run it under the interpreter (tests/conftest.py turns it on) on mixed widths, grids, ranks,
planes, biases, activations and token counts with poisoned outputs; count launches; compare bits of
a token alone and in a batch. With TRITON_INTERPRET=0 the same tests run compiled, on a GPU.
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import get_args

import pytest
import torch
from kernel_matrices import (
    FORMS,
    TRITON_TOLERANCE,
    at_odd_address,
    random_factors,
    random_inputs,
    random_low_rank,
    random_matrix,
    random_mlp,
    relative_rms,
)
from triton_device import DEVICE, poisoned_outputs  # noqa: F401 - a fixture

from kernels import ops, reference, triton_decode, triton_digits, triton_grouped
from kernels.triton_digits import Digits, to_digits
from kernels.types import Activation, GatedMLP, GatedRepair, Grid, LowRank, MlpCall, QuantizedMatrix

every_form = pytest.mark.parametrize(("grid", "bits"), FORMS)
pytestmark = pytest.mark.usefixtures("poisoned_outputs")


def on_device(part: object) -> object:
    """The same matrices, factors, MLP or call with their tensors on DEVICE."""
    if isinstance(part, torch.Tensor):
        return part.to(DEVICE)
    if isinstance(part, tuple):
        return tuple(on_device(item) for item in part)
    if isinstance(part, (QuantizedMatrix, LowRank, GatedMLP, GatedRepair)):
        return replace(part, **{f.name: on_device(getattr(part, f.name)) for f in fields(part)})
    return part


def call_of(
    x: torch.Tensor,
    mlp: GatedMLP,
    repair: GatedRepair | None = None,
    restored: list[bool] | None = None,
) -> MlpCall:
    mask = None if restored is None else torch.tensor(restored)
    return MlpCall(x.to(DEVICE), on_device(mlp), on_device(repair), mask)  # type: ignore[arg-type]


def check(calls: list[MlpCall], tolerance: float = TRITON_TOLERANCE) -> list[torch.Tensor]:
    """Run all at once and compare each with the reference; returns what was got."""
    got = ops.gated_mlp_many(calls, backend="triton", num_threads=1)
    for result, call in zip(got, calls, strict=True):
        expected = reference.gated_mlp(call.x_TH, call.mlp, call.repair, call.restored_T)
        assert result.dtype == torch.float32
        assert result.shape == expected.shape
        assert relative_rms(result, expected) < tolerance
    return got


@every_form
def test_every_form_beside_another(grid: Grid, bits: int) -> None:
    """Two widths in one step; ranks, a plane and biases for some tokens of one of them."""
    check(
        [
            call_of(
                random_inputs(3, 128),
                random_mlp(128, 64, bits, grid=grid, biases=True),
                random_factors(128, 64, bits, 2, grid=grid, num_planes=1),
                [False, True, False],
            ),
            call_of(random_inputs(1, 128, 5), random_mlp(128, 64, 2, seed=5)),
        ]
    )


@pytest.mark.parametrize("activation", get_args(Activation))
def test_every_activation(activation: Activation) -> None:
    mlp = random_mlp(64, 64, 3, activation=activation, biases=True)
    check([call_of(6 * random_inputs(2, 64), mlp)])


def test_repairs_of_different_sizes_together() -> None:
    """Ranks for one, planes for another (two, and one), nothing for the third; all its tokens."""
    mlp = random_mlp(64, 128, 2)
    ranks, planes = random_factors(64, 128, 3, 3), random_factors(64, 128, 3, 0, num_planes=2)
    uneven = replace(planes, up_planes=planes.up_planes[:1], gate=random_low_rank(128, 64, 3, 1))
    check(
        [
            call_of(random_inputs(2, 64), mlp, ranks),
            call_of(random_inputs(2, 64, 1), mlp, uneven, [True, False]),
            call_of(random_inputs(1, 64, 2), mlp, ranks, [False]),
            call_of(random_inputs(1, 64, 3), mlp),
        ]
    )


def test_shapes_activations_types_and_codes_that_cannot_share_a_launch() -> None:
    """Among them no tokens, bfloat16 weights, many tokens, factors in two forms."""
    mixed = random_factors(64, 64, 3, 1)
    mixed = replace(mixed, down=random_low_rank(64, 64, 2, 1))
    check(
        [
            call_of(random_inputs(1, 64), random_mlp(64, 64, 2)),
            call_of(random_inputs(1, 128), random_mlp(128, 64, 2)),
            call_of(random_inputs(1, 64), random_mlp(64, 64, 2, activation="relu")),
            call_of(random_inputs(1, 64).double(), random_mlp(64, 64, 2)),
            call_of(random_inputs(1, 64).bfloat16(), random_mlp(64, 64, 2)),
            call_of(random_inputs(0, 64), random_mlp(64, 64, 2)),
            call_of(random_inputs(1, 64), random_mlp(64, 64, 16)),
            call_of(random_inputs(17, 64), random_mlp(64, 64, 3)),
            call_of(random_inputs(1, 64), random_mlp(64, 64, 3), mixed),
            call_of(random_inputs(1, 64), random_mlp(64, 64, 3), random_factors(64, 64, 4, 1)),
        ]
    )
    assert ops.gated_mlp_many([], backend="triton", num_threads=1) == []


def test_bytes_at_odd_addresses_and_inputs_apart() -> None:
    mlp = random_mlp(64, 64, 3)
    call = call_of(random_inputs(2, 64), mlp, random_factors(64, 64, 3, 2))
    odd = replace(call.mlp, gate=at_odd_address(call.mlp.gate), down=at_odd_address(call.mlp.down))
    apart = torch.zeros(2, 130, device=DEVICE)[:, 1:129:2]
    apart.copy_(call.x_TH)
    rows_apart = torch.zeros(4, 64, device=DEVICE)[::2]
    rows_apart.copy_(call.x_TH)
    expected, *got = check(
        [call, replace(call, x_TH=apart, mlp=odd), replace(call, x_TH=rows_apart)]
    )
    assert torch.equal(got[0], expected)
    assert torch.equal(got[1], expected)


def test_a_token_has_the_same_bits_alone_and_in_any_batch() -> None:
    """Each of nine tokens (two jobs), some restored, beside other experts, and one by one."""
    mlp, repair = random_mlp(64, 64, 2), random_factors(64, 64, 3, 2, num_planes=1)
    x = random_inputs(9, 64)
    restored = [True, False, False, True, False, True, True, False, True]
    other = call_of(random_inputs(2, 64, 9), random_mlp(64, 64, 4, seed=9))
    _, together = check([other, call_of(x, mlp, repair, restored)])
    for token in (0, 1, 3, 8):
        one = call_of(x[token : token + 1], mlp, repair, restored[token : token + 1])
        assert torch.equal(ops.gated_mlp_many([one], backend="triton", num_threads=1)[0][0],
                           together[token])  # fmt: skip
    pair = call_of(x[5:7], mlp, repair)
    assert torch.equal(check([pair])[0], together[5:7])


def test_launches_do_not_grow_with_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    launches: list[str] = []
    original = triton_grouped.multiply_rows

    def counted(*args: object, **kwargs: object) -> None:
        launches.append("rows")
        original(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(triton_grouped, "multiply_rows", counted)
    repair = random_factors(64, 64, 3, 1, num_planes=1)
    calls = [
        call_of(random_inputs(1, 64, seed), random_mlp(64, 64, 2, seed=seed), repair)
        for seed in range(4)
    ]
    check(calls)
    assert len(launches) == 6  # codes, planes and right factors, of gate with up and of down
    launches.clear()
    check([replace(call, repair=None) for call in calls])
    assert len(launches) == 2


@pytest.mark.parametrize("grid", get_args(Grid))
def test_calls_in_other_groups_and_in_mixed_ones(grid: Grid) -> None:
    """Each group size is a form of its own; the repairs of all are in groups of 64."""
    mixed = GatedMLP(
        random_matrix(192, 128, 2, 1, grid, 32),
        random_matrix(192, 128, 2, 2, grid, 128),
        random_matrix(128, 192, 3, 3, grid, 96),
        "silu",
    )
    uniform = random_mlp(128, 192, 2, grid=grid, group_size=64)
    repair = random_factors(128, 192, 3, 1, grid, num_planes=1)
    check(
        [
            call_of(random_inputs(3, 128, seed=1), mixed, repair),
            call_of(random_inputs(1, 128, seed=2), uniform, repair),
        ]
    )


def test_digits_are_exact() -> None:
    """Every float32 within 2**-6 of its group's largest comes back; sums and zeros too."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(3, 192, generator=generator) * 63 + 1
    x *= torch.where(torch.rand(3, 192, generator=generator) < 0.5, -1, 1)
    x *= torch.tensor([1.0, 2.0**70, 2.0**-70])[:, None]
    x[:, 128:] = 0
    x[1, 3] = 64 * 2.0**70  # a power of two is the largest of its group
    back = values_of(digits_of(x.to(DEVICE)))
    assert torch.equal(back.float(), x)
    half = x[:1].half().to(DEVICE)
    assert torch.equal(values_of(digits_of(half)).half(), half.cpu())


def digits_of(x_TK: torch.Tensor) -> Digits:
    rows = torch.arange(x_TK.shape[0], device=DEVICE) * x_TK.stride(0) * x_TK.element_size()
    return to_digits(rows + x_TK.data_ptr(), x_TK.shape[1], x_TK)


def values_of(digits: Digits) -> torch.Tensor:
    high, low = digits.digits.double().unflatten(2, (triton_digits.DIGITS // 2, 2)).unbind(3)
    parts = (256 * high + low) * digits.sizes.double()[..., None]
    sums = parts.sum(2).unflatten(2, (2, -1)).sum(3)
    assert torch.allclose(digits.sums.double(), sums, rtol=1e-5, atol=0)
    return parts.sum(2).flatten(1).cpu()


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_so_and_with_its_token(wrong: float) -> None:
    mlp, x = random_mlp(64, 64, 2), random_inputs(2, 64)
    x[0, 3] = wrong
    (got,) = ops.gated_mlp_many([call_of(x, mlp)], backend="triton", num_threads=1)
    assert got[0].isnan().all()
    good = call_of(x[1:], mlp)
    assert torch.equal(check([good])[0][0], got[1])


def test_jobs_hold_as_many_tokens_as_suit_them() -> None:
    assert [triton_decode.tokens_per_job(most) for most in (1, 2, 3, 4, 9)] == [2, 2, 4, 4, 8]
