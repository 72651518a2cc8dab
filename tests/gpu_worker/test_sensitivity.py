"""Goal: the nats that noise costs are measured right: zero for none, and the
same whatever is measured beside them.

Method: a tiny model's original store; KL against torch's own and against a model run by hand.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch.nn.functional import kl_div

from expert_store.compress import compress
from expert_store.config import CompressionConfig
from expert_store.segment import Segment
from gpu_worker import sensitivity
from gpu_worker.build import open_model
from gpu_worker.config import WorkerConfig
from gpu_worker.injection import InjectingExperts, Injection, Perturbed
from gpu_worker.model import ModelRunner, bind_experts
from gpu_worker.sensitivity import divergence, divergences
from tests.tiny_checkpoints import write_tiny_checkpoint

WINDOWS = torch.randint(0, 128, (3, 20), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModelRunner]:
    """deepseek_v2: its first layer has no routed experts."""
    folder = tmp_path_factory.mktemp("model")
    model = write_tiny_checkpoint("deepseek_v2", folder / "model", layers=3)
    compress(model, folder / "store", CompressionConfig(recipe="original"), jobs=1)
    source = Segment(folder / "store")
    config = WorkerConfig(device="cpu", dtype="float32")
    opened = open_model(folder / "store", source, None, config)
    yield opened.runner
    opened.close()


def forward(runner: ModelRunner, ids_BT: torch.Tensor) -> torch.Tensor:
    return runner.forward(ids_BT, torch.arange(20).expand_as(ids_BT), None, None).logits


def test_divergence_is_torchs() -> None:
    generator = torch.Generator().manual_seed(0)
    base, other = (torch.randn(5, 40, generator=generator) for _ in range(2))
    expected = kl_div(
        other.log_softmax(1), base.log_softmax(1), log_target=True, reduction="none"
    ).sum(dim=1)
    torch.testing.assert_close(divergence(base, other), expected)
    assert not divergence(base, base.clone()).any()


def test_divergences_are_those_of_a_model_run_by_hand(runner: ModelRunner) -> None:
    injections = [
        Injection.layer(2, 0.0),
        Injection.layer(2, 0.3),
        Injection.layer(1, 0.3, frozenset({0, 1})),
    ]
    told: list[int] = []
    nats_IW = divergences(runner, WINDOWS, injections, seed=4, progress=told.append)
    assert nats_IW.shape == (3, 3)
    assert sum(told) == 3 * WINDOWS.numel()
    assert float(nats_IW[0].max()) < 1e-6
    assert float(nats_IW[1:].min()) > 1e-6
    injecting = InjectingExperts(runner.experts, seed=4)
    injecting.plan([Perturbed(injections[2], 1)])
    base_TV = forward(runner, WINDOWS[1:2])[0]
    bind_experts(runner.model, injecting)
    try:
        other_TV = forward(ModelRunner(runner.model, injecting), WINDOWS[1:2])[0]
    finally:
        bind_experts(runner.model, runner.experts)
    expected = float(divergence(base_TV, other_TV).mean())
    assert float(nats_IW[2, 1]) == pytest.approx(expected, rel=1e-3)


def test_how_many_run_side_by_side_changes_nothing(
    runner: ModelRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    injections = [Injection.layer(layer, 0.2) for layer in (1, 2, 1, 2)]
    before = forward(runner, WINDOWS)
    together = divergences(runner, WINDOWS, injections)
    torch.testing.assert_close(together[0], together[2], rtol=1e-3, atol=1e-7)
    monkeypatch.setattr(sensitivity, "LOGITS_BYTES", 1)
    alone = divergences(runner, WINDOWS, injections)
    torch.testing.assert_close(alone, together, rtol=1e-3, atol=1e-7)
    assert torch.equal(forward(runner, WINDOWS), before), "the model has its own experts again"


def test_what_does_not_fit_is_refused(runner: ModelRunner) -> None:
    with pytest.raises(ValueError, match=r"layer 0 has no routed experts.*\[1, 2\]"):
        divergences(runner, WINDOWS, [Injection.layer(0, 0.1)])
    with pytest.raises(ValueError, match="windows: got shape"):
        divergences(runner, WINDOWS[0], [Injection.layer(1, 0.1)])
