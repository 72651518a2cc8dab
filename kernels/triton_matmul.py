"""The Triton backend's products of one matrix: which kernel, by the number of tokens.

Steps of several MLPs with few tokens each go through `kernels/triton_grouped.py` instead. Loaded by
`kernels/ops.py` only, on first use. Checked under Triton's interpreter and compiled for sm_90; not
run on a GPU.

Legend: T tokens, N rows, K cols, R rank.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from kernels import reference
from kernels.block_code import BlockCodedMatrix
from kernels.triton_block_code import decode_block_code
from kernels.triton_decode import matmul_decode
from kernels.triton_prefill import matmul_prefill, reconstruct
from kernels.triton_step import KERNEL_ALIGNMENT
from kernels.types import LowRank, Matrix

DECODE_TOKENS = 16
"""Up to here the decode kernels, whose results do not depend on the number of tokens. To be set by
measurement: `make gpu-check` times decode and prefill kernels around it."""
RECONSTRUCT_TOKENS = 128
"""From here on, for 16-bit inputs, a weight is written out once in their type and multiplied by
torch. To be set by measurement too. By an H200's data sheet it should pay from about 80: 2 bytes a
weight written and read again at 4.8 TB/s, then 990 TFLOP/s in place of a third of TF32's 495."""


def matmul(
    matrix: Matrix, x_TK: torch.Tensor, *, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """x @ W.T as [T, N] float32; the bfloat16 baseline is multiplied by torch.

    dtype is the precision that many tokens may be multiplied in: that of the MLP's inputs.
    """
    if isinstance(matrix, BlockCodedMatrix):
        return x_TK.float() @ decode_block_code(matrix).T
    num_tokens = x_TK.shape[0]
    if matrix.bits == 16 or num_tokens == 0:
        return reference.matmul(matrix, x_TK)
    if matrix.data.data_ptr() % KERNEL_ALIGNMENT:
        matrix = replace(matrix, data=matrix.data.clone())
    if num_tokens >= RECONSTRUCT_TOKENS and dtype in (torch.bfloat16, torch.float16):
        return (x_TK.to(dtype) @ reconstruct(matrix, dtype).T).float()
    x = x_TK.float().contiguous()
    return (matmul_decode if num_tokens <= DECODE_TOKENS else matmul_prefill)(matrix, x)


def low_rank_matmul(factors: LowRank, x_TK: torch.Tensor) -> torch.Tensor:
    """left @ (right @ x) per token as [T, N] float32, through the materialised factors.

    For many tokens; few go through `kernels/triton_grouped.py`, which reads the packed ones.
    """
    return reference.low_rank_matmul(factors, x_TK)
