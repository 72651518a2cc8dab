"""Goal: a calibration's statistics are those of what transformers' own model does with the text.

Method: hooks on the plain model's experts modules, autograd, and sums in float64 written the long
way, for every family and a fine-grained router; then seeds, experts that nobody reached, blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from transformers import AutoModelForCausalLM

from expert_store.checkpoint import Checkpoint
from expert_store.compress import compress
from expert_store.config import CompressionConfig
from expert_store.errors import CheckpointError
from expert_store.families import experts_modules
from expert_store.matrix.loss import weighted_error
from expert_store.matrix.moments import Moment
from expert_store.segment import Segment
from expert_store.statistics import LayerStatistics, MomentForms
from expert_store.types import ExpertKey, ExpertWeights
from gpu_worker.build import OpenModel, open_model
from gpu_worker.calibrate import CollectingExperts, collect
from gpu_worker.config import WorkerConfig
from gpu_worker.expert_sums import ExpertMatrices, run_expert
from gpu_worker.injection import Injection
from kernels.activations import apply_gate
from kernels.types import Activation
from tests.gpu_worker.divergences import divergence
from tests.tiny_checkpoints import FAMILIES, write_tiny_checkpoint

VOCAB = 128
FULL = MomentForms("full", "full", "full")
BLOCKS = MomentForms("blocks", "blocks", "blocks")


class Seen(NamedTuple):
    """What one layer's experts module was called with, float64."""

    hidden_SH: torch.Tensor
    ids_SK: torch.Tensor
    weights_SK: torch.Tensor
    output_SH: torch.Tensor


def windows(num: int = 4, tokens: int = 24, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCAB, (num, tokens), generator=generator)


def watch_plain_model(model: Path, windows_WT: torch.Tensor) -> dict[int, Seen]:
    """transformers' own model over the windows, and what its routers and experts said."""
    plain = AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.float32, experts_implementation="eager"
    ).eval()
    seen: dict[int, Seen] = {}
    for layer, (_, module) in experts_modules(plain).items():

        def hook(_: Any, inputs: Any, output: torch.Tensor, layer: int = layer) -> None:
            hidden, ids, weights = inputs
            seen[layer] = Seen(hidden.double(), ids, weights.double(), output.double())

        module.register_forward_hook(hook)
    with torch.inference_mode():
        plain(input_ids=windows_WT)
    return seen


@contextmanager
def opened(folder: Path, model: Path) -> Iterator[tuple[OpenModel, Segment]]:
    """The original store of a checkpoint, made in `folder`, ready to run."""
    store = folder / "original"
    if not store.exists():
        compress(model, store, CompressionConfig(recipe="original"), jobs=1)
    source = Segment(store)
    found = open_model(store, source, None, WorkerConfig(device="cpu", dtype="float32"))
    try:
        yield found, source
    finally:
        found.close()
        source.close()


def calibrated(
    folder: Path, model: Path, windows_WT: torch.Tensor, **options: Any
) -> dict[int, LayerStatistics]:
    with opened(folder, model) as (open_, source):
        return collect(open_.runner, source, windows_WT, **options)


def middle(expert: ExpertWeights, activation: Activation, x_PH: torch.Tensor) -> torch.Tensor:
    """act(gate x) * up x in float64."""
    gate = x_PH @ expert.gate.double().T
    up = x_PH @ expert.up.double().T
    if expert.gate_bias is not None and expert.up_bias is not None:
        gate, up = gate + expert.gate_bias.double(), up + expert.up_bias.double()
    return apply_gate(activation, gate, up)


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got.double() - expected).norm() / expected.norm().clamp(min=1e-30))


def check_layer(found: LayerStatistics, seen: Seen, model: Checkpoint, layer: int) -> int:
    """Everything against float64 sums; returns the number of experts that tokens reached."""
    table, tensors = found.table, found.tensors
    tokens, top_k = seen.ids_SK.shape
    assert table.num_tokens == tokens
    assert relative(tensors.pooled, seen.hidden_SH.T @ seen.hidden_SH / tokens) < 1e-5
    sizes_SK = seen.weights_SK.abs()
    order_SK = sizes_SK.argsort(dim=1, descending=True, stable=True)
    ids_SK, sizes_SK = seen.ids_SK.gather(1, order_SK), sizes_SK.gather(1, order_SK)
    skew_K = (sizes_SK / sizes_SK.sum(dim=1, keepdim=True)).mean(dim=0)
    assert table.skew_K == pytest.approx(skew_K.tolist(), rel=1e-5)
    energy = float(seen.output_SH.square().sum(dim=1).mean())
    assert table.output_energy == pytest.approx(energy, rel=1e-4)
    activation = model.model_info.expert.activation
    reached = 0
    for expert in range(table.num_experts):
        weights = model.expert(ExpertKey(layer, expert))
        x_PH = seen.hidden_SH[(seen.ids_SK == expert).any(dim=1)]
        h_PF = middle(weights, activation, x_PH)
        count = x_PH.shape[0]
        reached += count > 0
        assert table.tokens_E[expert] == count
        assert relative(tensors.input_E[expert] * max(count, 1), x_PH.T @ x_PH) < 1e-5
        assert relative(tensors.middle_E[expert] * max(count, 1), h_PF.T @ h_PF) < 1e-5
        for position in range(top_k):
            mine = ids_SK[:, position] == expert
            assert table.use_at_EK[expert][position] == pytest.approx(float(mine.double().mean()))
            weight2 = float(sizes_SK[mine, position].square().sum()) / max(1, int(mine.sum()))
            assert table.weight2_at_EK[expert][position] == pytest.approx(weight2, rel=1e-5)
    return reached


@pytest.mark.parametrize("family", FAMILIES)
def test_statistics_are_those_of_the_plain_model(family: str, tmp_path: Path) -> None:
    model = write_tiny_checkpoint(family, tmp_path / "model", hidden=64, ffn=128, vocab=VOCAB)
    windows_WT = windows()
    seen = watch_plain_model(model, windows_WT)
    found = calibrated(tmp_path, model, windows_WT, alike=True, pass_rows=48)  # two passes
    checkpoint = Checkpoint(model)
    assert found.keys() == seen.keys()
    for layer in found:
        assert check_layer(found[layer], seen[layer], checkpoint, layer) >= 2


class Learnt(NamedTuple):
    """What autograd says of one layer's experts module, float32."""

    hidden_SH: torch.Tensor
    ids_SK: torch.Tensor
    output_SH: torch.Tensor
    gradient_SH: torch.Tensor


def learn_plain_model(model: Path, windows_WT: torch.Tensor, seed: int) -> dict[int, Learnt]:
    """transformers' own model and autograd, for words drawn from what it says itself."""
    plain = AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.float32, experts_implementation="eager"
    ).eval()
    calls: dict[int, Any] = {}
    for layer, (_, module) in experts_modules(plain).items():

        def hook(_: Any, inputs: Any, output: torch.Tensor, layer: int = layer) -> None:
            output.retain_grad()
            calls[layer] = inputs, output

        module.register_forward_hook(hook)
    log_probs_SV = plain(input_ids=windows_WT).logits.flatten(0, 1).log_softmax(dim=1)
    generator = torch.Generator().manual_seed(seed)
    said_S1 = torch.multinomial(log_probs_SV.detach().exp(), 1, generator=generator)
    (-log_probs_SV.gather(1, said_S1).sum()).backward()
    return {
        layer: Learnt(inputs[0].detach(), inputs[1], output.detach(), output.grad)
        for layer, (inputs, output) in calls.items()
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_count_by_their_gradients(family: str, tmp_path: Path) -> None:
    """Gradients through experts, routers and dense layers are autograd's, in every family."""
    model = write_tiny_checkpoint(family, tmp_path / "model", hidden=64, ffn=128, vocab=VOCAB)
    windows_WT = windows()
    learnt = learn_plain_model(model, windows_WT, seed=3)
    found = calibrated(tmp_path, model, windows_WT, seed=3)
    for layer, one in learnt.items():
        nats_S = one.gradient_SH.double().square().mean(dim=1) / 2
        energy_S = one.output_SH.double().square().sum(dim=1)
        assert found[layer].nats == pytest.approx(float((nats_S * energy_S).mean()), rel=1e-3)
        table, tensors = found[layer].table, found[layer].tensors
        x_SH = one.hidden_SH.double()
        pooled = (x_SH * nats_S[:, None]).T @ x_SH / nats_S.sum()
        assert relative(tensors.pooled, pooled) < 1e-3
        mean = float((nats_S * energy_S).sum() / nats_S.sum())
        assert table.output_energy == pytest.approx(mean, rel=1e-3)
        for expert in range(table.num_experts):
            mine_S = (one.ids_SK == expert).any(dim=1)
            if mine_S.any():
                x_PH, nats_P1 = x_SH[mine_S], nats_S[mine_S][:, None]
                moment = (x_PH * nats_P1).T @ x_PH / nats_P1.sum()
                assert relative(tensors.input_E[expert], moment) < 1e-3


def test_nats_are_what_small_errors_cost(tmp_path: Path) -> None:
    """Noise injected into a layer's output costs what the gradients said, to a third: words are
    drawn once per token. No token can change its experts here: there are as many as it uses."""
    model = write_tiny_checkpoint(
        "mixtral", tmp_path / "model", layers=3, experts=2, top_k=2, vocab=VOCAB
    )
    windows_WT = windows(32, 32)
    found = calibrated(tmp_path, model, windows_WT)
    with opened(tmp_path, model) as (open_, _):
        for layer in found:
            nats = divergence(open_.runner, windows_WT, Injection.layer(layer, 0.01))
            assert found[layer].nats == pytest.approx(nats / 0.01, rel=0.33)


def test_a_fine_grained_model_and_experts_that_no_token_reached(tmp_path: Path) -> None:
    """32 experts top-6 and 12 tokens: some experts see nothing of their own, all see the sample."""
    model = write_tiny_checkpoint(
        "qwen2_moe", tmp_path / "model", experts=32, top_k=6, vocab=VOCAB, ffn=64
    )
    windows_WT = windows(1, 6)
    seen = watch_plain_model(model, windows_WT)
    found = calibrated(tmp_path, model, windows_WT, alike=True)
    checkpoint = Checkpoint(model)
    for layer, statistics in found.items():
        reached = check_layer(statistics, seen[layer], checkpoint, layer)
        assert 6 <= reached < 32
        sample_EF, own_E = statistics.tensors.sample_middle_EF, statistics.tensors.middle_E
        unreached = next(e for e in range(32) if statistics.table.tokens_E[e] == 0)
        assert not own_E[unreached].any()
        assert sum(statistics.table.use_at_EK[unreached]) == 0
        # With fewer tokens than the sample takes, the sample is all of them.
        weights = checkpoint.expert(ExpertKey(layer, unreached))
        h_SF = middle(weights, "silu", seen[layer].hidden_SH)
        assert relative(sample_EF[unreached], h_SF.square().mean(dim=0)) < 1e-5


def test_row_weights_are_what_an_error_in_a_row_costs(tmp_path: Path) -> None:
    """A small random error of one expert's rows, predicted from the statistics and measured."""
    model = write_tiny_checkpoint("mixtral", tmp_path / "model", hidden=64, ffn=64, vocab=VOCAB)
    windows_WT = windows(8, 32)
    seen = watch_plain_model(model, windows_WT)
    found = calibrated(tmp_path, model, windows_WT, alike=True)[0].tensors
    expert = Checkpoint(model).expert(ExpertKey(0, 1))
    x_PH = seen[0].hidden_SH[(seen[0].ids_SK == 1).any(dim=1)]
    gate_PF, up_PF = x_PH @ expert.gate.double().T, x_PH @ expert.up.double().T
    plain_PF = apply_gate("silu", gate_PF, up_PF)
    down_HF, step = expert.down.double(), 1e-4
    for row in range(0, 64, 7):
        for name, moved in (
            ("gate_weight_EF", (step, 0.0)),
            ("up_weight_EF", (0.0, step)),
        ):
            # The row's output is off by `step` for every token: what does the output move by?
            change_P = apply_gate("silu", gate_PF[:, row] + moved[0], up_PF[:, row] + moved[1])
            change_P = change_P - plain_PF[:, row]
            cost = change_P.square().mean() * down_HF[:, row].square().sum() / step**2
            assert float(getattr(found, name)[1, row]) == pytest.approx(float(cost), rel=1e-3)


def test_the_error_of_an_expert_is_predicted_without_running_it(tmp_path: Path) -> None:
    """Random errors in all three matrices: the formula of `ExpertStatistics` against the outputs.

    The formula takes slopes and inputs as independent, so it is good to some 10 per cent.
    """
    model = write_tiny_checkpoint("mixtral", tmp_path / "model", hidden=64, ffn=128, vocab=VOCAB)
    windows_WT = windows(8, 32)
    seen = watch_plain_model(model, windows_WT)
    found = calibrated(tmp_path, model, windows_WT, alike=True)[1].tensors
    generator = torch.Generator().manual_seed(0)
    for expert in range(4):
        plain = Checkpoint(model).expert(ExpertKey(1, expert))
        x_PH = seen[1].hidden_SH[(seen[1].ids_SK == expert).any(dim=1)]
        errors = [
            torch.randn(matrix.shape, generator=generator) * 0.02 * matrix.std()
            for matrix in (plain.gate, plain.up, plain.down)
        ]
        matrices = [
            (matrix + error).double()
            for matrix, error in zip((plain.gate, plain.up, plain.down), errors, strict=True)
        ]
        exact = middle(plain, "silu", x_PH) @ plain.down.double().T
        off = apply_gate("silu", x_PH @ matrices[0].T, x_PH @ matrices[1].T) @ matrices[2].T
        measured = float((off - exact).square().sum(dim=1).mean())
        moment_in, moment_mid = Moment(found.input_E[expert]), Moment(found.middle_E[expert])
        predicted = (
            weighted_error(errors[0], moment_in, found.gate_weight_EF[expert])
            + weighted_error(errors[1], moment_in, found.up_weight_EF[expert])
            + weighted_error(errors[2], moment_mid)
        )
        assert predicted == pytest.approx(measured, rel=0.25)


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu", "clamped_swiglu"])
def test_slopes_of_every_activation(activation: Activation) -> None:
    generator = torch.Generator().manual_seed(0)
    gate_FH, up_FH = (torch.randn(32, 16, generator=generator) * 1.5 for _ in range(2))
    expert = ExpertMatrices(gate_FH, up_FH, torch.randn(16, 32, generator=generator), activation)
    x_PH = torch.randn(50, 16, generator=generator)
    with torch.inference_mode():  # as a model runs
        passage = run_expert(expert, x_PH)
    gate, up = x_PH.double() @ gate_FH.double().T, x_PH.double() @ up_FH.double().T
    step = 1e-6
    for got, low, high in (
        (passage.gate_slope_PF, (gate - step, up), (gate + step, up)),
        (passage.up_slope_PF, (gate, up - step), (gate, up + step)),
    ):
        slope = (apply_gate(activation, *high) - apply_gate(activation, *low)) / (2 * step)
        torch.testing.assert_close(got.double(), slope, rtol=1e-4, atol=1e-4)
    assert relative(passage.middle_PF, apply_gate(activation, gate, up)) < 1e-5


def test_block_forms_are_the_blocks_of_the_full_ones(tmp_path: Path) -> None:
    model = write_tiny_checkpoint("mixtral", tmp_path / "model", hidden=128, ffn=192, vocab=VOCAB)
    full = calibrated(tmp_path, model, windows(), forms=FULL)[1].tensors
    blocks = calibrated(tmp_path, model, windows(), forms=BLOCKS)[1].tensors
    assert blocks.input_E.shape == (4, 2, 64, 64)
    assert blocks.middle_E.shape == (4, 3, 64, 64)
    for expert in range(4):
        torch.testing.assert_close(
            blocks.middle_E[expert, 2], full.middle_E[expert, 128:, 128:], rtol=1e-4, atol=1e-6
        )
    torch.testing.assert_close(blocks.pooled[1], full.pooled[64:, 64:], rtol=1e-4, atol=1e-6)


def tensors_of(statistics: LayerStatistics) -> list[torch.Tensor]:
    tensors = statistics.tensors
    return [getattr(tensors, name) for name in tensors.__dataclass_fields__]


def test_a_seed_gives_the_same_sums_and_the_model_back_its_own_experts(tmp_path: Path) -> None:
    model = write_tiny_checkpoint("mixtral", tmp_path / "model", vocab=VOCAB)
    told: list[int] = []
    options = {"sample_rows": 8, "pass_rows": 48, "progress": told.append}
    with opened(tmp_path, model) as (open_, source):
        ids_BT = windows()
        positions = torch.arange(24).expand(4, -1)
        before = open_.runner.forward(ids_BT, positions, None, None).logits
        first, again, other = (
            collect(open_.runner, source, ids_BT, seed=seed, **options)  # type: ignore[arg-type]
            for seed in (5, 5, 6)
        )
        after = open_.runner.forward(ids_BT, positions, None, None).logits
    assert torch.equal(before, after)
    assert told == [48, 48] * 3
    for layer in first:
        assert first[layer].table == again[layer].table
        pairs = zip(tensors_of(first[layer]), tensors_of(again[layer]), strict=True)
        assert all(torch.equal(one, two) for one, two in pairs)
        # Another seed: other words and another sample; the same tokens.
        assert first[layer].nats != other[layer].nats
        sample = first[layer].tensors.sample_middle_EF
        assert not torch.equal(sample, other[layer].tensors.sample_middle_EF)
        assert other[layer].table.tokens_E == first[layer].table.tokens_E
        assert other[layer].table.use_at_EK == first[layer].table.use_at_EK


def test_bad_windows_and_a_broken_model(tmp_path: Path) -> None:
    model = write_tiny_checkpoint("mixtral", tmp_path / "model", vocab=VOCAB)
    with opened(tmp_path, model) as (open_, source):
        for bad in (torch.zeros(0, 8, dtype=torch.int64), torch.zeros(8, dtype=torch.int64)):
            with pytest.raises(ValueError, match="windows: got shape"):
                collect(open_.runner, source, bad)
        collecting = CollectingExperts(source)
        ids, weights = torch.zeros(2, 2, dtype=torch.int64), torch.ones(2, 2)
        with pytest.raises(CheckpointError, match="layer 1: the model's hidden states hold NaN"):
            collecting.run_layer(1, torch.full((2, 64), torch.nan), ids, weights)
