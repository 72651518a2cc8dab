// The low-rank product: int8 on the right, float32 on the left.
#include "low_rank.h"

#include <algorithm>
#include <new>
#include <vector>

#include "dequantize.h"
#include "parallel.h"
#include "target.h"
#include "tile.h"

namespace moetier {
namespace {

// y[n] += sum_r z[r] * weight[r][n] for 16 ranks and 64 rows.
ALWAYS_INLINE void add_left_tile(const float* weight, const float* z, float* y) {
  for (int r = 0; r < kTileRows; r++)
    for (int n = 0; n < kGroupSize; n++) y[n] += z[r] * weight[r * kGroupSize + n];
}
#if MOETIER_X86
TARGET_AVX2 void add_left_tile_avx2(const float* weight, const float* z, float* y) {
  add_left_tile(weight, z, y);
}
TARGET_AVX512 void add_left_tile_avx512(const float* weight, const float* z, float* y) {
  add_left_tile(weight, z, y);
}
#endif

void add_left_tile_for(int isa, const float* weight, const float* z, float* y) {
#if MOETIER_X86
  if (isa == MOETIER_AVX512VNNI) return add_left_tile_avx512(weight, z, y);
  if (isa == MOETIER_AVX2) return add_left_tile_avx2(weight, z, y);
#endif
  (void)isa;
  add_left_tile(weight, z, y);
}

}  // namespace

void multiply_right(const MoetierLowRank& factors, int64_t block, const Inputs& inputs,
                    int64_t tokens, Multiply* multiply, float* ranks) {
  multiply(row_blocks(right_factor(factors, block)), inputs, tokens, ranks, kTileRows);
}

void add_left(const MoetierLowRank& factors, const float* ranks, int64_t block_stride,
              int64_t tokens, int64_t group, float* y, int64_t row_stride, int isa) {
  float weight[kTileRows * kGroupSize];
  for (int64_t block = 0; block < factors.num_blocks; block++) {
    dequantize_tile(row_blocks(left_factor(factors, block)), group, weight, kGroupSize, isa);
    for (int64_t t = 0; t < tokens; t++)
      add_left_tile_for(isa, weight, ranks + block * block_stride + t * kTileRows,
                        y + t * row_stride);
  }
}

}  // namespace moetier

int32_t moetier_low_rank_matmul(const MoetierLowRank* factors, const float* x, int64_t tokens,
                                float* y, int32_t num_threads, int32_t isa) {
  using namespace moetier;
  try {
    const int64_t num_blocks = factors->num_blocks, rows = factors->rows;
    QuantizedInputs inputs(tokens, factors->cols);
    inputs.set_all(x, isa);
    const Inputs view = inputs.view();
    const int64_t block_stride = tokens * kTileRows;
    std::vector<float> ranks(static_cast<size_t>(num_blocks * block_stride));
    parallel_for(num_blocks, num_threads, [&](int64_t block) {
      multiply_right(*factors, block, view, tokens, multiply_for(isa),
                     ranks.data() + block * block_stride);
    });
    parallel_for(rows / kGroupSize, num_threads, [&](int64_t group) {
      float* out = y + group * kGroupSize;
      for (int64_t t = 0; t < tokens; t++) std::fill_n(out + t * rows, kGroupSize, 0.f);
      add_left(*factors, ranks.data(), block_stride, tokens, group, out, rows, isa);
    });
  } catch (const std::bad_alloc&) {
    return MOETIER_NO_MEMORY;
  }
  return MOETIER_OK;
}
