"""Goal: noise has the energy that was asked for, falls where it was asked for, and nowhere else.

Method: experts that are plain scalings, so that every part of a layer's output is known; two
layers, sequences side by side.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from gpu_worker.counters import StepCounters
from gpu_worker.injection import InjectingExperts, Injection, Perturbed
from gpu_worker.model import StepReport

TOKENS, HIDDEN = 6, 32


class ScalingExperts:
    """Expert e multiplies a row by e + 1."""

    def __init__(self) -> None:
        self.begun: list[Any] = []

    def begin(self, valid_S: torch.Tensor | None, token_tags_S: torch.Tensor | None = None) -> None:
        self.begun.append((valid_S, token_tags_S))

    def run_layer(
        self, layer: int, hidden_SH: torch.Tensor, ids_SK: torch.Tensor, weights_SK: torch.Tensor
    ) -> torch.Tensor:
        return hidden_SH * ((ids_SK + 1) * weights_SK).sum(dim=1, keepdim=True)

    def end(self) -> StepReport:
        return StepReport(StepCounters(), {3: 1})


def call(sequences: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden rows, ids of two different experts out of four, weights."""
    generator = torch.Generator().manual_seed(seed)
    rows = sequences * TOKENS
    hidden = torch.randn(rows, HIDDEN, generator=generator)
    ids = torch.stack([torch.randperm(4, generator=generator)[:2] for _ in range(rows)])
    return hidden, ids, torch.rand(rows, 2, generator=generator) + 0.1


def change(
    plan: list[Perturbed], layer: int = 1, seed: int = 0, inputs: Any = None
) -> torch.Tensor:
    """What the injection adds, [S, H]."""
    inputs = inputs or call(len(plan))
    injecting = InjectingExperts(ScalingExperts(), seed=seed)
    injecting.plan(plan)
    return injecting.run_layer(layer, *inputs) - ScalingExperts().run_layer(layer, *inputs)


def test_every_token_gets_the_energy_that_was_asked_for() -> None:
    plan = [
        Perturbed(None, 0),
        Perturbed(Injection.layer(1, 0.1), 0),
        Perturbed(Injection.layer(1, 0.025), 0),
        Perturbed(Injection.layer(2, 0.1), 0),
        Perturbed(Injection.layer(1, 0.0), 0),
    ]
    inputs = call(len(plan))
    output = ScalingExperts().run_layer(1, *inputs)
    ratio = change(plan, inputs=inputs).norm(dim=1) / output.norm(dim=1)
    expected = torch.tensor([0, math.sqrt(0.1), math.sqrt(0.025), 0, 0]).repeat_interleave(TOKENS)
    torch.testing.assert_close(ratio, expected, rtol=1e-4, atol=1e-6)


def test_an_expert_set_perturbs_its_own_part_of_the_sum() -> None:
    plan = [
        Perturbed(Injection.layer(1, 0.1, frozenset({0, 2})), 0),
        Perturbed(Injection.layer(1, 0.1), 0),
        Perturbed(Injection.layer(1, 0.1, frozenset()), 0),
        Perturbed(None, 0),
    ]
    hidden, ids, weights = inputs = call(len(plan))
    chosen = (ids == 0) | (ids == 2)
    chosen[TOKENS : 2 * TOKENS] = True
    chosen[2 * TOKENS :] = False
    part = ScalingExperts().run_layer(1, hidden, ids, weights * chosen)
    added = change(plan, inputs=inputs).norm(dim=1)
    torch.testing.assert_close(added, math.sqrt(0.1) * part.norm(dim=1), rtol=1e-4, atol=1e-6)
    assert (added[:TOKENS] == 0).any(), "some token uses neither expert"
    assert (added[:TOKENS] > 0).any()


def test_draws_are_those_of_seed_and_number_whatever_else_runs() -> None:
    one = Injection.layer(1, 0.1)
    hidden, ids, weights = call(1)
    together = tuple(torch.cat([tensor] * 3) for tensor in (hidden, ids, weights))
    alone = change([Perturbed(one, 7)], inputs=(hidden, ids, weights))
    batch = change(
        [Perturbed(None, 7), Perturbed(one, 8), Perturbed(one, 7)], inputs=together
    ).split(TOKENS)
    torch.testing.assert_close(batch[2], alone)
    assert not torch.allclose(batch[1], alone)
    assert not torch.allclose(change([Perturbed(one, 7)], seed=1, inputs=call(1)), alone)
    # The same directions in another layer and at another energy: differences are then not luck.
    louder = change([Perturbed(Injection.layer(2, 0.4), 7)], layer=2, inputs=call(1))
    torch.testing.assert_close(louder, 2 * alone)


def test_layers_of_one_injection_draw_apart() -> None:
    both = Injection({1: None, 2: frozenset({0, 1, 2, 3})}, 0.1)
    first = change([Perturbed(both, 0)], layer=1)
    second = change([Perturbed(both, 0)], layer=2)
    assert first.norm() == pytest.approx(float(second.norm()), rel=1e-4)
    assert abs(float((first * second).sum() / first.norm() / second.norm())) < 0.3


def test_without_a_plan_it_only_passes_on() -> None:
    inner = ScalingExperts()
    injecting = InjectingExperts(inner)
    valid, tags = torch.ones(2, dtype=torch.bool), torch.arange(2)
    injecting.begin(valid, tags)
    assert inner.begun == [(valid, tags)]
    inputs = call(2)
    assert torch.equal(injecting.run_layer(1, *inputs), inner.run_layer(1, *inputs))
    assert injecting.end().degraded_rows == {3: 1}


def test_what_does_not_fit_is_refused() -> None:
    for energy in (-0.1, math.nan, math.inf):
        with pytest.raises(ValueError, match="energy: got"):
            Injection.layer(0, energy)
    with pytest.raises(ValueError, match="5 sequences do not divide 12 token rows"):
        change([Perturbed(None, 0)] * 5, inputs=call(2))
