"""A float matrix to low-bit codes, by the `hqq` library; its packing is not used, only its codes.

Knows matrices only.

Legend: N rows, K cols, G groups of cols.
"""

from __future__ import annotations

import torch
from hqq.core.quantize import Quantizer

from expert_store.matrix.levels import check_weight
from kernels import packing
from kernels.types import GROUP_SIZE, QuantizedMatrix

# hqq passes over its input some 20 times: half a MiB of float32 stays in cache (twice as fast as a
# whole 640 x 640), and its temporaries, about ten times the input, stay small.
CHUNK_WEIGHTS = 1 << 17


def quantize_hqq(
    weight_NK: torch.Tensor, bits: int, *, group_size: int = GROUP_SIZE
) -> QuantizedMatrix:
    """Half-quadratic quantisation of a float32 [N, K] weight in groups of inputs.

    Matrices of more than `CHUNK_WEIGHTS` weights go in row chunks; hqq's early stop, its only
    coupling between groups, then looks at one chunk. Raises ValueError when the shape does not fit.
    """
    check_weight(weight_NK, bits, "affine", group_size)
    rows, cols = weight_NK.shape
    step = max(1, CHUNK_WEIGHTS // cols)
    codes, scales, zeros = [], [], []
    for chunk in weight_NK.split(step):
        grouped, meta = Quantizer.quantize(
            chunk,
            nbits=bits,
            channel_wise=True,
            group_size=group_size,
            optimize=True,
            round_zero=False,
            axis=1,
            bitpack=False,
            device="cpu",
        )
        codes.append(grouped.reshape(chunk.shape).to(torch.uint8))
        scales.append(meta["scale"].reshape(chunk.shape[0], -1))
        zeros.append(meta["zero"].reshape(chunk.shape[0], -1))
    return packing.pack(
        torch.cat(codes), torch.cat(scales), torch.cat(zeros), bits, group_size=group_size
    )
