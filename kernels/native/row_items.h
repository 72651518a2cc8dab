// All rows of a matrix, shared among threads, whatever multiplies a few row blocks.
#pragma once
#include <algorithm>
#include <cstdint>

#include "moetier_kernels.h"
#include "parallel.h"
#include "tile.h"

namespace moetier {

constexpr int64_t kRowBlocksPerItem = 4;
constexpr int64_t kPaddedTokensAtOnce = 32;  // bounds the buffer of a padded row block

// y [tokens, rows] by calls of multiply(row blocks, first token, how many, out, row stride). The
// last row block may reach past `rows`, so it goes through a buffer and only its valid rows are
// copied out.
template <class Multiply>
void multiply_all_rows(const MoetierMatrix& matrix, int64_t tokens, float* y, int num_threads,
                       const Multiply& multiply) {
  const RowBlocks all = row_blocks(matrix);
  const int64_t rows = matrix.rows;
  const int64_t items = (all.num_blocks + kRowBlocksPerItem - 1) / kRowBlocksPerItem;
  parallel_for(items, num_threads, [&](int64_t item) {
    const int64_t first = item * kRowBlocksPerItem;
    const int64_t last = std::min(first + kRowBlocksPerItem, all.num_blocks);
    const int64_t whole = std::min(last, rows / kTileRows);
    if (whole > first)
      multiply(all.slice(first, whole - first), 0, tokens, y + first * kTileRows, rows);
    if (whole == last) return;
    float padded[kPaddedTokensAtOnce][kTileRows];
    for (int64_t t = 0; t < tokens; t += kPaddedTokensAtOnce) {
      const int64_t n = std::min(kPaddedTokensAtOnce, tokens - t);
      multiply(all.slice(whole, 1), t, n, padded[0], kTileRows);
      for (int64_t i = 0; i < n; i++)
        std::copy_n(padded[i], rows - whole * kTileRows, y + (t + i) * rows + whole * kTileRows);
    }
  });
}

}  // namespace moetier
