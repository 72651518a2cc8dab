"""Whether tensors wait for the garbage collector: it counts objects, not their bytes, and so runs
late when few objects hold much memory.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def no_tensor_in_a_circle() -> Iterator[None]:
    """All that is let go of inside is freed at once, not when the collector comes by."""
    gc.collect()
    gc.disable()
    try:
        yield
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        found = [each for each in gc.garbage if isinstance(each, torch.Tensor)]
        kinds = sorted({type(each).__name__ for each in gc.garbage})
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
    assert not found, f"{len(found)} tensors are held by a circle of {kinds}"
