"""The Triton backend's two products: the decode or the prefill kernel, by the number of tokens.

Loaded by `kernels/ops.py` only, on first use. Checked under Triton's interpreter and compiled for
sm_90; not run on a GPU.

Legend: T tokens, N rows, K cols, R rank.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from kernels import reference
from kernels.block_code import BlockCodedMatrix
from kernels.triton_block_code import decode_block_code
from kernels.triton_decode import low_rank_matmul_decode, matmul_decode
from kernels.triton_prefill import matmul_prefill
from kernels.types import LowRank, Matrix

DECODE_TOKENS = 16
"""Up to here the decode kernel, which needs no tensor core. To be set by measurement: in its sm_90
code a step of 1280 packed bytes (2 bits) reads x with 32 loads a thread at one token and 256 at 8,
so that past a token or two those loads, not memory, are expected to bound it (Triton 3.6, not run;
`make gpu-check` times both kernels at 1, 2 and 8 tokens)."""


def matmul(matrix: Matrix, x_TK: torch.Tensor) -> torch.Tensor:
    """x @ W.T as [T, N] float32; the bfloat16 baseline is multiplied by torch."""
    if isinstance(matrix, BlockCodedMatrix):
        return x_TK.float() @ decode_block_code(matrix).T
    if matrix.bits == 16 or x_TK.shape[0] == 0:
        return reference.matmul(matrix, x_TK)
    x = x_TK.float().contiguous()
    matrix = replace(matrix, data=_even(matrix.data))
    if x.shape[0] <= DECODE_TOKENS:
        return matmul_decode(matrix, x)
    return matmul_prefill(matrix, x)


def low_rank_matmul(factors: LowRank, x_TK: torch.Tensor) -> torch.Tensor:
    """left @ (right @ x) per token as [T, N] float32; many tokens use the materialised factors."""
    if factors.rank == 0 or not 0 < x_TK.shape[0] <= DECODE_TOKENS:
        return reference.low_rank_matmul(factors, x_TK)
    factors = replace(factors, data=_even(factors.data))
    return low_rank_matmul_decode(factors, x_TK.float().contiguous())


def _even(data: torch.Tensor) -> torch.Tensor:
    """The bytes at an even address, where the kernels can read float16; a copy only if needed."""
    return data.clone() if data.data_ptr() % 2 else data
