"""Goal: dense parameters have the dtype that was asked for, whatever transformers' loader did.

Method: call the quantizer's two hooks around a loader that leaves parameters in other dtypes, as
transformers 5.17 does with those it renames.
"""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from gpu_worker.model import MoetierConfig, MoetierQuantizer
from tests.tiny_checkpoints import tiny_config

ROUTER, NORM = "model.layers.0.mlp.gate.weight", "model.norm.weight"


@pytest.mark.parametrize("kept", [None, ["norm"]])
def test_parameters_get_the_asked_dtype_except_those_kept_in_float32(
    kept: list[str] | None,
) -> None:
    model = AutoModelForCausalLM.from_config(tiny_config("mixtral"), dtype=torch.bfloat16)
    model._keep_in_fp32_modules = kept
    quantizer = MoetierQuantizer(MoetierConfig())
    quantizer._process_model_before_weight_loading(model)
    parameters = dict(model.named_parameters())
    for name in (ROUTER, NORM):
        parameters[name].data = parameters[name].data.float()
    before = parameters[ROUTER].data.clone()
    quantizer._process_model_after_weight_loading(model)
    assert parameters[ROUTER].dtype == torch.bfloat16
    assert torch.equal(parameters[ROUTER].data, before.bfloat16())
    assert parameters[NORM].dtype == (torch.float32 if kept else torch.bfloat16)
    others = {p.dtype for name, p in parameters.items() if name not in (ROUTER, NORM)}
    assert others == {torch.bfloat16}
