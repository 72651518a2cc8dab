"""Where the Triton tests run: under the interpreter, or with TRITON_INTERPRET=0 compiled on a GPU.

Importing this skips the module that does where Triton, or the GPU that was asked for, is missing.
"""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed on this platform", allow_module_level=True)

COMPILED = os.environ["TRITON_INTERPRET"] == "0"
DEVICE = "cuda" if COMPILED else "cpu"
if COMPILED and not torch.cuda.is_available():
    pytest.skip("TRITON_INTERPRET=0 needs a GPU, there is none", allow_module_level=True)


@pytest.fixture
def poisoned_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory is NaN, so that an element no program writes is seen."""
    original = torch.Tensor.new_empty

    def new_empty(self: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        fresh = original(self, *args, **kwargs)
        return fresh.fill_(float("nan")) if fresh.is_floating_point() else fresh

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
