"""Goal: what is trained is what is served. Method: against transformers' Llama and Mixtral.

The fast forward pass never makes an expert; transformers' Mixtral gets every expert as a matrix.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from smol_base import EXPERTS, fresh_deltas, tiny_base, tiny_llama, trained_deltas
from torch.nn import functional
from transformers import AutoModelForCausalLM

from models.smol import TOP_K
from models.smol.assemble import assemble
from models.smol.base import Base
from models.smol.checks import keep
from models.smol.deltas import LayerDeltas
from models.smol.forward import Routing, TrainingModel, balance_loss, route

TOKENS = torch.randint(3, 8192, (2, 40), generator=torch.Generator().manual_seed(1))


def mixtral(base: Base, layers: list[LayerDeltas], folder: Path) -> AutoModelForCausalLM:
    """The assembled model, with its experts not rounded to bfloat16."""
    assemble(base, layers, folder, {})
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        for number, layer in enumerate(layers):
            experts = model.model.layers[number].mlp.experts
            for expert in range(EXPERTS):
                gate, up, down = (
                    layer.expert_weight(base.mlp(number, name), name, expert)
                    for name in ("gate", "up", "down")
                )
                assert (experts.gate_up_proj[expert] - torch.cat([gate, up])).abs().max() < 0.02
                assert (experts.down_proj[expert] - down).abs().max() < 0.02
                experts.gate_up_proj[expert] = torch.cat([gate, up])
                experts.down_proj[expert] = down
    return model


def test_the_fast_forward_pass_is_the_assembled_mixtral(tmp_path: Path) -> None:
    base, layers = tiny_base(), trained_deltas()
    with torch.no_grad():
        expected = mixtral(base, layers, tmp_path / "smol")(TOKENS).logits
        found, routings = TrainingModel(base, torch.float32).hidden(TOKENS, layers)
    logits = functional.linear(found, base.weights["model.embed_tokens.weight"])
    torch.testing.assert_close(logits.view_as(expected), expected, rtol=1e-3, atol=2e-4)
    used = torch.cat([each.chosen.reshape(-1) for each in routings]).unique()
    assert len(used) == EXPERTS, "an expert that nobody uses was not compared"


def test_before_training_the_mixtral_is_the_dense_model(tmp_path: Path) -> None:
    assemble(tiny_base(), fresh_deltas(), tmp_path / "smol", {})
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "smol", dtype=torch.float32).eval()
    with torch.no_grad():
        expected = tiny_llama()(TOKENS).logits
        torch.testing.assert_close(model(TOKENS).logits, expected, rtol=1e-3, atol=1e-4)
        fast, _ = TrainingModel(tiny_base(), torch.float32).hidden(TOKENS, None)
    logits = functional.linear(fast, tiny_base().weights["model.embed_tokens.weight"])
    torch.testing.assert_close(logits.view_as(expected), expected, rtol=1e-3, atol=1e-4)


def test_the_loss_and_its_gradient_are_cross_entropy_s() -> None:
    model, head = TrainingModel(tiny_base(), torch.float32), tiny_llama().lm_head.weight.detach()
    hidden = torch.randn(300, 64, requires_grad=True)  # more than one chunk of the head
    targets = torch.randint(0, 8192, (300,))
    weights = torch.rand(300)
    (expected,) = torch.autograd.grad(
        (functional.cross_entropy(hidden @ head.T, targets, reduction="none") * weights).sum(),
        hidden,
    )
    losses = model.losses(hidden, targets)
    (found,) = torch.autograd.grad((losses * weights).sum(), hidden)
    torch.testing.assert_close(
        losses, functional.cross_entropy(hidden @ head.T, targets, reduction="none")
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_gradients_reach_every_delta_and_router(tmp_path: Path) -> None:
    base, layers = tiny_base(), trained_deltas()
    for layer in layers:
        for _, value in layer.tensors():
            value.requires_grad_()
    model = TrainingModel(base, torch.float32)
    hidden, routings = model.hidden(TOKENS[:, :-1], layers)
    loss = model.losses(hidden, TOKENS[:, 1:].reshape(-1)).mean() + balance_loss(routings)
    loss.backward()
    for layer in layers:
        for name, value in layer.tensors():
            assert value.grad is not None
            assert value.grad.abs().sum() > 0, name
    assert all(not value.requires_grad for value in base.weights.values())


def test_routing_is_mixtral_s() -> None:
    inputs, router = torch.randn(50, 64), torch.randn(EXPERTS, 64)
    found = route(inputs, router)
    assert found.chosen.shape == (50, TOP_K)
    logits = inputs @ router.T
    for token in range(50):
        best = logits[token].argsort(descending=True)[:TOP_K]
        assert found.chosen[token].tolist() == best.tolist()
        torch.testing.assert_close(found.weights[token], logits[token, best].softmax(-1))


def test_the_balance_loss_is_least_when_experts_are_used_alike() -> None:
    alike = torch.full((8, EXPERTS), 1 / EXPERTS)
    chosen = torch.tensor([[0, 1], [2, 3]] * 4)
    weights = torch.full((8, TOP_K), 0.5)
    assert float(balance_loss([Routing(alike, chosen, weights)])) == pytest.approx(1.0)
    one = functional.one_hot(torch.zeros(8, dtype=torch.long), EXPERTS).float()
    crowded = Routing(one, torch.tensor([[0, 1]] * 8), weights)
    assert float(balance_loss([crowded])) == pytest.approx(EXPERTS / 2)


def test_an_expert_can_be_left_out() -> None:
    model, layers = TrainingModel(tiny_base(), torch.float32), trained_deltas()
    seen: list[torch.Tensor] = []

    def adjust(routing: Routing) -> Routing:
        changed = keep(1, rescale=True)(routing)
        seen.append(changed.weights)
        return changed

    with torch.no_grad():
        whole, _ = model.hidden(TOKENS, layers)
        second_only, _ = model.hidden(TOKENS, layers, adjust=adjust)
    assert len(seen) == 2
    assert all(bool((each == torch.tensor([0.0, 1.0])).all()) for each in seen)
    assert (whole - second_only).abs().max() > 0.1
