"""transformers' own model: all in memory, or its experts on disk by accelerate's hooks.

`python -m benchmarks.offload_parts.rival_transformers MODEL [FOLDER]` serves one of the two.
accelerate knows modules: it loads all experts of a layer for every token, whichever are routed to.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from benchmarks.offload_parts.rivals import serve


class TransformersRival:
    """The checkpoint in bfloat16 on this CPU. With `offload_folder` its experts are written there
    and come from there in every forward; the files stay in the page cache."""

    def __init__(self, model: Path, offload_folder: Path | None = None) -> None:
        options: dict[str, Any] = {"dtype": torch.bfloat16, "local_files_only": True}
        if offload_folder is not None:
            options |= {"device_map": _experts_on_disk(model), "offload_folder": offload_folder}
        self._model = AutoModelForCausalLM.from_pretrained(model, **options).eval()
        self._cache: Any = None
        self.bytes_per_step = sum(
            parameter.numel() * parameter.element_size()
            for parameter in self._model.parameters()
            if parameter.device.type == "meta"  # where accelerate keeps what it loads
        )

    @torch.inference_mode()
    def start(self, prompts: list[list[int]]) -> None:
        output = self._model(torch.tensor(prompts), use_cache=True, logits_to_keep=1)
        self._cache = output.past_key_values

    @torch.inference_mode()
    def step(self, tokens: list[int]) -> None:
        ids_B1 = torch.tensor(tokens)[:, None]
        self._model(ids_B1, past_key_values=self._cache, use_cache=True).logits.argmax(-1)

    @torch.inference_mode()
    def nats(self, window: list[int]) -> float:
        ids_T = torch.tensor(window)
        logits_TV = self._model(ids_T[None, :-1]).logits[0].float()
        return float(torch.nn.functional.cross_entropy(logits_TV, ids_T[1:]))


def _experts_on_disk(model: Path) -> dict[str, str]:
    """A device map: every layer's experts on disk, all else on the CPU."""
    config = AutoConfig.from_pretrained(model, local_files_only=True)
    with torch.device("meta"):
        shell = AutoModelForCausalLM.from_config(config)
    return {
        name: "disk" if name.endswith(".experts") else "cpu"
        for name, module in shell.named_modules()
        if name.endswith(".experts") or (not list(module.children()) and ".experts." not in name)
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    disable_progress_bar()
    folder, *offload = map(Path, sys.argv[1:])
    serve(TransformersRival(folder, *offload))
