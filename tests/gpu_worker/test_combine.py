"""Goal: a row's parts are added in rising order of expert, in whatever order they are given, and
the host's two sums have the bits of the device's.

Method: random parts of a routing, an oracle that adds them one by one in float32.
"""

from __future__ import annotations

import random

import pytest
import torch

from expert_store.types import ExpertKey
from gpu_worker import combine as combine_module
from gpu_worker.combine import Part, combine
from gpu_worker.planner import ExpertWork
from kernels import ops

EXPERTS, HIDDEN = 6, 5


def parts_of(ids_SK: torch.Tensor, seed: int) -> list[Part]:
    """A part for each expert that some row goes to; some rows are not run at all."""
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for expert in range(EXPERTS):
        rows, columns = (ids_SK == expert).nonzero().unbind(1)
        if rows.numel():
            key, none = ExpertKey(3, expert), (False,) * rows.numel()
            work = ExpertWork(key, tuple(rows.tolist()), tuple(columns.tolist()), none)
            parts.append(Part(work, torch.randn(len(none), HIDDEN, generator=generator)))
    random.Random(seed).shuffle(parts)
    return parts


def one_by_one(parts: list[Part], hidden: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    total = torch.zeros(hidden.shape, dtype=torch.float32)
    for part in sorted(parts, key=lambda part: part.work.key):
        for index, (row, column) in enumerate(
            zip(part.work.token_rows, part.work.columns, strict=True)
        ):
            total[row] += part.output_PH[index] * weights[row, column].float()
    return total.to(hidden.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("num_rows", [1, 2, 9])
def test_the_sum_is_that_of_adding_one_by_one(
    num_rows: int, missing: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed in range(20):
        torch.manual_seed(seed)
        ids = torch.rand(num_rows, EXPERTS).argsort(dim=1)[:, :3]
        if missing:  # pairs that are skipped, and a padding row
            ids[torch.rand(ids.shape) < 0.3] = -1
        hidden, weights = torch.randn(num_rows, HIDDEN, dtype=dtype), torch.rand(num_rows, 3)
        parts = parts_of(ids, seed)
        expected = one_by_one(parts, hidden, weights)
        assert torch.equal(combine(parts, hidden, weights), expected)
        with monkeypatch.context() as patched:
            patched.setattr(ops, "_native", lambda: None)  # as without a compiler
            assert torch.equal(combine(parts, hidden, weights), expected)
            patched.setattr(combine_module, "_sum_on_host", combine_module._sum_on_device)
            assert torch.equal(combine(parts, hidden, weights), expected)


def test_no_parts_are_zeros() -> None:
    hidden = torch.randn(2, HIDDEN, dtype=torch.bfloat16)
    nothing = combine([], hidden, torch.rand(2, 3))
    assert nothing.dtype == hidden.dtype
    assert nothing.shape == hidden.shape
    assert not nothing.any()
