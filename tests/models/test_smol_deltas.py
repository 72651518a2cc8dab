"""Goal: deltas are what they say, on disk and off. Method: dense algebra; files with faults."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from smol_base import EXPERTS, FFN, HIDDEN, fresh_deltas, trained_deltas

from models.smol.deltas import PROJECTIONS, read_deltas, write_deltas


def test_an_expert_is_the_base_and_its_own_low_rank_product() -> None:
    layer = trained_deltas()[0]
    base = torch.randn(HIDDEN, FFN)
    for expert in range(EXPERTS):
        found = layer.expert_weight(base, "down", expert)
        expected = base + layer.left_t["down"][expert].T @ layer.right["down"][expert]
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert not torch.equal(
        layer.expert_weight(base, "down", 0), layer.expert_weight(base, "down", 1)
    )


def test_ranks_are_added_in_order_so_that_every_machine_gets_the_same_bits() -> None:
    layer = trained_deltas()[0]
    base = torch.randn(FFN, HIDDEN)
    expected = base.double()
    for left, right in zip(layer.left_t["gate"][2], layer.right["gate"][2], strict=True):
        # In float64 nothing of a product or a sum is lost: one rounding per step is float32's.
        expected = (expected + torch.outer(left.double(), right.double())).float().double()
    assert torch.equal(layer.expert_weight(base, "gate", 2), expected.float())


def test_before_training_every_expert_is_the_base() -> None:
    layer, base = fresh_deltas()[0], torch.randn(FFN, HIDDEN)
    assert torch.equal(layer.expert_weight(base, "up", 3), base)


def test_a_file_gives_back_what_was_written(tmp_path: Path) -> None:
    file, layers = tmp_path / "deltas.safetensors", trained_deltas()
    write_deltas(file, layers, {"steps": "1"})
    for found, expected in zip(read_deltas(file), layers, strict=True):
        assert torch.equal(found.router.float(), expected.router)
        for name in PROJECTIONS:
            assert torch.equal(found.left_t[name].float(), expected.left_t[name])
            assert torch.equal(found.right[name].float(), expected.right[name])


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("layers.0.up.right", None, "layers.0.up.right"),
        ("layers.1.router", None, "expected 7 tensors in each"),
        ("layers.0.down.left_t", (EXPERTS, 3, HIDDEN + 1), "layer 0: down.left_t: expected shape"),
        ("layers.1.gate.right", (EXPERTS, 2, HIDDEN), "layer 1: gate.right: expected shape"),
    ],
)
def test_a_file_with_a_fault_is_refused(
    name: str, shape: tuple[int, ...] | None, message: str, tmp_path: Path
) -> None:
    file = tmp_path / "deltas.safetensors"
    write_deltas(file, fresh_deltas(), {})
    tensors = load_file(file)
    if shape is None:
        del tensors[name]
    else:
        tensors[name] = torch.zeros(shape)
    save_file(tensors, file)
    with pytest.raises(ValueError, match=message):
        read_deltas(file)
