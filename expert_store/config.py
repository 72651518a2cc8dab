"""How to compress: the recipe and its numbers, validated once. Knows no model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import get_args

from expert_store.types import FORMAT_VERSION, Recipe
from kernels.types import GROUP_SIZE, FactorBits

PAPER_LADDER = (0, 16, 32, 128, 256, 512, 1024)
"""Ranks that the paper (arXiv 2512.17073) chooses from."""
CODE_BITS = (2, 3, 4)
MAX_TOP_N = 1024


@dataclass(frozen=True, slots=True)
class _Defaults:
    bits: int
    avg_rank: int
    top_n: int


RECIPES: Mapping[str, _Defaults] = {
    # HQQ codes, residual, kurtosis-greedy ranks, truncated SVD, INT3 factors.
    "paper": _Defaults(bits=2, avg_rank=16, top_n=1),
    # The same codes alone: what every low-bit model is without compensators.
    "static": _Defaults(bits=2, avg_rank=0, top_n=0),
    # Raw bfloat16: the model itself.
    "original": _Defaults(bits=16, avg_rank=0, top_n=0),
}


@dataclass(frozen=True, slots=True)
class CompressionConfig:
    """What `compress` does to every expert. None means the recipe's default; see `resolve`.

    bits: width of the codes, 2, 3 or 4 (16 for "original" only). avg_rank: mean rank over all
    experts, 0 for no compensators. top_n: how many of a token's experts are restored at run time.

    Raises ValueError naming the field, the value and what is allowed.
    """

    recipe: str = "paper"
    bits: int | None = None
    avg_rank: int | None = None
    top_n: int | None = None
    group_size: int = GROUP_SIZE
    factor_bits: int = 3
    rank_ladder: tuple[int, ...] = PAPER_LADDER
    seed: int = 0

    def __post_init__(self) -> None:
        if self.recipe not in RECIPES:
            raise ValueError(f"recipe: got {self.recipe!r}, expected one of {', '.join(RECIPES)}")
        allowed = (16,) if self.recipe == "original" else CODE_BITS
        if self.bits is not None and self.bits not in allowed:
            raise ValueError(
                f"bits: got {self.bits}, expected one of {allowed} for recipe {self.recipe!r}"
            )
        if self.group_size != GROUP_SIZE:
            raise ValueError(
                f"group_size: got {self.group_size}, expected {GROUP_SIZE}: the kernels' tiles "
                f"hold {GROUP_SIZE} inputs, other sizes do not divide them"
            )
        if self.factor_bits not in get_args(FactorBits):
            raise ValueError(
                f"factor_bits: got {self.factor_bits}, expected one of {get_args(FactorBits)}"
            )
        if self.avg_rank is not None and self.avg_rank < 0:
            raise ValueError(f"avg_rank: got {self.avg_rank}, expected 0 or more")
        if self.avg_rank and self.recipe != "paper":
            raise ValueError(
                f"avg_rank: got {self.avg_rank}, but recipe {self.recipe!r} has no compensators; "
                "use 0 or recipe 'paper'"
            )
        if self.top_n is not None and not 0 <= self.top_n <= MAX_TOP_N:
            raise ValueError(f"top_n: got {self.top_n}, expected 0 to {MAX_TOP_N}")
        ladder = self.rank_ladder
        steps = all(isinstance(rank, int) and rank >= 0 and rank % 16 == 0 for rank in ladder)
        if not steps or list(ladder) != sorted(set(ladder)) or 0 not in ladder:
            raise ValueError(
                f"rank_ladder: got {ladder}, expected rising multiples of 16 that start with 0"
            )
        if self.seed < 0:
            raise ValueError(f"seed: got {self.seed}, expected 0 or more")

    def resolve(self) -> CompressionConfig:
        """The same with every None replaced by the recipe's default."""
        defaults = RECIPES[self.recipe]
        return replace(
            self,
            bits=defaults.bits if self.bits is None else self.bits,
            avg_rank=defaults.avg_rank if self.avg_rank is None else self.avg_rank,
            top_n=defaults.top_n if self.top_n is None else self.top_n,
        )

    def as_recipe(self) -> Recipe:
        """What the manifest says of it."""
        full = self.resolve()
        assert full.bits is not None
        assert full.avg_rank is not None
        assert full.top_n is not None
        return Recipe(
            name=full.recipe,
            codec="tiles",
            bits=float(full.bits),
            grid="affine",
            factor_bits=full.factor_bits,
            factor_grid="affine",
            avg_rank=full.avg_rank,
            rank_ladder=full.rank_ladder,
            top_n=full.top_n,
            seed=full.seed,
        )

    def fingerprint(self, source: str) -> str:
        """Hash of the resolved config, the format and `source`: equal means the same store."""
        value = {"format": FORMAT_VERSION, "source": source, **asdict(self.resolve())}
        return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
