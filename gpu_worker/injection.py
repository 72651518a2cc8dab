"""Noise of a given energy in the output of chosen experts: what a study perturbs.

Wraps any `StepExperts`; every sequence of a batch may have a perturbation of its own, so that many
are measured with the experts' weights read once. Knows no loss.

Legend: S token rows, B sequences, T tokens of each, K top-k, H hidden.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from gpu_worker.model import StepExperts, StepReport

Experts = frozenset[int] | None
"""Experts of one layer; None is all of them."""


@dataclass(frozen=True, slots=True)
class Injection:
    """Noise in the weighted sum of some experts' outputs, in one layer or several.

    `energy` is its squared norm over that of the sum it is added to, the same for every token:
    rounding real pretrained experts to 3 bits does 0.12, to 2 bits 0.6. Raises ValueError when it
    is negative or not finite.
    """

    targets: Mapping[int, Experts]  # layer -> which experts
    energy: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.energy) and self.energy >= 0):
            raise ValueError(f"energy: got {self.energy}, expected a finite number >= 0")

    @staticmethod
    def layer(layer: int, energy: float, experts: Experts = None) -> Injection:
        """Noise in one layer."""
        return Injection({layer: experts}, energy)


@dataclass(frozen=True, slots=True)
class Perturbed:
    """One sequence of a batch: what is done to it, and the number that its noise comes from.

    Sequences with the same number and length get the same directions of noise in all layers,
    whatever else is in the batch: differences between injections are then not those of the draw.
    """

    injection: Injection | None
    draw: int


class InjectingExperts:
    """`StepExperts` that adds noise to what `inner` gives. `plan` says to which sequences.

    With an expert set `inner` runs a layer once more, with the other experts' weights at zero: it
    must not choose by weight what it does to a pair (an original store does not).
    """

    def __init__(self, inner: StepExperts, *, seed: int = 0) -> None:
        self._inner = inner
        self._seed = seed
        self._plan: tuple[Perturbed, ...] = ()

    def plan(self, sequences: Sequence[Perturbed]) -> None:
        """What happens to each sequence of the passes that follow; () leaves them alone."""
        self._plan = tuple(sequences)

    def begin(self, valid_S: torch.Tensor | None, token_tags_S: torch.Tensor | None = None) -> None:
        self._inner.begin(valid_S, token_tags_S)

    def run_layer(
        self,
        layer: int,
        hidden_SH: torch.Tensor,
        topk_ids_SK: torch.Tensor,
        topk_weights_SK: torch.Tensor,
    ) -> torch.Tensor:
        """As in `StepExperts`, with the noise added. Raises ValueError when the batch has other
        sequences than were planned."""
        output_SH = self._inner.run_layer(layer, hidden_SH, topk_ids_SK, topk_weights_SK)
        if not self._plan:
            return output_SH
        num_rows, rest = divmod(output_SH.shape[0], len(self._plan))
        if rest:
            raise ValueError(
                f"plan: {len(self._plan)} sequences do not divide {output_SH.shape[0]} token rows"
            )
        targets = [one.injection.targets if one.injection is not None else {} for one in self._plan]
        if not any(layer in target for target in targets):
            return output_SH
        sum_SH = output_SH
        if any(target.get(layer) is not None for target in targets):
            mask_SK = torch.cat(
                [
                    _belongs(ids_TK, target.get(layer))
                    for ids_TK, target in zip(topk_ids_SK.split(num_rows), targets, strict=True)
                ]
            )
            sum_SH = self._inner.run_layer(layer, hidden_SH, topk_ids_SK, topk_weights_SK * mask_SK)
        noisy = [
            out_TH + self._noise(one, layer, sum_TH) if layer in target else out_TH
            for one, target, out_TH, sum_TH in zip(
                self._plan, targets, output_SH.split(num_rows), sum_SH.split(num_rows), strict=True
            )
        ]
        return torch.cat(noisy)

    def end(self) -> StepReport:
        return self._inner.end()

    def _noise(self, one: Perturbed, layer: int, sum_TH: torch.Tensor) -> torch.Tensor:
        assert one.injection is not None, "a sequence without an injection has no noise"
        # The first target of every injection draws alike, its others differ from it.
        place = sorted(one.injection.targets).index(layer)
        # torch's generator looks at 32 bits of a seed.
        name = f"{self._seed} {one.draw} {place}".encode()
        seed = int.from_bytes(hashlib.blake2b(name, digest_size=4).digest(), "little")
        generator = torch.Generator().manual_seed(seed)
        noise_TH = torch.randn(sum_TH.shape, generator=generator).to(sum_TH.device)
        noise_TH /= noise_TH.norm(dim=1, keepdim=True)
        size_T1 = math.sqrt(one.injection.energy) * sum_TH.float().norm(dim=1, keepdim=True)
        return (noise_TH * size_T1).to(sum_TH.dtype)


def _belongs(ids_TK: torch.Tensor, experts: Experts) -> torch.Tensor:
    """[T, K] 1 where the pair's expert is among `experts`, else 0."""
    if experts is None:
        return torch.ones_like(ids_TK)
    chosen = torch.tensor(sorted(experts), dtype=ids_TK.dtype, device=ids_TK.device)
    return torch.isin(ids_TK, chosen).to(ids_TK.dtype)
