// The low-rank product: int8 on the right, float32 on the left.
#include "low_rank.h"

#include <new>

#include "dequantize.h"
#include "inputs.h"
#include "multiply.h"
#include "target.h"
#include "tile.h"

namespace moetier {
namespace {

// y[n] += sum_r z[r] * weight[r][n] for 16 ranks and 64 rows.
ALWAYS_INLINE void add_left_tile(const float* weight, const float* z, float* y) {
  for (int r = 0; r < kTileRows; r++)
    for (int n = 0; n < kTileCols; n++) y[n] += z[r] * weight[r * kTileCols + n];
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

void add_left(const MoetierLowRank& factors, const float* ranks, int64_t block_stride,
              int64_t tokens, int64_t group, float* y, int64_t row_stride, int isa) {
  float weight[kTileRows * kTileCols];
  for (int64_t block = 0; block < factors.num_blocks; block++) {
    dequantize_tile(row_blocks(left_factor(factors, block)), group, weight, kTileCols, isa);
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
    QuantizedInputs inputs(tokens, factors->cols, false);
    inputs.set_all(x, isa);
    const Inputs view = inputs.view();
    low_rank_product(*factors, tokens, y, num_threads, isa,
                     [&](const RowBlocks& right, float* ranks) {
                       multiply_for(isa)(right, view, tokens, ranks, kTileRows);
                     });
  } catch (const std::bad_alloc&) {
    return MOETIER_NO_MEMORY;
  }
  return MOETIER_OK;
}
