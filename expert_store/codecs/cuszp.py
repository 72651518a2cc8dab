"""Codec cuszp: a weight within an error bound <-> the block code of `kernels/block_code.py`.

The bytes stay coded on their way to the device and are decoded there.

Legend: N rows, K cols.
"""

from __future__ import annotations

import torch

from expert_store.codecs.bound import ErrorBound, assert_within, check_weight
from expert_store.errors import StoreFormatError
from kernels import ops
from kernels.block_code import BlockCodedMatrix, check_block_code
from kernels.block_encode import encode_block_code


def encode(
    weight_NK: torch.Tensor, bound: ErrorBound, *, differenced: bool = False
) -> torch.Tensor:
    """The code (flat uint8) of a float [N, K] weight; every float32 served is within the bound.

    K is a multiple of 64. `differenced` stores differences of neighbours, which pays only where
    neighbours are alike: for weights it costs half a bit. The bound is checked on what the code
    decodes to. Raises ValueError for a weight that is not finite or a bound too tight for it.
    """
    check_weight(weight_NK)
    weight_NK = weight_NK.detach().cpu().float().contiguous()
    coded = encode_block_code(weight_NK, bound.of(weight_NK), differenced=differenced)
    assert_within(weight_NK, ops.dequantize(coded), bound, "cuszp")
    return coded.data


def decode(data: torch.Tensor, rows: int, cols: int) -> BlockCodedMatrix:
    """View a code as a matrix; nothing is decoded or copied.

    Data on the CPU is checked. Raises StoreFormatError when it is no code of that shape.
    """
    try:
        coded = BlockCodedMatrix(data, rows, cols)
        if data.device.type == "cpu":
            check_block_code(coded)
    except ValueError as error:
        raise StoreFormatError(f"cuszp part: {error}") from error
    return coded
