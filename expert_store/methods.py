"""What a recipe is made of: quantiser, grids, repairs, allocation; and the named recipes.

Knows no model and no weight. `expert_store/config.py` holds what a user may say.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from expert_store.types import BlockKind, Codec
from kernels.types import GROUP_SIZE, Grid, check_group_size

Quantizer = Literal["hqq", "rtn", "grid", "feedback", "none"]
"""rtn: min/max round to nearest. hqq: the library's half-quadratic optimisation. grid: clip-ratio
search with closed-form scales. feedback: grid with the rounding error of an input passed on to the
inputs not rounded yet (needs a calibration). none: bfloat16 as it is."""
Allocation = Literal["uniform", "kurtosis", "solver"]
"""uniform: every matrix alike. kurtosis: the paper's, ranks by falling kurtosis. solver: bits, grid
and repair blocks of every matrix together under one budget of bytes moved per token."""


@dataclass(frozen=True, slots=True)
class Methods:
    """How codes and compensators are made. Raises ValueError when the parts do not fit together.

    - grids, bits: what codes may be stored as; without the solver the first of each is taken.
    - repairs: kinds of blocks a compensator may hold; empty for none.
    - weighted: errors are weighed by second moments of the expert's inputs, where a calibration is
      given: by all of the moment if the quantiser is feedback, else by its diagonal.
    - alternations: rounds of quantising for what the compensator leaves; 0 quantises once, first.
    - milo: the alternation is MiLo's (the codes alone do not matter), else by how often the codes
      are used with and without their compensator.
    - codec: "tiles", or an error-bounded codec for all layers.
    - group_size: inputs of the codes that share a scale. Feedback and alternation work in 64.
    """

    quantizer: Quantizer
    allocation: Allocation
    grids: tuple[Grid, ...] = ("affine",)
    bits: tuple[int, ...] = (2,)
    repairs: tuple[BlockKind, ...] = ()
    factor_grid: Grid = "affine"
    weighted: bool = False
    alternations: int = 0
    milo: bool = False
    codec: Codec = "tiles"
    group_size: int = GROUP_SIZE

    def __post_init__(self) -> None:
        for name, kind in (("quantizer", Quantizer), ("allocation", Allocation), ("codec", Codec)):
            if getattr(self, name) not in get_args(kind):
                raise ValueError(
                    f"{name}: got {getattr(self, name)!r}, expected one of "
                    f"{', '.join(get_args(kind))}"
                )
        if not self.grids or not set(self.grids) <= set(get_args(Grid)):
            raise ValueError(f"grids: got {self.grids}, expected some of {get_args(Grid)}")
        if not set(self.repairs) <= set(get_args(BlockKind)):
            raise ValueError(f"repairs: got {self.repairs}, expected some of {get_args(BlockKind)}")
        if self.quantizer == "hqq" and self.grids != ("affine",):
            raise ValueError("grids: hqq makes affine codes only")
        if self.alternations < 0:
            raise ValueError(f"alternations: got {self.alternations}, expected 0 or more")
        if self.alternations and not self.repairs:
            raise ValueError("alternations: there is no compensator to alternate with")
        check_group_size(self.group_size)
        if self.group_size != GROUP_SIZE:
            self._check_groups()

    def _check_groups(self) -> None:
        """Error feedback goes group by group along moments that are cut into blocks of 64."""
        what = f"group_size: got {self.group_size}, but"
        if self.quantizer == "feedback" or (self.alternations and not self.milo):
            raise ValueError(
                f"{what} error feedback and alternation work in groups of {GROUP_SIZE}; use "
                "another recipe (fast, paper, static or mixed)"
            )
        if self.quantizer == "none":
            raise ValueError(f"{what} neither bfloat16 nor an error-bounded codec has groups")

    @property
    def needs_calibration(self) -> bool:
        return self.quantizer == "feedback"


METHODS: Mapping[str, Methods] = {
    # arXiv 2512.17073: HQQ codes, ranks by kurtosis, truncated SVD of the residual, INT3 factors.
    "paper": Methods("hqq", "kurtosis", repairs=("rank",)),
    # The codes of "paper" alone: what every low-bit model is without compensators.
    "static": Methods("hqq", "uniform"),
    # Codes only, their widths chosen matrix by matrix under the budget: what the bytes of
    # compensators buy when they are spent on wider codes.
    "mixed": Methods("hqq", "solver", bits=(2, 3, 4)),
    # arXiv 2504.02658: codes and low-rank factors optimised in turn, one rank for all.
    "milo": Methods("hqq", "uniform", repairs=("rank",), alternations=8, milo=True),
    # Needs no calibration, and uses one: grid codes and both kinds of blocks under the budget.
    "fast": Methods(
        "grid",
        "solver",
        grids=("symmetric",),
        bits=(2, 3, 4),
        repairs=("rank", "plane"),
        factor_grid="symmetric",
        weighted=True,
    ),
    # The best answers for the bytes moved that we know how to make; needs a calibration.
    "best": Methods(
        "feedback",
        "solver",
        grids=("symmetric",),
        bits=(2, 3, 4),
        repairs=("rank", "plane"),
        factor_grid="symmetric",
        weighted=True,
    ),
    # arXiv 2509.07727: error-bounded lossy compression, decoded on the host or on the device.
    "sz3": Methods("none", "uniform", codec="sz3"),
    "cuszp": Methods("none", "uniform", codec="cuszp"),
    # Raw bfloat16: the model itself.
    "original": Methods("none", "uniform", bits=(16,)),
}
