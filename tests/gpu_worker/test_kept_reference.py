"""Goal: divergence and agreement are the textbook's, 0 and 1 against oneself, and files are whole
or absent.

Method: random and peaked distributions against float64 arithmetic; a writer that is left half way,
and two writers of the same reference.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gpu_worker.model import ModelRunner
from gpu_worker.reference import (
    Comparison,
    Reference,
    ReferenceWriter,
    kl_divergence,
    reference_bytes,
)
from gpu_worker.scoring import cut_windows, score_windows
from tests.gpu_worker.plain_engine import OwnExperts, mini_model, mini_tokenizer

SHAPE = (3, 7, 500)


def windows(seed: int, sharpness: float = 4.0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = sharpness * torch.randn(SHAPE, generator=generator)
    return list(logits.log_softmax(dim=2))


def written(folder: Path, all_windows: list[torch.Tensor]) -> Reference:
    writer = ReferenceWriter(folder, SHAPE)
    for number, log_probs in enumerate(all_windows):
        writer.see(number, log_probs)
    return writer.finish()


def compared(reference: Reference, all_windows: list[torch.Tensor]) -> Comparison:
    comparison = Comparison(reference)
    for number, log_probs in enumerate(all_windows):
        comparison.see(number, log_probs)
    return comparison


@pytest.mark.parametrize("sharpness", [0.1, 1.0, 4.0, 30.0])
def test_against_itself_divergence_is_0_and_agreement_1(tmp_path: Path, sharpness: float) -> None:
    own = windows(0, sharpness)
    comparison = compared(written(tmp_path / "r", own), own)
    assert all(0 <= kl < 1e-6 for kl in comparison.window_kl)
    assert comparison.window_agreement == (1.0, 1.0, 1.0)


def test_divergence_is_the_textbook_s(tmp_path: Path) -> None:
    expected, found = windows(1), windows(2)
    comparison = compared(written(tmp_path / "r", expected), found)
    for number in range(3):
        p, q = expected[number].double().exp(), found[number].double().exp()
        kl = float((p * (p / q).log()).sum(dim=1).mean())
        assert comparison.window_kl[number] == pytest.approx(kl, rel=1e-3)
        same = (p.argmax(dim=1) == q.argmax(dim=1)).double().mean()
        assert comparison.window_agreement[number] == pytest.approx(float(same))


def test_divergence_is_never_negative_and_not_symmetric(tmp_path: Path) -> None:
    reference = written(tmp_path / "r", windows(3))
    for seed in range(4, 12):
        nearly = [
            (log_probs + 1e-4 * torch.randn(SHAPE[1:])).log_softmax(dim=1)
            for log_probs in windows(3)
        ]
        assert all(0 <= kl < 1e-6 for kl in compared(reference, nearly).window_kl)
        assert all(kl > 0.1 for kl in compared(reference, windows(seed)).window_kl)
    flat, sharp = windows(0, 0.5)[0], windows(0, 5.0)[0]
    assert not torch.allclose(kl_divergence(flat, sharp), kl_divergence(sharp, flat), rtol=0.1)


def test_a_tie_after_rounding_is_no_disagreement(tmp_path: Path) -> None:
    """Two words whose probabilities differ by less than float16 shows."""
    log_probs = torch.full(SHAPE[1:], -20.0)
    log_probs[:, 3], log_probs[:, 9] = -0.69316, -0.69314
    own = [log_probs.log_softmax(dim=1)] * 3
    assert own[0].half()[0, 3] == own[0].half()[0, 9]
    assert compared(written(tmp_path / "r", own), own).window_agreement == (1.0, 1.0, 1.0)


def test_what_is_not_finished_is_not_there(tmp_path: Path) -> None:
    writer = ReferenceWriter(tmp_path / "r", SHAPE)
    writer.see(0, windows(0)[0])
    with pytest.raises(AssertionError, match="saw 1 of 3 windows"):
        writer.finish()
    with pytest.raises(FileNotFoundError):
        Reference(tmp_path / "r")
    writer.abandon()
    assert list(tmp_path.iterdir()) == []


def test_of_two_writers_the_first_stays_and_nothing_is_left_over(tmp_path: Path) -> None:
    late = ReferenceWriter(tmp_path / "r", SHAPE)
    late._part = late._part.rename(tmp_path / "another process")
    first = written(tmp_path / "r", windows(0))
    for number, log_probs in enumerate(windows(0)):
        late.see(number, log_probs)
    assert torch.equal(late.finish().log_probs(1), first.log_probs(1))
    assert [path.name for path in tmp_path.iterdir()] == ["r"]


def test_size_is_foretold(tmp_path: Path) -> None:
    written(tmp_path / "r", windows(0))
    size = sum(file.stat().st_size for file in (tmp_path / "r").iterdir())
    assert reference_bytes(*SHAPE) <= size <= reference_bytes(*SHAPE) + 512


def test_another_vocabulary_is_refused(tmp_path: Path) -> None:
    reference = written(tmp_path / "r", windows(0))
    with pytest.raises(ValueError, match=r"\[7, 500\], the model gave \[7, 499\]"):
        Comparison(reference).see(0, torch.zeros(7, 499))


def test_a_scoring_pass_makes_it_and_is_held_to_it(tmp_path: Path) -> None:
    runner = ModelRunner(mini_model(), OwnExperts())
    text = "The committee met on the first day of the month, and the chairman spoke. " * 20
    cut = cut_windows(mini_tokenizer().encode(text), num_windows=3, window_tokens=16)
    writer = ReferenceWriter(tmp_path / "r", (3, 16, 8192))
    made = score_windows(runner, cut, batch=2, observers=[writer])
    comparison = Comparison(writer.finish())
    again = score_windows(runner, cut, batch=1, observers=[comparison])
    assert again.window_nats == pytest.approx(made.window_nats, rel=1e-5)
    assert max(comparison.window_kl) < 1e-6
    assert comparison.window_agreement == (1.0, 1.0, 1.0)
