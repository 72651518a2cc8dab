"""A progress bar on stderr while a store is made. Knows no recipe."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from tqdm import tqdm

if TYPE_CHECKING:
    from expert_store.compress import Progress


@contextmanager
def store_progress() -> Iterator[Callable[[Progress], None]]:
    """A callback for `compress`: a bar per stage with the time that remains, on a terminal."""
    bars: dict[str, tqdm[None]] = {}

    def show(progress: Progress) -> None:
        if progress.stage not in bars:
            # disable=None is tqdm's word for "only on a terminal".
            bars[progress.stage] = tqdm(
                total=progress.total,
                desc=progress.stage,
                unit="expert",
                file=sys.stderr,
                disable=None,
                leave=False,
            )
        bar = bars[progress.stage]
        bar.update(progress.done - bar.n)
        if progress.done == progress.total:
            bar.close()

    try:
        yield show
    finally:
        for bar in bars.values():
            bar.close()
