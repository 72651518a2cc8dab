"""Goal: routers start out different by domain, training learns, and a stopped run goes on.

Method: made-up domains that differ plainly; the training loop on a small base, some steps.
"""

from __future__ import annotations

import lzma
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from smol_base import EXPERTS, FFN, tiny_base
from transformers import AutoTokenizer

from models import MIXTRAL_MINI
from models.smol import train as training
from models.smol.checks import measure, rounded, variation
from models.smol.corpus import Domain, even_windows, random_windows, read_domains
from models.smol.deltas import read_deltas
from models.smol.forward import TrainingModel, route
from models.smol.routers import FIRST_WEIGHT, first_router

WORDS = {"sea": "the wave and the deep sea ", "law": "a law of the house shall be ", "12": "1 2 3 "}


@pytest.fixture
def domains() -> list[Domain]:
    tokenizer = AutoTokenizer.from_pretrained(MIXTRAL_MINI)
    return [
        Domain(name, np.array(tokenizer(text * 400).input_ids, dtype=np.int64))
        for name, text in WORDS.items()
    ]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("WINDOW", 24), ("RANK", 2), ("SAMPLE_WINDOWS", 4), ("WARM_UP_STEPS", 2)):
        monkeypatch.setattr(training, name, value)


def arguments(out: Path, steps: int) -> Namespace:
    return Namespace(
        out=out, steps=steps, minutes=0.0, per_domain=2, rate=2e-2, save_minutes=0.0, seed=3
    )


def run(out: Path, steps: int, domains: list[Domain]) -> training.Run:
    model = TrainingModel(tiny_base(), torch.float32)
    args = arguments(out, steps)
    started = training.start(model, domains, FFN, args)
    training.train(model, started, domains, domains, args)
    return started


def test_first_routers_send_domains_to_different_experts() -> None:
    generator = torch.Generator().manual_seed(0)
    domain_T = torch.arange(6).repeat_interleave(200)
    means = torch.randn(6, 64, generator=generator)
    # As real FFN inputs: a large part that all have in common, and noise as large as what differs.
    inputs = means[domain_T] + torch.randn(1200, 64, generator=generator) + 2.0
    router = first_router(inputs, domain_T, EXPERTS, seed=1)
    assert torch.equal(router, first_router(inputs, domain_T, EXPERTS, seed=1))
    routing = route(inputs, router)
    assert float(routing.weights[:, 0].mean()) == pytest.approx(FIRST_WEIGHT, abs=0.01)
    first = torch.stack(
        [
            torch.bincount(routing.chosen[domain_T == d, 0], minlength=EXPERTS) / 200
            for d in range(6)
        ]
    )
    share = first.mean(0)
    assert share.min() > 0.1
    assert share.max() < 0.55, "three domains at most share an expert"
    assert float(variation(first[:, None])) > 0.5


def test_variation_is_none_for_equal_use_and_one_for_disjoint_use() -> None:
    equal = torch.full((3, 1, EXPERTS), 1 / EXPERTS)
    disjoint = torch.eye(EXPERTS)[:3, None]
    assert variation(equal).tolist() == [0.0]
    assert variation(disjoint).tolist() == [1.0]


@pytest.mark.usefixtures("small")
def test_training_lowers_the_loss_and_only_by_the_deltas(
    tmp_path: Path, domains: list[Domain]
) -> None:
    model = TrainingModel(tiny_base(), torch.float32)
    windows = even_windows(domains[0], 4, 24)
    dense = training.mean_nats(model, None, windows)
    done = run(tmp_path, 12, domains)
    # A base of random weights knows nothing: its deltas alone learn which words there are.
    assert training.mean_nats(model, done.layers, windows) < dense - 0.5
    stored = [rounded(layer) for layer in read_deltas(tmp_path / "deltas.safetensors")]
    assert training.mean_nats(model, stored, windows) < dense - 0.5
    assert done.step == 12
    assert set(done.log[-1]["nats"]) == set(WORDS)


@pytest.mark.usefixtures("small")
def test_a_run_that_was_stopped_goes_on_as_if_it_was_not(
    tmp_path: Path, domains: list[Domain], monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path / "whole", 4, domains)
    save, saves = training.save, []

    def stop_after_two(*args: object) -> None:
        save(*args)  # type: ignore[arg-type]
        saves.append(1)
        if len(saves) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(training, "save", stop_after_two)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "halves", 4, domains)
    assert run(tmp_path / "halves", 4, domains).step == 4
    whole, halves = (tmp_path / name / "deltas.safetensors" for name in ("whole", "halves"))
    for one, other in zip(read_deltas(whole), read_deltas(halves), strict=True):
        for (name, found), (_, expected) in zip(one.tensors(), other.tensors(), strict=True):
            torch.testing.assert_close(
                found.float(), expected.float(), rtol=2e-2, atol=1e-4, msg=name
            )


@pytest.mark.usefixtures("small")
def test_the_report_compares_with_the_dense_model(tmp_path: Path, domains: list[Domain]) -> None:
    training.start(TrainingModel(tiny_base()), domains, FFN, arguments(tmp_path, 1))
    layers = [rounded(layer) for layer in read_deltas(tmp_path / "deltas.safetensors")]
    report = measure(TrainingModel(tiny_base(), torch.float32), layers, domains, windows=2)
    for row in report["domains"].values():
        assert abs(row["more_nats"]) < 1e-4, "deltas that change nothing"
    assert sum(report["router_weights"]) == pytest.approx(1.0, abs=2e-3)
    assert report["nats_lost"]["without_second_rescaled"] == pytest.approx(0.0, abs=1e-3)


def test_domains_are_files_of_documents(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(MIXTRAL_MINI)
    with lzma.open(tmp_path / "sea.txt.xz", "wt") as file:
        file.write("a wave\fa deep sea\f\f")
    (tmp_path / "law.txt").write_text("x" * 30_000)
    law, sea = read_domains(tmp_path, tokenizer, 1, 10_000, seed=0)
    assert (law.name, sea.name) == ("law", "sea")
    documents = {"a wave", "a deep sea"}
    parts = tokenizer.decode(sea.tokens.tolist(), skip_special_tokens=False).split("</s>")
    assert set(parts) == documents | {""}
    assert sum(token == 1 for token in law.tokens) == 2, "two slices of 8000 characters"
    windows = random_windows([law], 3, 16, np.random.default_rng(0))
    assert windows.shape == (3, 17)
    with pytest.raises(ValueError, match="expected one file of text per domain"):
        read_domains(tmp_path / "none", tokenizer, 1, 10, seed=0)
