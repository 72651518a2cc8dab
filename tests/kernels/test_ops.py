"""Goal: one face, any backend, the same answer. Method: every backend against the reference with
factors, restore masks and odd token counts; refused inputs; transformers beside our package."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from kernel_matrices import (
    FORMS,
    FP32_TOLERANCE,
    INT8_MLP_TOLERANCE,
    TOKEN_COUNTS,
    TRITON_TOLERANCE,
    random_factors,
    random_inputs,
    random_low_rank,
    random_matrix,
    random_mlp,
    relative_rms,
)

import kernels
from kernels import ops, reference
from kernels.ops import Backend
from kernels.types import GatedMLP, GatedRepair, Grid, MlpCall

TOLERANCE: dict[Backend, float] = {
    "reference": 0.0,
    "cpu_fp32": FP32_TOLERANCE,
    "cpu_int8": INT8_MLP_TOLERANCE,
    "triton": TRITON_TOLERANCE,
}
CPU_BACKENDS: tuple[Backend, ...] = ("reference", "cpu_fp32", "cpu_int8")
every_form_and_baseline = pytest.mark.parametrize(("grid", "bits"), [*FORMS, ("affine", 16)])


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@every_form_and_baseline
def test_every_cpu_backend_is_the_reference(backend: Backend, grid: Grid, bits: int) -> None:
    mlp = random_mlp(192, 128, bits, biases=True, grid=grid)
    for num_tokens in TOKEN_COUNTS:
        x = random_inputs(num_tokens, 192, seed=num_tokens)
        got = ops.gated_mlp(x, mlp, backend=backend)
        assert got.dtype == torch.float32
        assert relative_rms(got, reference.gated_mlp(x, mlp)) <= TOLERANCE[backend], num_tokens


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize(
    ("num_blocks", "num_planes"), [(0, 0), (1, 0), (8, 0), (0, 1), (0, 2), (2, 1)]
)
@pytest.mark.parametrize("grid", ["affine", "symmetric"])
def test_factors_and_planes_reach_the_restored_tokens(
    backend: Backend, grid: Grid, num_blocks: int, num_planes: int
) -> None:
    """Rank 0, one block and the largest rank, 128; planes alone, two of them, and both kinds."""
    mlp = random_mlp(192, 128, 2, grid=grid)
    factors = random_factors(192, 128, 3, num_blocks, grid, num_planes)
    for num_tokens in (1, 5, 33):
        x = random_inputs(num_tokens, 192, seed=num_tokens)
        restored = torch.arange(num_tokens) % 3 == 0
        got = ops.gated_mlp(x, mlp, factors, restored, backend=backend)
        expected = reference.gated_mlp(x, mlp, factors, restored)
        assert relative_rms(got, expected) <= TOLERANCE[backend], num_tokens


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_a_repair_may_differ_between_the_three_matrices(backend: Backend) -> None:
    """A plane for one, rank for another, nothing for the third, as a prefix of a record leaves
    them; each part counts: leaving one out changes the result."""
    mlp, whole = (
        random_mlp(64, 128, 2, grid="symmetric"),
        random_factors(64, 128, 3, 3, num_planes=2),
    )
    x = random_inputs(3, 64)
    prefix = GatedRepair(
        whole.gate.prefix(0),
        whole.up.prefix(2),
        whole.down.prefix(0),
        gate_planes=whole.gate_planes[:1],
    )
    got = ops.gated_mlp(x, mlp, prefix, backend=backend)
    assert relative_rms(got, reference.gated_mlp(x, mlp, prefix)) <= TOLERANCE[backend]
    for fewer in (replace(prefix, gate_planes=()), replace(prefix, up=whole.up.prefix(0))):
        less = ops.gated_mlp(x, mlp, fewer, backend=backend)
        assert relative_rms(less, got) > 2 * TOLERANCE[backend]


@pytest.mark.parametrize("grid", ["affine", "symmetric"])
def test_int8_with_a_repair_is_the_same_alone_and_in_a_batch(grid: Grid) -> None:
    mlp, factors = random_mlp(192, 128, 2, grid=grid), random_factors(192, 128, 3, 2, grid, 1)
    x, restored = random_inputs(33, 192), torch.arange(33) % 2 == 0
    batch = ops.gated_mlp(x, mlp, factors, restored, backend="cpu_int8")
    for t in (0, 1, 32):
        one = slice(t, t + 1)
        alone = ops.gated_mlp(x[one], mlp, factors, restored[one], backend="cpu_int8")
        assert torch.equal(alone, batch[one])


@pytest.mark.parametrize(("grid", "num_planes"), [("affine", 0), ("symmetric", 1)])
def test_triton_backend_joins_the_kernels(grid: Grid, num_planes: int) -> None:
    mlp = random_mlp(64, 128, 2, biases=True, grid=grid)
    factors = random_factors(64, 128, 3, 2, grid, num_planes)
    for num_tokens, restored in ((3, torch.tensor([True, False, True])), (17, None)):
        x = random_inputs(num_tokens, 64)
        got = ops.gated_mlp(x, mlp, factors, restored, backend="triton")
        expected = reference.gated_mlp(x, mlp, factors, restored)
        assert relative_rms(got, expected) <= TRITON_TOLERANCE


@pytest.mark.parametrize("backend", [*CPU_BACKENDS, "triton"])
def test_no_tokens_give_no_rows(backend: Backend) -> None:
    mlp, factors = random_mlp(64, 64, 2), random_factors(64, 64, 3, 1)
    nobody = torch.zeros(0, dtype=torch.bool)
    got = ops.gated_mlp(torch.zeros(0, 64), mlp, factors, nobody, backend=backend)
    assert got.shape == (0, 64)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_many_are_each(backend: Backend) -> None:
    inputs = [
        MlpCall(random_inputs(3, 64), random_mlp(64, 128, 2)),
        MlpCall(random_inputs(2, 64), random_mlp(64, 128, 16)),
        MlpCall(random_inputs(0, 64), random_mlp(64, 128, 3)),
        MlpCall(random_inputs(5, 128), random_mlp(128, 64, 4)),
        MlpCall(random_inputs(2, 128), random_mlp(128, 64, 1, grid="symmetric")),
    ]
    many = ops.gated_mlp_many(inputs, backend=backend, num_threads=2)
    assert len(many) == len(inputs)
    for got, call in zip(many, inputs, strict=True):
        assert torch.equal(got, ops.gated_mlp(call.x_TH, call.mlp, backend=backend))
    assert ops.gated_mlp_many([], backend=backend, num_threads=1) == []


@every_form_and_baseline
def test_dequantize(grid: Grid, bits: int) -> None:
    matrix = random_matrix(37, 192, bits, grid=grid)
    assert torch.equal(ops.dequantize(matrix), reference.dequantize(matrix))


@pytest.mark.parametrize("num_blocks", [0, 3])
@pytest.mark.parametrize("grid", ["affine", "symmetric"])
def test_dequantize_low_rank(grid: Grid, num_blocks: int) -> None:
    factors = random_low_rank(64, 128, 3, num_blocks, grid=grid)
    for got, expected in zip(
        ops.dequantize_low_rank(factors), reference.dequantize_low_rank(factors), strict=True
    ):
        assert torch.equal(got, expected)


def test_backends_by_device() -> None:
    assert ops.default_backend("cpu") == "cpu_fp32"
    assert ops.default_backend(torch.device("cuda", 1)) == "triton"
    assert ops.native_isa() in ("avx512vnni", "avx2", "scalar", None)


MLP, X = random_mlp(64, 128, 2), random_inputs(2, 64)
FACTORS = random_factors(128, 64, 3, 1)  # of the transposed shapes
PLANES = random_factors(128, 64, 3, 0, num_planes=1)  # likewise


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ops.gated_mlp(X, MLP, backend="cuda"), "backend: got 'cuda'"),
        (lambda: ops.gated_mlp(X[:, :32], MLP, backend="cpu_int8"), r"x: expected float \[T, 64\]"),
        (lambda: ops.gated_mlp(X.int(), MLP, backend="cpu_fp32"), "x: expected float"),
        (lambda: ops.gated_mlp(X.to("meta"), MLP, backend="cpu_fp32"), "x is on meta"),
        (lambda: ops.gated_mlp(X, MLP, FACTORS, backend="cpu_fp32"), "factors.gate"),
        (lambda: ops.gated_mlp(X, MLP, PLANES, backend="cpu_fp32"), "factors.gate"),
        (
            lambda: ops.gated_mlp(X, MLP, None, torch.ones(2), backend="cpu_fp32"),
            "restored: expected bool",
        ),
        (
            lambda: ops.gated_mlp(X, MLP, None, torch.ones(3).bool(), backend="cpu_fp32"),
            r"restored: expected bool \[2\]",
        ),
        (lambda: ops.weighted_sum(X, torch.tensor([0, 2]), torch.ones(2), 2), "rows: got 0 to 2"),
        (lambda: ops.weighted_sum(X, torch.tensor([-1, 0]), torch.ones(2), 2), "rows: got -1"),
        (lambda: ops.weighted_sum(X, torch.tensor([0]), torch.ones(2), 2), "rows: expected"),
        (lambda: ops.weighted_sum(X.double(), torch.tensor([0, 1]), torch.ones(2), 2), "outputs: "),
        (lambda: ops.gated_mlp_many([MlpCall(X, MLP)], num_threads=0), "num_threads: got 0"),
        (lambda: ops.gated_mlp_many([MlpCall(X[:, :1], MLP)], num_threads=1), "x: expected"),
        (lambda: GatedMLP(MLP.gate, MLP.up, MLP.gate, "silu"), "do not chain"),
    ],
)
def test_bad_input_is_refused(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_transformers_lives_beside_our_kernels() -> None:
    """transformers probes for a package of this name; ours must not be taken for that one."""
    assert Path(kernels.__file__).parent == Path(ops.__file__).parent
    assert Path(ops.__file__).parent.parent.joinpath("expert_store").is_dir()
    assert transformers.MixtralForCausalLM.__name__ == "MixtralForCausalLM"
    assert not transformers.utils.is_kernels_available()
