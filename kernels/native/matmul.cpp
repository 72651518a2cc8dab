// Whole products: a packed matrix, or a low-rank pair, with float32 inputs.
#include <algorithm>
#include <new>
#include <vector>

#include "dequantize.h"
#include "inputs.h"
#include "moetier_kernels.h"
#include "multiply.h"
#include "parallel.h"
#include "tile.h"

namespace moetier {
namespace {

constexpr int64_t kBlocksPerItem = 4;  // row blocks of one parallel item
constexpr int64_t kTokensAtOnce = 32;  // bounds the buffer of a padded row block

// y [tokens, rows] = the rows of one item. The last row block may reach past `rows`, so it goes
// through a buffer and only its valid rows are copied out.
void multiply_item(Multiply* multiply, const MoetierMatrix& matrix, int64_t item,
                   const Inputs& inputs, int64_t tokens, float* y) {
  const RowBlocks all = row_blocks(matrix);
  const int64_t rows = matrix.rows;
  const int64_t first = item * kBlocksPerItem;
  const int64_t last = std::min(first + kBlocksPerItem, all.num_blocks);
  const int64_t whole = std::min(last, rows / kTileRows);
  if (whole > first)
    multiply(all.slice(first, whole - first), inputs, tokens, y + first * kTileRows, rows);
  if (whole == last) return;
  float padded[kTokensAtOnce][kTileRows];
  for (int64_t t = 0; t < tokens; t += kTokensAtOnce) {
    const int64_t n = std::min(kTokensAtOnce, tokens - t);
    multiply(all.slice(whole, 1), inputs.from_token(t), n, padded[0], kTileRows);
    for (int64_t i = 0; i < n; i++)
      std::copy_n(padded[i], rows - whole * kTileRows, y + (t + i) * rows + whole * kTileRows);
  }
}

// y[n] += sum_r z[r] * weight[r][n] for 16 ranks and 64 rows.
ALWAYS_INLINE void add_left(const float* weight, const float* z, float* y) {
  for (int r = 0; r < kTileRows; r++)
    for (int n = 0; n < kGroupSize; n++) y[n] += z[r] * weight[r * kGroupSize + n];
}
#if MOETIER_X86
TARGET_AVX2 void add_left_avx2(const float* weight, const float* z, float* y) {
  add_left(weight, z, y);
}
TARGET_AVX512 void add_left_avx512(const float* weight, const float* z, float* y) {
  add_left(weight, z, y);
}
#endif

void add_left_for(int isa, const float* weight, const float* z, float* y) {
#if MOETIER_X86
  if (isa == MOETIER_AVX512VNNI) return add_left_avx512(weight, z, y);
  if (isa == MOETIER_AVX2) return add_left_avx2(weight, z, y);
#endif
  (void)isa;
  add_left(weight, z, y);
}

}  // namespace
}  // namespace moetier

int32_t moetier_matmul(const MoetierMatrix* matrix, const float* x, int64_t tokens, float* y,
                       int32_t num_threads, int32_t isa) {
  using namespace moetier;
  try {
    QuantizedInputs inputs(tokens, matrix->cols);
    inputs.set_all(x, isa);
    const Inputs view = inputs.view();
    const int64_t blocks = num_row_blocks(matrix->rows);
    parallel_for((blocks + kBlocksPerItem - 1) / kBlocksPerItem, num_threads, [&](int64_t item) {
      multiply_item(multiply_for(isa), *matrix, item, view, tokens, y);
    });
  } catch (const std::bad_alloc&) {
    return MOETIER_NO_MEMORY;
  }
  return MOETIER_OK;
}

int32_t moetier_low_rank_matmul(const MoetierLowRank* factors, const float* x, int64_t tokens,
                                float* y, int32_t num_threads, int32_t isa) {
  using namespace moetier;
  try {
    const int64_t num_blocks = factors->num_blocks, rows = factors->rows;
    QuantizedInputs inputs(tokens, factors->cols);
    inputs.set_all(x, isa);
    const Inputs view = inputs.view();
    // right @ x, [block][token][16 ranks]; it stays float32, only x is rounded.
    std::vector<float> ranks(static_cast<size_t>(num_blocks * tokens * kTileRows));
    const int64_t block_ranks = tokens * kTileRows;
    parallel_for(num_blocks, num_threads, [&](int64_t block) {
      multiply_for(isa)(row_blocks(right_factor(*factors, block)), view, tokens,
                        ranks.data() + block * block_ranks, kTileRows);
    });
    parallel_for(rows / kGroupSize, num_threads, [&](int64_t group) {
      float weight[kTileRows * kGroupSize];
      for (int64_t t = 0; t < tokens; t++)
        std::fill_n(y + t * rows + group * kGroupSize, kGroupSize, 0.f);
      for (int64_t block = 0; block < num_blocks; block++) {
        const RowBlocks left = row_blocks(left_factor(*factors, block));
        dequantize_tile(left, group, weight, kGroupSize, isa);
        for (int64_t t = 0; t < tokens; t++)
          add_left_for(isa, weight, ranks.data() + block * block_ranks + t * kTileRows,
                       y + t * rows + group * kGroupSize);
      }
    });
  } catch (const std::bad_alloc&) {
    return MOETIER_NO_MEMORY;
  }
  return MOETIER_OK;
}
