"""Goal: a fitted router is the ridge regression's answer, helps where the hidden states are off and
changes nothing where they are not.

Method: the closed form against a solver of least squares; a tiny model against its own 2-bit store.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import torch

from expert_store.compress import compress
from expert_store.config import CompressionConfig
from expert_store.segment import Segment
from gpu_worker.build import open_model
from gpu_worker.config import WorkerConfig
from gpu_worker.model import ModelRunner
from gpu_worker.recalibrate import (
    Sums,
    agreement,
    fit_router,
    mean_agreement,
    recalibrate,
    routers_of,
)
from gpu_worker.replay import RoutingTrace, recorded
from gpu_worker.scoring import score_windows
from tests.tiny_checkpoints import write_tiny_checkpoint

WINDOWS = torch.randint(0, 128, (48, 33), generator=torch.Generator().manual_seed(0))
FAMILIES = ("mixtral", "qwen2_moe")


@pytest.fixture(scope="module", params=FAMILIES)
def stores(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model's stores, "original" and "static" 2 bits."""
    folder = tmp_path_factory.mktemp(request.param)
    model = write_tiny_checkpoint(
        request.param, folder / "model", layers=3, initializer_range=0.2, experts=8
    )
    for recipe in ("original", "static"):
        compress(model, folder / recipe, CompressionConfig(recipe=recipe), jobs=1)
    return folder


@contextmanager
def running(*stores: Path) -> Iterator[list[ModelRunner]]:
    with ExitStack() as stack:
        runners = []
        for store in stores:
            source = Segment(store)
            stack.callback(source.close)
            opened = open_model(
                store,
                source,
                None,
                WorkerConfig(device="cpu", dtype="float32", cache_bytes=1 << 24),
            )
            stack.callback(opened.close)
            runners.append(opened.runner)
        yield runners


def trace(runner: ModelRunner) -> RoutingTrace:
    with recorded(runner) as recorder:
        score_windows(runner, WINDOWS)
    return recorder.trace(WINDOWS.shape[1] - 1)


def random_sums(seed: int, weight_EH: torch.Tensor, rows: int = 200) -> Sums:
    generator = torch.Generator().manual_seed(seed)
    inputs_SH = torch.randn(rows, weight_EH.shape[1], generator=generator)
    noise_SE = torch.randn(rows, weight_EH.shape[0], generator=generator)
    true_EH = torch.randn(weight_EH.shape, generator=torch.Generator().manual_seed(9))
    return Sums.of(inputs_SH, inputs_SH @ (true_EH - weight_EH).T + 0.1 * noise_SE)


def test_the_fit_is_ridge_regression_towards_the_old_router() -> None:
    generator = torch.Generator().manual_seed(1)
    weight_EH = torch.randn(4, 16, generator=generator)
    inputs_SH = torch.randn(300, 16, generator=generator)
    logits_SE = torch.randn(300, 4, generator=generator)
    sums = Sums.of(inputs_SH, logits_SE - inputs_SH @ weight_EH.T)
    unit = float(inputs_SH.square().sum(dim=0).mean())
    for ridge in (1e-3, 0.5):
        fit = fit_router(0, weight_EH, sums, sums, ridges=(ridge,), dtype=torch.float32)
        root = (ridge * unit) ** 0.5
        rows = torch.cat([inputs_SH, root * torch.eye(16)])
        wanted = torch.cat([logits_SE, root * weight_EH.T])
        expected_HE = torch.linalg.lstsq(rows, wanted).solution
        torch.testing.assert_close(fit.weight_EH, expected_HE.T, rtol=1e-4, atol=1e-4)
        found = float((logits_SE - inputs_SH @ fit.weight_EH.T).square().mean())
        assert fit.error_after == pytest.approx(found, rel=1e-4)
        assert fit.error_after < fit.error_before


def test_an_endless_ridge_gives_the_old_router() -> None:
    weight_EH = torch.randn(4, 16, generator=torch.Generator().manual_seed(1))
    sums = random_sums(2, weight_EH)
    kept = fit_router(0, weight_EH, sums, sums, ridges=(math.inf,), dtype=torch.float32)
    assert torch.equal(kept.weight_EH, weight_EH)
    near = fit_router(0, weight_EH, sums, sums, ridges=(1e9,), dtype=torch.float32)
    torch.testing.assert_close(near.weight_EH, weight_EH, rtol=0, atol=1e-5)


def test_the_ridge_is_chosen_on_held_out_rows() -> None:
    """Residuals that are noise on few rows: a loose fit is worse on other rows, and is refused."""
    weight_EH = torch.zeros(4, 64)
    generator = torch.Generator().manual_seed(3)

    def noise(rows: int) -> Sums:
        return Sums.of(
            torch.randn(rows, 64, generator=generator), torch.randn(rows, 4, generator=generator)
        )

    fitted, held_out = noise(40), noise(400)
    fit = fit_router(0, weight_EH, fitted, held_out, dtype=torch.float32)
    assert fit.error_after <= fit.error_before
    assert fit.ridge >= 3
    loose = fit_router(0, weight_EH, fitted, fitted, ridges=(0.001,), dtype=torch.float32)
    assert held_out.error(loose.weight_EH) > 1.5 * fit.error_before


def test_a_store_of_the_original_keeps_its_routers(stores: Path) -> None:
    with running(stores / "original", stores / "original") as (original, same):
        before = {layer: router.weight.clone() for layer, router in routers_of(same.model).items()}
        fits = recalibrate(original, same, WINDOWS[:, :-1])
        assert [fit.layer for fit in fits] == sorted(before)
        for fit in fits:
            assert fit.moved < 1e-5
            torch.testing.assert_close(
                routers_of(same.model)[fit.layer].weight, before[fit.layer], rtol=0, atol=1e-5
            )


@pytest.mark.parametrize("order", ["together", "in_turn"])
def test_a_quantised_store_routes_more_like_the_original(stores: Path, order: str) -> None:
    told: list[int] = []
    with running(stores / "original", stores / "static") as (original, quantized):
        truth = trace(original)
        before = agreement(truth, trace(quantized))
        fits = recalibrate(
            original,
            quantized,
            WINDOWS[:, :-1],
            dtype=torch.float32,
            order=order,  # type: ignore[arg-type]
            progress=told.append,
        )
        after = agreement(truth, trace(quantized))
    assert before[0].same_set == after[0].same_set == 1, "no expert runs before the first router"
    assert fits[0].ridge == math.inf
    assert any(fit.moved > 0.01 for fit in fits[1:])
    for fit in fits:
        assert fit.error_after <= fit.error_before
    old, new = mean_agreement(before), mean_agreement(after)
    assert old.same_set < 0.99
    assert new.same_set > old.same_set
    assert new.same_top_1 >= old.same_top_1 - 0.01
    passes = 2 if order == "together" else 1 + len(fits)
    assert sum(told) == passes * WINDOWS[:, :-1].numel()


def test_families_with_other_routers_and_a_lone_window_are_refused(
    stores: Path, tmp_path: Path
) -> None:
    model = write_tiny_checkpoint("deepseek_v2", tmp_path / "model")
    compress(model, tmp_path / "store", CompressionConfig(recipe="original"), jobs=1)
    with running(tmp_path / "store") as (runner,):
        with pytest.raises(ValueError, match="routers of deepseek_v2 cannot be recalibrated"):
            recalibrate(runner, runner, WINDOWS)
        with pytest.raises(ValueError, match="at least 2"):
            recalibrate(runner, runner, WINDOWS[:1])


def test_traces_of_other_windows_are_not_compared(stores: Path) -> None:
    with running(stores / "original") as (runner,):
        mine = trace(runner)
        with recorded(runner) as recorder:
            score_windows(runner, WINDOWS.flip(0))
        with pytest.raises(ValueError, match="same windows"):
            agreement(mine, recorder.trace(WINDOWS.shape[1] - 1))
        whole = agreement(mine, mine)
        assert mean_agreement(whole).same_set == 1
