"""SmolLM2-135M, dense: real FFN weights, the inputs they really see, and the loss when replaced.

Needs the GGUF file that `make smol` fetches (and the package gguf), and ../shared/mini/eval.

Legend: T tokens, K inputs of a matrix.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from cluster.environment import cache_folder
from expert_store.matrix.moments import Moment, MomentSum
from models.smol.recipe import GGUF_FILE, PACKAGE

GGUF = cache_folder() / "packages" / PACKAGE / GGUF_FILE
TEXTS = Path(__file__).resolve().parents[2] / "shared" / "mini" / "eval"
DOMAINS = ("desktop", "lexicon", "literature", "politics", "pydoc", "sysdoc")
PROJECTIONS = ("gate", "up", "down")
WINDOW = 512
FIT_TOKENS = 1024 * len(DOMAINS)
Part = Literal["fit", "held"]
PLACES: tuple[Literal["in", "mid"], ...] = ("in", "mid")
_SPANS = {"fit": slice(0, 1024), "held": slice(2048, 3072)}

Replace = Callable[[int, str, torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Place:
    """Where inputs of matrices are: before gate and up ("in") or before down ("mid")."""

    layer: int
    name: Literal["in", "mid"]

    @classmethod
    def of(cls, layer: int, projection: str) -> Place:
        return cls(layer, "mid" if projection == "down" else "in")


class SmolLM2:
    """The model in memory. Raises OSError where the file is missing."""

    def __init__(self, gguf: Path = GGUF) -> None:
        folder, file = str(gguf.parent), gguf.name
        self._model: Any = AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=file, dtype=torch.float32
        ).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
        self._ids_T = {
            domain: tokenizer(
                (TEXTS / f"{domain}.txt").read_text()[:40_000], return_tensors="pt"
            ).input_ids[0]
            for domain in DOMAINS
        }
        self._mlps = [layer.mlp for layer in self._model.model.layers]
        self._originals = {
            (layer, name): self._linear(layer, name).weight.detach().clone()
            for layer in range(len(self._mlps))
            for name in PROJECTIONS
        }

    def weight(self, layer: int, projection: str) -> torch.Tensor:
        """[out, in] float32, never replaced."""
        return self._originals[layer, projection]

    def _linear(self, layer: int, projection: str) -> Any:
        return getattr(self._mlps[layer], f"{projection}_proj")

    @torch.no_grad()
    def moment_sums(
        self, part: Part, domain: str, places: list[Place], skip_first: bool = False
    ) -> dict[Place, MomentSum]:
        """Sums over 1024 tokens of a domain, in windows of 512. The first token of a window draws
        activations a thousand times as large as others (a sink); `skip_first` leaves it out."""
        found, hooks = {}, []
        for place in places:
            linear = self._linear(place.layer, "down" if place.name == "mid" else "gate")
            total = found[place] = MomentSum(linear.in_features)

            def add(module: Any, inputs: Any, total: MomentSum = total) -> None:
                total.add(inputs[0][0, 1 if skip_first else 0 :])

            hooks.append(linear.register_forward_pre_hook(add))
        try:
            for window_T in self._ids_T[domain][_SPANS[part]].split(WINDOW):
                self._model(window_T[None])
        finally:
            for hook in hooks:
                hook.remove()
        return found

    @torch.no_grad()
    def inputs(self, part: Part, domain: str, place: Place) -> torch.Tensor:
        """[T, K]: the inputs themselves, without the first token of a window."""
        linear = self._linear(place.layer, "down" if place.name == "mid" else "gate")
        kept: list[torch.Tensor] = []
        hook = linear.register_forward_pre_hook(lambda module, x: kept.append(x[0][0, 1:]))
        try:
            for window_T in self._ids_T[domain][_SPANS[part]].split(WINDOW):
                self._model(window_T[None])
        finally:
            hook.remove()
        return torch.cat(kept)

    @torch.no_grad()
    def losses(self, replace: Replace | None) -> list[float]:
        """Nats per token of every domain's held-out window, with all FFN weights replaced."""
        for (layer, name), weight in self._originals.items():
            new = weight if replace is None else replace(layer, name, weight)
            self._linear(layer, name).weight.copy_(new)
        found = []
        for domain in DOMAINS:
            ids_T = self._ids_T[domain][_SPANS["held"]][:WINDOW]
            logits = self._model(ids_T[None]).logits[0, :-1]
            found.append(float(cross_entropy(logits, ids_T[1:])))
        return found


@cache
def loaded() -> SmolLM2:
    return SmolLM2()


@cache
def moments(part: Part, layers: tuple[int, ...], *, shrink: bool = True) -> dict[Place, Moment]:
    """Second moments over all domains; those to fit with are shrunk by their number of tokens."""
    places = [Place(layer, name) for layer in layers for name in PLACES]
    sums: dict[Place, MomentSum] = {}
    for domain in DOMAINS:
        for place, found in loaded().moment_sums(part, domain, places).items():
            if place in sums:
                sums[place].merge(found)
            else:
                sums[place] = found
    if part == "held" or not shrink:
        return {place: found.moment() for place, found in sums.items()}
    return {place: each.moment().shrunk_to_diagonal(each.count) for place, each in sums.items()}
