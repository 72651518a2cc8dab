"""A model's next-token distributions over windows of text, kept in a file, and others held to them.

Made once by a pass of the original; then each variant costs a read. Knows no store and no text.

Legend: W windows, T tokens of a window, V vocabulary.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import torch

LOG_PROBS, TOP_1 = "log_probs.npy", "top_1.npy"


def reference_bytes(num_windows: int, num_tokens: int, vocab_size: int) -> int:
    """What a reference takes on disk: a float16 per word of the vocabulary, and the first one."""
    return num_windows * num_tokens * (2 * vocab_size + 4)


class Reference:
    """Log-probabilities [W, T, V] float16 in mapped files, read a window at a time.

    float16 rounds a log-probability of -8 by 0.002 at most; against itself, renormalised, that
    leaves a divergence below 1e-6 nats. The likeliest word is kept apart, since rounding makes
    ties. Raises FileNotFoundError when there is no reference in `folder`.
    """

    def __init__(self, folder: Path) -> None:
        self._log_probs = np.load(folder / LOG_PROBS, mmap_mode="r")
        self._top_1 = np.load(folder / TOP_1)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(W, T, V)"""
        num_windows, num_tokens, vocab_size = self._log_probs.shape
        return num_windows, num_tokens, vocab_size

    def log_probs(self, window: int) -> torch.Tensor:
        """[T, V] float32 on CPU; a row's probabilities sum to 1."""
        stored_TV = torch.from_numpy(np.array(self._log_probs[window])).float()
        return stored_TV.log_softmax(dim=1)

    def top_1(self, window: int) -> torch.Tensor:
        """[T] int64: the likeliest next token at each position."""
        return torch.from_numpy(self._top_1[window].astype(np.int64))


class ReferenceWriter:
    """Makes a reference out of a scoring pass: a `WindowObserver` of `gpu_worker/scoring.py`.

    Nothing is in `folder` until `finish`; what another process put there meanwhile stays.
    """

    def __init__(self, folder: Path, shape: tuple[int, int, int]) -> None:
        self._folder = folder
        self._part = folder.with_name(f"{folder.name}.{os.getpid()}.part")
        shutil.rmtree(self._part, ignore_errors=True)
        self._part.mkdir(parents=True)
        self._log_probs = np.lib.format.open_memmap(
            self._part / LOG_PROBS, "w+", dtype=np.float16, shape=shape
        )
        self._top_1 = np.zeros(shape[:2], dtype=np.int32)
        self._seen: set[int] = set()

    def see(self, window: int, log_probs_TV: torch.Tensor) -> None:
        """Keep one window's float32 log-probabilities [T, V]."""
        self._log_probs[window] = log_probs_TV.to("cpu", torch.float16).numpy()
        self._top_1[window] = log_probs_TV.argmax(dim=1).cpu().numpy()
        self._seen.add(window)

    def finish(self) -> Reference:
        """Put the files in place. AssertionError when a window is missing."""
        num_windows = self._top_1.shape[0]
        assert len(self._seen) == num_windows, f"saw {len(self._seen)} of {num_windows} windows"
        self._log_probs.flush()
        np.save(self._part / TOP_1, self._top_1)
        try:
            self._part.rename(self._folder)
        except OSError:
            # The same content was made at the same time; only a whole one is ever there.
            if not (self._folder / TOP_1).is_file():
                raise
            shutil.rmtree(self._part)
        return Reference(self._folder)

    def abandon(self) -> None:
        """Remove what was written; nothing after `finish`."""
        shutil.rmtree(self._part, ignore_errors=True)


class Comparison:
    """Holds a scoring pass to a reference, window by window: a `WindowObserver`.

    KL(reference || model) is the mean over a window's positions, in nats; agreement the share of
    positions where both find the same next token likeliest.
    """

    def __init__(self, reference: Reference) -> None:
        self._reference = reference
        self._kl: dict[int, float] = {}
        self._agreement: dict[int, float] = {}

    def see(self, window: int, log_probs_TV: torch.Tensor) -> None:
        """Compare one window's float32 log-probabilities [T, V], from any device."""
        expected_TV = self._reference.log_probs(window).to(log_probs_TV.device)
        if expected_TV.shape != log_probs_TV.shape:
            raise ValueError(
                f"reference: has windows of [T, V] = {list(expected_TV.shape)}, the model gave "
                f"{list(log_probs_TV.shape)}; is it the same model's?"
            )
        # A row's divergence is 0 or more; rounding may leave it just below.
        kl_T = kl_divergence(expected_TV, log_probs_TV).clamp(min=0)
        same_T = log_probs_TV.argmax(dim=1).cpu() == self._reference.top_1(window)
        self._kl[window] = float(kl_T.mean())
        self._agreement[window] = float(same_T.double().mean())

    @property
    def window_kl(self) -> tuple[float, ...]:
        return tuple(self._kl[window] for window in sorted(self._kl))

    @property
    def window_agreement(self) -> tuple[float, ...]:
        return tuple(self._agreement[window] for window in sorted(self._agreement))


def kl_divergence(expected_TV: torch.Tensor, found_TV: torch.Tensor) -> torch.Tensor:
    """[T] nats: KL(expected || found) of rows of log-probabilities."""
    return (expected_TV.exp() * (expected_TV - found_TV)).sum(dim=1)
