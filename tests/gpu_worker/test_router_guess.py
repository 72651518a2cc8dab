"""Goal: the next layer's routing is guessed from this layer's input, by the next layer's own
router, in every family, and far better than by chance on a trained model.

Method: taps on the routers of tiny models and of the bundled one on text.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from cluster.texts import read_texts
from expert_store.families import experts_modules
from gpu_worker.router_guess import RouterGuess
from models import MIXTRAL_MINI
from tests.tiny_checkpoints import FAMILIES, tiny_config, write_tiny_checkpoint


@contextmanager
def tapped(model: Any) -> Iterator[dict[int, tuple[torch.Tensor, torch.Tensor]]]:
    """What the experts of each layer are given in a pass: hidden states and the router's choice."""
    seen: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def tap(layer: int) -> Any:
        def keep(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden, ids = [*args, *kwargs.values()][:2]
            seen[layer] = (hidden.reshape(-1, hidden.shape[-1]), ids)

        return keep

    handles = [
        module.register_forward_pre_hook(tap(layer), with_kwargs=True)
        for layer, (_, module) in experts_modules(model).items()
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("family", FAMILIES)
def test_told_what_the_next_router_reads_it_chooses_as_that_does(
    family: str, tmp_path: Path
) -> None:
    folder = write_tiny_checkpoint(family, tmp_path, layers=3, dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("post_attention_layernorm.weight"):
            parameter.data.fill_(1.0)
    guess = RouterGuess.of(model, model.config.num_experts_per_tok)
    assert guess is not None
    with tapped(model) as seen, torch.inference_mode():
        model(input_ids=torch.arange(60).reshape(2, 30))
    layers = sorted(seen)
    assert guess.guess(layers[-1], seen[layers[-1]][0]) is None
    for layer, following in zip(layers, layers[1:], strict=False):
        hidden, ids = seen[following]
        said = guess.guess(layer, hidden)
        assert said is not None
        assert said.layer == following
        assert torch.equal(said.topk_ids_SK.sort(dim=1).values, ids.long().sort(dim=1).values)
        assert said.topk_weights_SK.shape == ids.shape


def test_on_real_text_most_pairs_are_guessed_right() -> None:
    model = AutoModelForCausalLM.from_pretrained(MIXTRAL_MINI, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(MIXTRAL_MINI)
    ids = tokenizer.encode(read_texts([])[0].text)[:256]
    guess = RouterGuess.of(model, model.config.num_experts_per_tok)
    assert guess is not None
    with tapped(model) as seen, torch.inference_mode():
        model(input_ids=torch.tensor([ids]))
    hits = []
    for layer in sorted(seen)[:-1]:
        said = guess.guess(layer, seen[layer][0])
        assert said is not None
        chosen_SK = seen[said.layer][1].long()
        right_SK = (chosen_SK[:, :, None] == said.topk_ids_SK[:, None, :]).any(dim=2)
        hits.append(float(right_SK.float().mean()))
    # Two of eight by chance are a quarter.
    assert sum(hits) / len(hits) > 0.6, hits


def test_a_model_without_such_routers_is_not_guessed() -> None:
    model = AutoModelForCausalLM.from_config(tiny_config("mixtral"))
    for _, (path, _) in experts_modules(model).items():
        block = model.get_submodule(path.rpartition(".")[0])
        block.gate = torch.nn.Identity()
    assert RouterGuess.of(model, 2) is None
