"""transformers' own model without its routed experts, and one forward pass through it.

Importing this registers "moetier" with transformers: a quantizer that takes the experts out while
the model is on meta, so that their bytes are never read, and an experts implementation that calls
what was bound to the model. Knows no cache, no copy and no scheduler.

Legend: B sequences, T tokens of each, S = B*T flattened, K top-k, H hidden, V vocabulary.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.quantizers import register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from expert_store.errors import StoreFormatError
from expert_store.families import experts_modules
from expert_store.types import Manifest
from gpu_worker.config import WorkerConfig
from gpu_worker.counters import StepCounters

logger = logging.getLogger(__name__)

METHOD = "moetier"
"""Name of the quantisation method and of the experts implementation in transformers."""


@dataclass(frozen=True, slots=True)
class StepReport:
    """What the experts of one forward pass did, and the token rows that went without factors."""

    counters: StepCounters
    degraded_rows: Mapping[
        int, int
    ]  # row of the S token rows -> its degraded pairs, over all layers


class StepExperts(Protocol):
    """Runs the routed experts of a step, layer after layer: `gpu_worker/experts.py`."""

    def begin(self, valid_S: torch.Tensor | None, token_tags_S: torch.Tensor | None = None) -> None:
        """Start a step. Rows where `valid_S` (bool) is False are padding: no expert runs.

        `token_tags_S` (int64) tells tokens apart whatever batch they are in.
        """
        ...

    def run_layer(
        self,
        layer: int,
        hidden_SH: torch.Tensor,
        topk_ids_SK: torch.Tensor,
        topk_weights_SK: torch.Tensor,
    ) -> torch.Tensor:
        """The weighted sum of each row's experts: [S, H] in the dtype of `hidden_SH`."""
        ...

    def end(self) -> StepReport:
        """What the step did since `begin`."""
        ...


@dataclass(frozen=True, slots=True)
class ForwardOutput:
    """Logits and what they cost."""

    logits: torch.Tensor  # [B, T', V] in the model's dtype; T' positions as `logits_to_keep` asked
    counters: StepCounters
    degraded_pairs: tuple[int, ...]  # per sequence of the batch


class ModelRunner:
    """One model and its experts; runs one batch at a time. Not thread-safe."""

    def __init__(self, model: Any, experts: StepExperts) -> None:
        self.model = model
        self.experts = experts

    def forward(
        self,
        input_ids_BT: torch.Tensor,
        positions_BT: torch.Tensor,
        cache: Any,
        mask: Any,
        *,
        valid_BT: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
    ) -> ForwardOutput:
        """One pass over B sequences of T tokens each, all on the model's device.

        `cache` is a transformers Cache (or None), `mask` what the model's attention takes.
        `valid_BT` (bool) marks padding with False: no expert runs for it and no byte moves.
        `logits_to_keep` is transformers' own: 0 all, n the last n, or a 1-D tensor of positions.

        Raises ExpertsFailed (gpu_worker/experts.py) whose token rows index the flattened [B*T].
        """
        num_sequences, num_tokens = input_ids_BT.shape
        valid_S = None if valid_BT is None else valid_BT.reshape(-1)
        self.experts.begin(valid_S, token_tags(input_ids_BT, positions_BT).reshape(-1))
        with torch.inference_mode():
            logits = self.model(
                input_ids=input_ids_BT,
                position_ids=positions_BT,
                attention_mask=mask,
                past_key_values=cache,
                use_cache=cache is not None,
                logits_to_keep=logits_to_keep,
            ).logits
        report = self.experts.end()
        degraded = [0] * num_sequences
        for row, pairs in report.degraded_rows.items():
            degraded[row // num_tokens] += pairs
        return ForwardOutput(logits, report.counters, tuple(degraded))


def token_tags(input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """int64, the same for a token at its position in every batch."""
    return positions.to(torch.int64) * (1 << 32) + input_ids


def load_model(
    store: Path, manifest: Manifest, config: WorkerConfig, experts: StepExperts
) -> ModelRunner:
    """The store's model on the config's device, in eval mode, with `experts` in place of its own.

    No parameter of a routed expert is ever made. `config` must be resolved.
    Raises StoreFormatError when the dense files do not hold the model that the manifest describes.
    """
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            store,
            dtype=config.torch_dtype,
            experts_implementation=METHOD,
            local_files_only=True,
            output_loading_info=True,
        )
    except (OSError, SafetensorError) as error:
        raise StoreFormatError(
            f"{store}: the dense part of {manifest.model.name} cannot be read: {error}; "
            f"run `moetier verify {store}`"
        ) from error
    _check_loaded(store, manifest, model, report)
    bind_experts(model, experts)
    model.to(config.device).eval()
    logger.info("loaded %s from %s on %s", manifest.model.name, store, config.device)
    return ModelRunner(model, experts)


def bind_experts(model: Any, experts: StepExperts) -> None:
    """Let every MoE layer of a model loaded with the "moetier" implementation call `experts`."""
    for _, module in experts_modules(model).values():
        module.moetier_experts = experts


def _check_loaded(store: Path, manifest: Manifest, model: Any, report: Mapping[str, Any]) -> None:
    missing = sorted(report["missing_keys"])
    if missing:
        raise StoreFormatError(
            f"{store}: the dense files lack {len(missing)} tensors of {manifest.model.name}, "
            f"the first is {missing[0]}; compress the model again"
        )
    found = {layer: path for layer, (path, _) in experts_modules(model).items()}
    expected = dict(manifest.model.moe_layers)
    if found != expected:
        differing = sorted(found.items() ^ expected.items())
        raise StoreFormatError(
            f"{store}: config.json and manifest.json do not describe the same MoE layers, "
            f"they differ in {differing[0]}; compress the model again"
        )


def _run_bound_experts(
    module: Any,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """transformers' experts interface: S token rows, their K experts and weights -> [S, H]."""
    experts = getattr(module, "moetier_experts", None)
    if experts is None:
        raise ValueError(
            "the model's experts are in a store and no StepExperts is bound to it; "
            "call gpu_worker.model.bind_experts(model, experts), or use load_model"
        )
    return experts.run_layer(module.moetier_layer, hidden_states, top_k_index, top_k_weights)


class MoetierConfig(QuantizationConfigMixin):
    """`quantization_config` of a store's config.json; what else it says is kept, not used."""

    def __init__(self, **said: Any) -> None:
        said.pop("quant_method", None)
        self.quant_method = METHOD
        for name, value in said.items():
            setattr(self, name, value)


class MoetierQuantizer(HfQuantizer):
    """Takes the routed experts out of a model while it is on meta."""

    requires_calibration = False

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        for layer, (_, module) in experts_modules(model).items():
            for name in list(module._parameters):
                del module._parameters[name]
            module.moetier_layer = layer
            # Some families' _init_weights touches gate_up_proj, which is gone.
            module._is_hf_initialized = True
        ignored = set(model._keys_to_ignore_on_load_unexpected or ())
        model._keys_to_ignore_on_load_unexpected = ignored | {r"\.experts\."}
        self._asked_dtypes = {name: p.dtype for name, p in model.named_parameters()}
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        """Give every parameter the dtype that was asked for, those kept in float32 aside.

        transformers 5.17 leaves dense tensors that its conversion renames, such as Mixtral's
        router, in the checkpoint's dtype; 5.23 does not.
        """
        kept = [*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())]
        for name, parameter in model.named_parameters():
            asked = self._asked_dtypes.get(name, parameter.dtype)
            if parameter.dtype != asked and not any(re.search(part, name) for part in kept):
                parameter.data = parameter.data.to(asked)
        return model

    @property
    def is_trainable(self) -> bool:
        return False

    def is_serializable(self) -> bool:
        return False


def register() -> None:
    """Make "moetier" known to transformers. Done on import; doing it again changes nothing."""
    ALL_EXPERTS_FUNCTIONS.register(METHOD, _run_bound_experts)
    if METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(METHOD)(MoetierConfig)
    if METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantizer(METHOD)(MoetierQuantizer)


register()
