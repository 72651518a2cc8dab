"""The quantised rank blocks that repair most of what is heard of a residual.

A block of 16 ranks is the weighted truncated SVD of what is left, then rounded: each factor is
solved for again (least squares) given the other as rounded, a few times, so that one factor makes
up for the rounding of the other and the next block for what both left. Knows matrices only.

Legend: N rows, K cols, R rank, n the shorter and k the longer side, B width of a Krylov block.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from expert_store.matrix.grid import quantize_grid
from expert_store.matrix.moments import Moment
from expert_store.matrix.weighting import Weighting
from kernels.reference import dequantize
from kernels.types import GRID_BITS, GROUP_SIZE, TILE_ROWS, Grid, QuantizedMatrix, block_bytes

EXACT_SIDE = 1024
"""Up to this short side all eigenvectors of the Gram matrix are cheap; above, a Krylov subspace."""
OVERSAMPLING = 16
MAX_PASSES = 8
"""Passes over the matrix and back, at most; each widens the Krylov subspace by a block."""
CAPTURE_TOLERANCE = 0.004
"""A pass that raises the captured energy by less than this share was the last."""
_RIDGE = 1e-7


@dataclass(frozen=True, slots=True)
class FactorForm:
    """How rank blocks are stored, and how they are looked for."""

    bits: int = 2
    grid: Grid = "symmetric"
    sweeps: int = 3
    """Times that both factors of a block are rounded, each for the other as it then is."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.bits not in GRID_BITS[self.grid]:
            raise ValueError(
                f"factor bits: got {self.bits}, a {self.grid} grid has {GRID_BITS[self.grid]}"
            )
        if self.sweeps < 1:
            raise ValueError(f"sweeps: got {self.sweeps}, expected at least 1")


@dataclass(frozen=True, slots=True, eq=False)
class RankRepair:
    """16 ranks, quantised, and the weighted error energy that adding them removes."""

    right: QuantizedMatrix  # [16, K]
    left_t: QuantizedMatrix  # [16, N]
    gain: float

    @property
    def num_bytes(self) -> int:
        return block_bytes(self.left_t.cols, self.right.cols, self.right.bits, self.right.grid)

    def dense(self) -> torch.Tensor:
        """What the block adds to the weight, [N, K] float32."""
        return dequantize(self.left_t).T @ dequantize(self.right)


def weighted_svd(
    residual_NK: torch.Tensor, rank: int, weighting: Weighting, *, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """left [N, R] and right [R, K] with the least tr(S D R D^T) of D = residual - left @ right.

    The singular values of S^(1/2) E R^(1/2) are split evenly over both factors and fall with the
    rank. Exact up to a short side of `EXACT_SIDE`; above, within 1 % of the energy that the exact
    one captures (benchmarks/results/repairs.md). Deterministic under a seed. Raises ValueError when
    the rank is over the matrix.
    """
    rows, cols = residual_NK.shape
    if not 0 <= rank <= min(rows, cols):
        raise ValueError(f"rank: got {rank}, expected 0 to {min(rows, cols)} for [{rows}, {cols}]")
    scaled_NK = weighting.scale_rows(residual_NK)
    heard_NK = weighting.times_root(scaled_NK)
    if rows <= cols:
        basis_NR = leading_basis(heard_NK, rank, seed=seed)[:, :rank]
        value_R = (heard_NK.T @ basis_NR).norm(dim=0)
    else:
        image_NR = heard_NK @ leading_basis(heard_NK.T, rank, seed=seed)[:, :rank]
        value_R = image_NR.norm(dim=0)
        basis_NR = image_NR * _inverse(value_R)
    root_R = value_R.sqrt()
    # Given the left factor U, the best right one is U^T S^(1/2) E whatever R is.
    right_RK = (basis_NR.T @ scaled_NK) * _inverse(root_R)[:, None]
    left_NR = basis_NR * root_R
    if weighting.row_weight_N is not None:
        left_NR = left_NR * _inverse(weighting.row_weight_N.sqrt())[:, None]
    return left_NR.contiguous(), right_RK.contiguous()


def leading_basis(
    matrix_nk: torch.Tensor, rank: int, *, seed: int = 0, start_nS: torch.Tensor | None = None
) -> torch.Tensor:
    """Orthonormal [n, R or more]: left singular vectors of a matrix with n <= k, best first.

    Exact for a small n. Else block Krylov iteration (Musco and Musco, arXiv 1504.05477): the same
    passes as subspace iteration, but all of them are kept, which is what resolves the flat spectrum
    of a residual that is nearly noise. `start_nS`, orthonormal, is where to look first.
    """
    short = matrix_nk.shape[0]
    width = rank + OVERSAMPLING
    if short <= EXACT_SIDE or width * 3 > short:
        _, vectors = torch.linalg.eigh(matrix_nk @ matrix_nk.T)  # rising eigenvalues
        return vectors[:, short - rank :].flip(1)
    if start_nS is None:
        generator = torch.Generator().manual_seed(seed)
        start_kB = torch.randn(matrix_nk.shape[1], width, generator=generator)
        start_nS = torch.linalg.qr(matrix_nk @ start_kB)[0]
    image = matrix_nk.T @ start_nS  # [k, width]
    energies, vectors = torch.linalg.eigh(image.T @ image)
    basis, newest = start_nS @ vectors[:, -width:], image @ vectors[:, -width:]
    gram, image = torch.diag(energies[-width:]), newest
    captured = float(energies[-rank:].sum())
    for _ in range(min(MAX_PASSES, short // width - 1)):
        block = matrix_nk @ newest
        for _twice in range(2):  # once loses orthogonality in float32
            block -= basis @ (basis.T @ block)
        block = torch.linalg.qr(block)[0]
        newest = matrix_nk.T @ block
        cross = image.T @ newest
        gram = torch.cat((torch.cat((gram, cross), 1), torch.cat((cross.T, newest.T @ newest), 1)))
        basis, image = torch.cat((basis, block), dim=1), torch.cat((image, newest), dim=1)
        before, captured = captured, float(torch.linalg.eigvalsh(gram)[-rank:].sum())
        if captured - before <= CAPTURE_TOLERANCE * captured:
            break
    _, vectors = torch.linalg.eigh(gram)
    return basis @ vectors[:, -2 * width :].flip(1)


def leading_within(matrix_nk: torch.Tensor, basis_nS: torch.Tensor) -> torch.Tensor:
    """The vectors of an orthonormal basis turned so that those which capture most come first."""
    image_kS = matrix_nk.T @ basis_nS
    _, vectors = torch.linalg.eigh(image_kS.T @ image_kS)
    return basis_nS @ vectors.flip(1)


class RankFinder:
    """Finds one rank block after the other of what is left of one matrix.

    In a large matrix every other block is looked for only among the 64 vectors that the search for
    the one before it found. On synthetic heavy-tailed matrices of 2048 x 5632 and 4096 x 14336 that
    removed up to 0.4 % less energy than a search of its own, in about half the time. Raises
    ValueError when a side is not a multiple of 64, which a factor's groups need.
    """

    def __init__(self, rows: int, cols: int, weighting: Weighting, form: FactorForm) -> None:
        if rows % GROUP_SIZE or cols % GROUP_SIZE:
            raise ValueError(f"residual: got [{rows}, {cols}], rank blocks need multiples of 64")
        self._weighting, self._form = weighting, form
        row_weight = weighting.row_weight_N
        self._row_moment = None
        if row_weight is not None:
            self._row_moment = Moment(torch.diag_embed(row_weight.view(-1, GROUP_SIZE)))
        self._basis: torch.Tensor | None = None
        self._is_searched = False  # the last block was found by a search, in a large matrix

    def next(self, residual_NK: torch.Tensor) -> RankRepair | None:
        """The best 16 ranks of the residual, quantised; None when they would repair nothing."""
        right_RK = self._first_right(residual_NK)
        weighting, form = self._weighting, self._form
        best: RankRepair | None = None
        for _ in range(form.sweeps):
            right = quantize_grid(right_RK, form.bits, grid=form.grid, moment=weighting.moment)
            right_RK = dequantize(right)
            heard_RK = weighting.times_moment(right_RK)
            gram_RR = heard_RK @ right_RK.T
            found_RN = heard_RK @ residual_NK.T
            left_t = quantize_grid(
                _solve(gram_RR, found_RN), form.bits, grid=form.grid, moment=self._row_moment
            )
            left_RN = dequantize(left_t)
            scaled_RN = left_RN
            if weighting.row_weight_N is not None:
                scaled_RN = left_RN * weighting.row_weight_N
            left_gram_RR = scaled_RN @ left_RN.T
            # ||E||^2 - ||E - L R||^2 = 2 <E, L R> - ||L R||^2, all under the weighting.
            gain = 2 * float((scaled_RN * found_RN).sum(dtype=torch.float64))
            gain -= float((left_gram_RR * gram_RR).sum(dtype=torch.float64))
            if gain > (0.0 if best is None else best.gain):
                best = RankRepair(right, left_t, gain)
            right_RK = _solve(left_gram_RR, scaled_RN @ residual_NK)
        return best

    def _first_right(self, residual_NK: torch.Tensor) -> torch.Tensor:
        """The right factor [16, K] of the leading singular vectors, each of its own length."""
        scaled_NK = self._weighting.scale_rows(residual_NK)
        heard_NK = self._weighting.times_root(scaled_NK)
        tall = residual_NK.shape[0] > residual_NK.shape[1]
        if tall:
            heard_NK = heard_NK.T
        if self._is_searched and self._basis is not None:
            basis = leading_within(heard_NK, self._basis)
        else:
            basis = leading_basis(heard_NK, TILE_ROWS, seed=self._form.seed, start_nS=self._basis)
        if basis.shape[1] > TILE_ROWS:
            self._basis, self._is_searched = basis, not self._is_searched
        leading_nR = basis[:, :TILE_ROWS]
        left_NR = heard_NK.T @ leading_nR if tall else leading_nR
        return left_NR.T @ scaled_NK


def _solve(gram_RR: torch.Tensor, values_RK: torch.Tensor) -> torch.Tensor:
    """Least squares by the normal equations: gram^-1 @ values, in float64, 0 where gram is."""
    gram = gram_RR.double()
    ridge = _RIDGE * float(gram.diagonal().mean())
    if not ridge > 0:
        return torch.zeros_like(values_RK)
    gram += ridge * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    return torch.linalg.solve(gram, values_RK.double()).float()


def _inverse(values: torch.Tensor) -> torch.Tensor:
    """1 / value, and 0 where the value is 0."""
    return torch.where(values > 0, 1 / values, torch.zeros_like(values))
