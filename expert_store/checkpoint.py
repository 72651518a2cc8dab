"""A checkpoint of any supported family, read one expert at a time in canonical [out, in] form.

transformers' own conversion mapping says which keys make up which expert; its internals are not
public API, so tests cover every family. Holds headers only, never more than the expert asked for.

Legend: E experts, H hidden, F ffn.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    rename_source_key,
)

from expert_store.errors import CheckpointError
from expert_store.families import (
    check_model_type,
    expert_shape,
    experts_modules,
    load_config,
    meta_model,
    top_k_of,
)
from expert_store.shards import StoredTensor, open_shards
from expert_store.sources import model_name
from expert_store.types import ExpertKey, ExpertWeights, ModelInfo
from kernels.types import GROUP_SIZE

_EXPERT = re.compile(r"\.experts\.(\d+)\.")
_ROUTED = re.compile(r"\.experts\.")
_EXPERT_TYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


@dataclass(frozen=True, slots=True)
class _Parameter:
    """How one parameter of an experts module is put together from the checkpoint's tensors."""

    converter: WeightConverter | None  # None: one fused tensor with experts along dimension 0
    fused: StoredTensor | None
    parts: dict[int, dict[str, StoredTensor]] = field(default_factory=dict)  # expert -> pattern ->


class Checkpoint:
    """A local checkpoint folder. Thread-safe to read from.

    Raises CheckpointError at once for an unknown family, a quantised checkpoint, broken shards and
    missing or extra experts; no weight is read before `expert` or `dense` asks for it.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.config = _load_config(self.path)
        tensors = open_shards(self.path)
        self._model = meta_model(self.config)
        self._modules = experts_modules(self._model)
        if not self._modules:
            raise CheckpointError(
                f"{self.path}/config.json: has no MoE layer, expected one or more"
            )
        first = next(iter(self._modules.values())).module
        self._shape = expert_shape(self.config, first)
        self._dense: dict[str, StoredTensor] = {}
        self._parameters: dict[str, _Parameter] = {}
        self._index(tensors)
        for layer, (module_path, module) in self._modules.items():
            self._check_experts(layer, module_path, module)
        self._check_dense()
        self._check_sizes()

    @property
    def model_info(self) -> ModelInfo:
        config = self.config
        return ModelInfo(
            name=model_name(self.path),
            model_type=config.model_type,
            num_layers=config.num_hidden_layers,
            top_k=top_k_of(config),
            vocab_size=config.vocab_size,
            max_positions=config.max_position_embeddings,
            expert=self._shape,
            moe_layers={layer: module.path for layer, module in self._modules.items()},
            num_experts={
                layer: int(module.module.num_experts) for layer, module in self._modules.items()
            },
        )

    @property
    def keys(self) -> list[ExpertKey]:
        """All routed experts, in order of layer and expert."""
        counts = self.model_info.num_experts
        return [ExpertKey(layer, i) for layer, count in counts.items() for i in range(count)]

    @property
    def dense(self) -> dict[str, StoredTensor]:
        """Everything that is not a routed expert, under its name in the checkpoint."""
        return dict(self._dense)

    def experts(self) -> Iterator[ExpertWeights]:
        """Every expert in order, read as it is asked for."""
        return (self.expert(key) for key in self.keys)

    def expert(self, key: ExpertKey) -> ExpertWeights:
        """Read one expert: float32, [out, in]. Raises CheckpointError; KeyError for no such key."""
        module_path, module = self._modules[key.layer]
        if not 0 <= key.expert < module.num_experts:
            raise KeyError(str(key))
        values = {
            name: self._read_parameter(f"{module_path}.{name}", key)
            for name in _parameter_names(module)
        }
        gate, up = _split_gate_up(values["gate_up_proj"], module, out_dim=-2)
        down = values["down_proj"]
        biases: dict[str, torch.Tensor] = {}
        if module.has_bias:
            gate_bias, up_bias = _split_gate_up(values["gate_up_proj_bias"], module, out_dim=-1)
            biases = {
                "gate_bias": gate_bias.float().contiguous(),
                "up_bias": up_bias.float().contiguous(),
                "down_bias": values["down_proj_bias"].float(),
            }
        return ExpertWeights(
            key,
            gate=gate.float().contiguous(),
            up=up.float().contiguous(),
            down=(down.T if module.is_transposed else down).float().contiguous(),
            **biases,
        )

    def _read_parameter(self, target: str, key: ExpertKey) -> torch.Tensor:
        parameter = self._parameters[target]
        if parameter.fused is not None:
            return parameter.fused.read(key.expert)
        # transformers' converter, given this expert's tensors only, joins them as it would all.
        converter = deepcopy(parameter.converter)
        assert converter is not None
        for pattern, stored in parameter.parts[key.expert].items():
            converter.add_tensor(target, stored.entry.name, pattern, stored.read)
        joined = converter.convert(target)[target]
        return (joined[0] if isinstance(joined, list) else joined)[0]

    def _index(self, tensors: dict[str, StoredTensor]) -> None:
        """Sort every key of the checkpoint into expert parameters and dense tensors."""
        mapping = get_model_conversion_mapping(self._model)
        renamings = [item for item in mapping if isinstance(item, WeightRenaming)]
        converters = [item for item in mapping if isinstance(item, WeightConverter)]
        by_pattern = {pattern: item for item in converters for pattern in item.source_patterns}
        ignored = self._model._keys_to_ignore_on_load_unexpected or ()
        module_paths = {module.path for module in self._modules.values()}
        names = self._model.state_dict()
        prefix = self._model.base_model_prefix
        self._dense_targets = set()
        for name, stored in tensors.items():
            target, pattern = rename_source_key(name, renamings, converters, prefix, names)
            if target.rpartition(".")[0] not in module_paths:
                if any(re.search(item, name) for item in ignored):
                    continue  # what the model itself leaves out, such as extra prediction layers
                if _ROUTED.search(target):
                    raise CheckpointError(
                        f"{self.path}: extra expert: tensor {name!r} belongs to no MoE layer of "
                        f"this model, which has layers {sorted(self._modules)}; config.json and "
                        "weights do not belong together"
                    )
                self._dense[name] = stored
                self._dense_targets.add(target)
                continue
            _check_type(stored)
            converter = by_pattern.get(pattern)
            if converter is None:
                self._parameters[target] = _Parameter(None, stored)
                continue
            match = _EXPERT.search(name)
            assert match is not None, f"{name!r} needs conversion but names no expert"
            parameter = self._parameters.setdefault(target, _Parameter(converter, None))
            parameter.parts.setdefault(int(match.group(1)), {})[pattern] = stored

    def _check_experts(self, layer: int, module_path: str, module: torch.nn.Module) -> None:
        expected = set(range(module.num_experts))
        for name in _parameter_names(module):
            parameter = self._parameters.get(f"{module_path}.{name}")
            where = f"{self.path}: layer {layer}: {name}"
            if parameter is None:
                raise CheckpointError(
                    f"{where}: missing experts: expected {len(expected)}, got none; the checkpoint "
                    "is incomplete: download it again"
                )
            shape = tuple(getattr(module, name).shape)
            if parameter.fused is not None:
                if parameter.fused.entry.shape != shape:
                    raise CheckpointError(
                        f"{where}: expected shape {list(shape)} (missing or extra experts if the "
                        f"first size differs), got {list(parameter.fused.entry.shape)}"
                    )
                continue
            found = set(parameter.parts)
            for problem, experts in (("missing", expected - found), ("extra", found - expected)):
                if experts:
                    raise CheckpointError(
                        f"{where}: {problem} expert {min(experts)}: expected experts 0 to "
                        f"{len(expected) - 1}, got {len(found)} of them; config.json and weights "
                        "do not belong together, or the download is incomplete"
                    )
            assert parameter.converter is not None
            for expert, parts in parameter.parts.items():
                absent = [p for p in parameter.converter.source_patterns if p not in parts]
                if absent:
                    raise CheckpointError(
                        f"{where}: missing tensor of expert {expert} ({absent[0]}); the checkpoint "
                        "is incomplete: download it again"
                    )

    def _check_dense(self) -> None:
        in_experts = {
            f"{path}.{name}"
            for path, module in self._modules.values()
            for name in _parameter_names(module)
        }
        tied = self._model.all_tied_weights_keys if self.config.tie_word_embeddings else {}
        expected = self._model.state_dict().keys() - in_experts - set(tied)
        if absent := sorted(expected - self._dense_targets):
            raise CheckpointError(
                f"{self.path}: {len(absent)} tensors are missing, first {absent[0]!r}; the "
                "checkpoint is incomplete: download it again"
            )

    def _check_sizes(self) -> None:
        for name, size in (("hidden", self._shape.hidden), ("ffn", self._shape.ffn)):
            if size < GROUP_SIZE or size % GROUP_SIZE:
                raise CheckpointError(
                    f"{self.path}: {name} size of the experts is {size}, expected a multiple of "
                    f"the group size {GROUP_SIZE}; this model cannot be compressed"
                )


def _check_type(stored: StoredTensor) -> None:
    """Integers and fp8 are codes of weights: without their scales they would pass for weights."""
    entry = stored.entry
    if entry.dtype not in _EXPERT_TYPES:
        raise CheckpointError(
            f"{stored.path}: tensor {entry.name!r} of a routed expert has type {entry.dtype}, "
            f"expected one of {', '.join(_EXPERT_TYPES.values())}; give the original checkpoint, "
            "or convert this one"
        )


def _parameter_names(module: torch.nn.Module) -> list[str]:
    names = ["gate_up_proj", "down_proj"]
    return names + [f"{name}_bias" for name in names] if module.has_bias else names


def _split_gate_up(
    joined: torch.Tensor, module: torch.nn.Module, out_dim: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gate and up of [2F, H] (or transposed, or a bias [2F]), concatenated or interleaved."""
    if module.is_transposed and joined.dim() == 2:
        joined = joined.T
    if module.is_concatenated:
        gate, up = joined.chunk(2, dim=out_dim)
        return gate, up
    even = torch.arange(0, joined.shape[out_dim], 2)
    return joined.index_select(out_dim, even), joined.index_select(out_dim, even + 1)


def _load_config(path: Path) -> Any:
    if not (path / "config.json").is_file():
        raise CheckpointError(
            f"{path}: no config.json; expected a checkpoint folder with config.json and "
            "*.safetensors"
        )
    try:
        raw = json.loads((path / "config.json").read_text())
        model_type = raw.get("model_type") if isinstance(raw, dict) else None
        check_model_type(model_type, str(path))
        config = load_config(str(path))
    except (ValueError, TypeError, OSError, StrictDataclassError) as error:
        raise CheckpointError(f"{path}/config.json: cannot be read: {error}") from error
    if config.hidden_size < GROUP_SIZE:  # not left to torch, which warns of 0 and fails below
        raise CheckpointError(
            f"{path}: hidden_size is {config.hidden_size}, expected a multiple of {GROUP_SIZE}"
        )
    quantization = raw.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        raise CheckpointError(
            f"{path}: already quantised (quant_method {method!r}), expected bf16, fp16 or fp32 "
            "weights; give the original checkpoint"
        )
    return config
