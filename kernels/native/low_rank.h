// The two halves of left (right x), block of 16 ranks by block.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

#include "moetier_kernels.h"
#include "parallel.h"
#include "tile.h"

namespace moetier {

// y[t * row_stride + i] += row 64 * group + i of left times the ranks of token t, for `tokens`
// tokens; token t of block b has its 16 ranks at ranks + b * block_stride + 16 * t. Blocks are
// added in order.
void add_left(const MoetierLowRank& factors, const float* ranks, int64_t block_stride,
              int64_t tokens, int64_t group, float* y, int64_t row_stride, int isa);

// y [tokens, rows] = left (right x). multiply_right(right factor of a block, ranks [tokens][16])
// makes right x, which stays float32. Throws std::bad_alloc.
template <class MultiplyRight>
void low_rank_product(const MoetierLowRank& factors, int64_t tokens, float* y, int num_threads,
                      int isa, const MultiplyRight& multiply_right) {
  const int64_t block_stride = tokens * kTileRows, rows = factors.rows;
  std::vector<float> ranks(static_cast<size_t>(factors.num_blocks * block_stride));
  parallel_for(factors.num_blocks, num_threads, [&](int64_t block) {
    multiply_right(row_blocks(right_factor(factors, block)), ranks.data() + block * block_stride);
  });
  parallel_for(rows / kTileCols, num_threads, [&](int64_t group) {
    float* out = y + group * kTileCols;
    for (int64_t t = 0; t < tokens; t++) std::fill_n(out + t * rows, kTileCols, 0.f);
    add_left(factors, ranks.data(), block_stride, tokens, group, out, rows, isa);
  });
}

}  // namespace moetier
