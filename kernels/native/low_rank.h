// The two halves of left (right x), block of 16 ranks by block.
#pragma once
#include <cstdint>

#include "inputs.h"
#include "moetier_kernels.h"
#include "multiply.h"

namespace moetier {

// right x of one block as ranks [tokens][16]. It stays float32, only x is rounded.
void multiply_right(const MoetierLowRank& factors, int64_t block, const Inputs& inputs,
                    int64_t tokens, Multiply* multiply, float* ranks);

// y[t * row_stride + i] += row 64 * group + i of left times the ranks of token t, for `tokens`
// tokens; token t of block b has its 16 ranks at ranks + b * block_stride + 16 * t. Blocks are
// added in order.
void add_left(const MoetierLowRank& factors, const float* ranks, int64_t block_stride,
              int64_t tokens, int64_t group, float* y, int64_t row_stride, int isa);

}  // namespace moetier
