"""How to compress: the recipe and its numbers, validated once. Knows no model."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import get_args

from expert_store.codecs.bound import ErrorBound
from expert_store.layer_codecs import LayerCodec
from expert_store.methods import METHODS, Methods
from expert_store.types import FORMAT_VERSION, Recipe
from kernels.types import GROUP_SIZE, FactorBits

PAPER_LADDER = (0, 16, 32, 128, 256, 512, 1024)
"""Ranks that the paper (arXiv 2512.17073) chooses from."""
CODE_BITS = (2, 3, 4)
MAX_TOP_N = 1024
MAX_BUDGET = 16.0
"""Bits per weight moved: what bfloat16 takes."""


@dataclass(frozen=True, slots=True)
class _Defaults:
    avg_rank: int = 0
    top_n: int | None = 0  # None: the solver chooses it
    budget: float | None = None
    error_bound: str | None = None


RECIPES: Mapping[str, _Defaults] = {
    "paper": _Defaults(avg_rank=16, top_n=1),
    "static": _Defaults(),
    "mixed": _Defaults(budget=3.0),
    "milo": _Defaults(avg_rank=16, top_n=1),
    "fast": _Defaults(top_n=None, budget=4.0),
    "best": _Defaults(top_n=None, budget=3.0),
    "sz3": _Defaults(error_bound="row:0.3"),
    "cuszp": _Defaults(error_bound="row:0.3"),
    "original": _Defaults(),
}
"""What a recipe's numbers are unless told otherwise; what it does is in `METHODS`."""
DEFAULT_RECIPE = "fast"
"""Five times the speed of the paper's, and usable without a calibration as well as with one."""


@dataclass(frozen=True, slots=True)
class CompressionConfig:
    """What `compress` does to every expert. None means the recipe's default; see `resolve`.

    - bits: width of the codes, 2, 3 or 4 (16 for "original"); recipes with a budget choose it.
    - avg_rank: mean rank over all experts, for the recipes "paper" and "milo".
    - top_n: how many of a token's experts are restored at run time; "fast" and "best" choose it.
    - group_size: inputs of the codes that share a scale, a multiple of 32; compensators have 64.
    - budget: bits per expert weight moved, counted over all that a token moves with an empty cache
      (codes of its top-k experts, compensators of its Top-n).
    - calibration: folder of `moetier calibrate`; "best" needs it, the other recipes of a budget
      use it to know how often an expert is used.
    - prior: file of `moetier study`, for recipes with a budget: how much each layer matters where
      the calibration has not measured it.
    - error_bound: of recipes "sz3" and "cuszp", as in `ErrorBound`: "row:0.3".
    - layer_codecs: layers that an error-bounded codec stores, whatever the recipe does elsewhere.
    - methods: the recipe's methods changed, for ablations.

    Raises ValueError naming the field, the value and what is allowed.
    """

    recipe: str = DEFAULT_RECIPE
    bits: int | None = None
    avg_rank: int | None = None
    top_n: int | None = None
    group_size: int = GROUP_SIZE
    factor_bits: int = 3
    rank_ladder: tuple[int, ...] = PAPER_LADDER
    seed: int = 0
    budget: float | None = None
    calibration: Path | None = None
    prior: Path | None = None
    error_bound: str | None = None
    layer_codecs: tuple[LayerCodec, ...] = ()
    methods: Methods | None = None

    def __post_init__(self) -> None:
        if self.recipe not in RECIPES:
            raise ValueError(f"recipe: got {self.recipe!r}, expected one of {', '.join(RECIPES)}")
        self._check_bits()
        assert self.how.group_size == self.group_size  # made: methods refuse what they cannot do
        if self.factor_bits not in get_args(FactorBits):
            raise ValueError(
                f"factor_bits: got {self.factor_bits}, expected one of {get_args(FactorBits)}"
            )
        self._check_ranks()
        if self.top_n is not None and not 0 <= self.top_n <= MAX_TOP_N:
            raise ValueError(f"top_n: got {self.top_n}, expected 0 to {MAX_TOP_N}")
        if self.seed < 0:
            raise ValueError(f"seed: got {self.seed}, expected 0 or more")
        self._check_budget()
        self._check_codecs()

    @property
    def how(self) -> Methods:
        """What the recipe does, with `bits` and `group_size` in place."""
        methods = METHODS[self.recipe] if self.methods is None else self.methods
        methods = replace(methods, group_size=self.group_size)
        return methods if self.bits is None else replace(methods, bits=(self.bits,))

    def resolve(self) -> CompressionConfig:
        """The same with every None replaced by the recipe's default, where it has one."""
        defaults = RECIPES[self.recipe]
        bits = self.how.bits
        return replace(
            self,
            bits=bits[0] if len(bits) == 1 and self.how.codec == "tiles" else None,
            avg_rank=defaults.avg_rank if self.avg_rank is None else self.avg_rank,
            top_n=defaults.top_n if self.top_n is None else self.top_n,
            budget=defaults.budget if self.budget is None else self.budget,
            error_bound=defaults.error_bound if self.error_bound is None else self.error_bound,
            methods=self.how,
        )

    def as_recipe(self) -> Recipe:
        """What the manifest says of it; bits and top_n are 0 where they are chosen later."""
        full, how = self.resolve(), self.how
        assert full.avg_rank is not None
        return Recipe(
            name=full.recipe,
            codec=how.codec,
            bits=float(full.bits or 0),
            grid=how.grids[0],
            factor_bits=full.factor_bits,
            factor_grid=how.factor_grid,
            avg_rank=full.avg_rank,
            rank_ladder=full.rank_ladder,
            top_n=full.top_n or 0,
            seed=full.seed,
            budget=full.budget,
            error_bound=full.error_bound,
            group_size=full.group_size,
        )

    def fingerprint(self, source: str) -> str:
        """Hash of the resolved config, the format and `source`: equal means the same store.

        `source` stands for the checkpoint and the content of calibration and prior.
        """
        resolved = asdict(self.resolve())
        for path in ("calibration", "prior"):
            del resolved[path]  # its content is in `source`
        value = {"format": FORMAT_VERSION, "source": source, **resolved}
        return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]

    def _check_bits(self) -> None:
        if self.bits is None:
            return
        if RECIPES[self.recipe].error_bound is not None:
            raise ValueError(
                f"bits: got {self.bits}, but recipe {self.recipe!r} has an error bound instead"
            )
        allowed = (16,) if self.recipe == "original" else CODE_BITS
        if self.bits not in allowed:
            raise ValueError(
                f"bits: got {self.bits}, expected one of {allowed} for recipe {self.recipe!r}"
            )

    def _check_ranks(self) -> None:
        if self.avg_rank is not None and self.avg_rank < 0:
            raise ValueError(f"avg_rank: got {self.avg_rank}, expected 0 or more")
        if self.avg_rank and RECIPES[self.recipe].avg_rank == 0:
            what = "chooses ranks itself" if self.how.repairs else "has no compensators"
            raise ValueError(
                f"avg_rank: got {self.avg_rank}, but recipe {self.recipe!r} {what}; "
                "use 0 or recipe 'paper'"
            )
        ladder = self.rank_ladder
        steps = all(isinstance(rank, int) and rank >= 0 and rank % 16 == 0 for rank in ladder)
        if not steps or list(ladder) != sorted(set(ladder)) or 0 not in ladder:
            raise ValueError(
                f"rank_ladder: got {ladder}, expected rising multiples of 16 that start with 0"
            )

    def _check_budget(self) -> None:
        if self.budget is not None:
            if self.how.allocation != "solver":
                raise ValueError(
                    f"budget: got {self.budget}, but recipe {self.recipe!r} has none; use recipe "
                    "fast, best or mixed"
                )
            if not (math.isfinite(self.budget) and 0 < self.budget <= MAX_BUDGET):
                raise ValueError(
                    f"budget: got {self.budget}, expected bits per weight up to {MAX_BUDGET:g}"
                )
        if self.prior is not None and self.how.allocation != "solver":
            raise ValueError(
                f"prior: got {self.prior}, but recipe {self.recipe!r} has no budget to share out; "
                "use recipe fast, best or mixed"
            )
        if self.how.needs_calibration and self.calibration is None:
            raise ValueError(
                f"calibration: recipe {self.recipe!r} needs the folder that `moetier calibrate` "
                "writes; run it first, or use recipe fast, which needs none"
            )

    def _check_codecs(self) -> None:
        if self.error_bound is not None:
            if RECIPES[self.recipe].error_bound is None:
                raise ValueError(
                    f"error_bound: got {self.error_bound!r}, but recipe {self.recipe!r} is not "
                    "error-bounded; use recipe sz3 or cuszp"
                )
            ErrorBound.parse(self.error_bound)
        layers = [layer for codec in self.layer_codecs for layer in codec.layers]
        if len(layers) != len(set(layers)):
            twice = next(layer for layer in layers if layers.count(layer) > 1)
            raise ValueError(f"layer_codecs: layer {twice} is given two codecs")
