"""Which experts each cell of a study makes coarse, and how: layers by depth, experts by heat.

Pure: counts of tokens in, sets of experts out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from expert_store.codecs.bound import ErrorBound

Group = Literal["first", "shallow", "middle", "deep", "all"]
GROUPS: tuple[Group, ...] = get_args(Group)
Heat = Literal["hot", "cold", "all"]
HEATS: tuple[Heat, ...] = get_args(Heat)
Method = Literal["cuszp", "sz3", "noise"]
METHODS: tuple[Method, ...] = get_args(Method)

HOT_SHARE = 0.5
"""Of a layer's routed tokens: what the hot experts take together, at least."""


@dataclass(frozen=True, slots=True)
class Treatment:
    """What is done to the experts of a cell.

    Codecs have an error bound such as "row:0.1"; noise has the energy that it adds to the experts'
    weighted sum, relative to that sum's. Raises ValueError for a strength that is neither.
    """

    method: Method
    strength: str

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method: got {self.method!r}, expected one of {', '.join(METHODS)}")
        if self.method != "noise":
            ErrorBound.parse(self.strength)
        elif not (math.isfinite(self.energy) and self.energy >= 0):
            raise ValueError(f"noise: got {self.strength!r}, expected a finite number >= 0")

    @property
    def energy(self) -> float:
        """Of noise; NaN when the strength is no number."""
        try:
            return float(self.strength)
        except ValueError:
            return math.nan

    @property
    def bound(self) -> ErrorBound:
        """Of a codec."""
        return ErrorBound.parse(self.strength)

    def __str__(self) -> str:
        return f"{self.method} {self.strength}"


@dataclass(frozen=True, slots=True)
class StudySettings:
    """What is measured. Raises ValueError naming field, value and what is allowed."""

    treatments: tuple[Treatment, ...]
    windows: int = 16
    window_tokens: int = 256
    seed: int = 0  # of the noise

    def __post_init__(self) -> None:
        for name in ("windows", "window_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected at least 1")
        if not self.treatments or len(set(self.treatments)) < len(self.treatments):
            raise ValueError("bounds: expected one or more bounds or noises, all different")


@dataclass(frozen=True, slots=True)
class Cell:
    """One treatment of one set of experts."""

    treatment: Treatment
    group: Group
    heat: Heat
    targets: Mapping[int, frozenset[int]]  # layer -> experts; none of them empty

    def __str__(self) -> str:
        return f"{self.treatment}, {self.group} layers, {self.heat} experts"

    @property
    def num_experts(self) -> int:
        return sum(len(experts) for experts in self.targets.values())


def layer_groups(layers: Sequence[int]) -> dict[Group, tuple[int, ...]]:
    """The layers of each group: the first alone, thirds by depth (shallow holds the first), all.

    A group that a model of fewer than three layers cannot fill is left out.
    """
    ordered = tuple(sorted(layers))
    ends = [round(part * len(ordered) / 3) for part in range(4)]
    thirds = [ordered[start:end] for start, end in zip(ends, ends[1:], strict=False)]
    parts = (ordered[:1], *thirds, ordered)
    return {name: part for name, part in zip(GROUPS, parts, strict=True) if part}


def hot_experts(tokens_E: Sequence[int]) -> frozenset[int]:
    """The most used experts that together take half of a layer's routed tokens, and no more.

    Of equal ones the lower number counts as hotter.
    """
    by_use = sorted(range(len(tokens_E)), key=lambda expert: (-tokens_E[expert], expert))
    hot: set[int] = set()
    wanted, taken = HOT_SHARE * sum(tokens_E), 0
    for expert in by_use:
        if hot and taken >= wanted:
            break
        hot.add(expert)
        taken += tokens_E[expert]
    return frozenset(hot)


def cells(tokens: Mapping[int, Sequence[int]], treatments: Sequence[Treatment]) -> Iterator[Cell]:
    """Every cell, one treatment after another; `tokens` are those of each expert, by layer.

    A cell without experts (no expert is cold) is left out.
    """
    hot = {layer: hot_experts(tokens_E) for layer, tokens_E in tokens.items()}
    every = {layer: frozenset(range(len(tokens_E))) for layer, tokens_E in tokens.items()}
    cold = {layer: every[layer] - hot[layer] for layer in tokens}
    by_heat: dict[Heat, dict[int, frozenset[int]]] = {"hot": hot, "cold": cold, "all": every}
    for treatment in treatments:
        for group, layers in layer_groups(tuple(tokens)).items():
            for heat, experts in by_heat.items():
                targets = {layer: experts[layer] for layer in layers if experts[layer]}
                if targets:
                    yield Cell(treatment, group, heat, targets)


def share_of(targets: Mapping[int, frozenset[int]], tokens: Mapping[int, Sequence[int]]) -> float:
    """The share of all routed (token, expert) pairs that go to these experts."""
    hit = sum(tokens[layer][expert] for layer, experts in targets.items() for expert in experts)
    return hit / max(1, sum(sum(tokens_E) for tokens_E in tokens.values()))
