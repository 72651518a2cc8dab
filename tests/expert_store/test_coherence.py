"""Goal: experts that err alike are told from those that do not, and Top-n is priced accordingly.

Method: experts made by hand, alike and apart; the extremes against sums written out.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from expert_store.choose import ExpertUse
from expert_store.coherence import coherence, heard_together
from expert_store.compress import compress
from expert_store.config import CompressionConfig
from expert_store.types import PROJECTIONS, ExpertKey, ExpertWeights, Manifest
from tests.tiny_checkpoints import write_tiny_checkpoint

KEYS = [ExpertKey(layer, expert) for layer in (0, 3) for expert in range(3)]


def expert(seed: int) -> ExpertWeights:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"gate": (128, 64), "up": (128, 64), "down": (64, 128)}
    weights = {name: torch.randn(shapes[name], generator=generator) for name in PROJECTIONS}
    return ExpertWeights(ExpertKey(0, seed), **weights)


def test_the_same_expert_errs_alike_and_another_does_not() -> None:
    first, other = expert(0), expert(1)
    assert coherence(first, first) == pytest.approx(1.0)
    assert coherence(first, other) < 0.05
    near = replace(first, gate=first.gate + 0.01 * other.gate)
    assert 0.8 < coherence(first, near) < 1.0
    against = replace(first, **{name: -getattr(first, name) for name in PROJECTIONS})
    assert coherence(first, against) == 0.0, "errors that cancel are not counted on"
    zeros = replace(first, **{name: 0 * getattr(first, name) for name in PROJECTIONS})
    assert coherence(first, zeros) == 0.0


def uses(weights: tuple[float, float]) -> dict[ExpertKey, ExpertUse]:
    squares = tuple(weight**2 for weight in weights)
    use = ExpertUse((1 / 3, 1 / 3), squares, dict.fromkeys(PROJECTIONS, 1.0))
    return dict.fromkeys(KEYS, use)


def test_independent_errors_count_by_squares_and_alike_ones_by_weights() -> None:
    plain = uses((0.75, 0.25))
    assert heard_together(plain, 0.0) == plain
    for use in heard_together(plain, 1.0).values():
        assert use.weight2_at_K == pytest.approx((0.75, 0.25))
    for use in heard_together(plain, 0.5).values():
        assert use.weight2_at_K == pytest.approx(((0.75 + 0.5625) / 2, (0.25 + 0.0625) / 2))
    # Weights that do not add up to 1, as without renormalisation: the output's error does not grow.
    for use in heard_together(uses((0.3, 0.1)), 1.0).values():
        assert use.weight2_at_K == pytest.approx((0.4 * 0.3, 0.4 * 0.1))


def test_a_layer_that_no_token_reached_counts_nothing() -> None:
    unused = ExpertUse((0.0, 0.0), (0.0, 0.0), dict.fromkeys(PROJECTIONS, 1.0))
    found = heard_together(dict.fromkeys(KEYS, unused), 1.0)
    assert all(use.weight2_at_K == (0.0, 0.0) for use in found.values())


def test_experts_alike_get_wider_codes_instead_of_compensators(tmp_path: Path) -> None:
    apart = write_tiny_checkpoint("mixtral", tmp_path / "apart", hidden=128, ffn=192)
    alike = write_tiny_checkpoint("mixtral", tmp_path / "alike", hidden=128, ffn=192)
    _share_experts(alike)
    factors = []
    for model in (apart, alike):
        config = CompressionConfig(recipe="fast", budget=3.0)
        factors.append(_factor_bytes(compress(model, model / "store", config, jobs=2)))
    assert factors[1] < factors[0]


def _share_experts(folder: Path) -> None:
    """Every expert becomes its layer's first."""
    (path,) = folder.glob("*.safetensors")
    tensors = load_file(path)
    for name in tensors:
        head, _, tail = name.partition(".experts.")
        if tail:
            number, _, rest = tail.partition(".")
            tensors[name] = tensors[f"{head}.experts.0.{rest}"].clone()
    save_file(tensors, path, {"format": "pt"})


def _factor_bytes(manifest: Manifest) -> int:
    return sum(e.factors.num_bytes for e in manifest.experts.values() if e.factors is not None)
