// The float32 product in plain C++, tile by tile, and whole products with it.
#include "multiply_fp32.h"

#include <algorithm>
#include <new>
#include <vector>

#include "dequantize.h"
#include "low_rank.h"
#include "moetier_kernels.h"
#include "parallel.h"
#include "row_items.h"

namespace moetier {
namespace {

// The sum of each group of 64 inputs, [tokens, groups].
std::vector<float> group_sums(const float* x, int64_t tokens, int64_t cols) {
  std::vector<float> sums(static_cast<size_t>(tokens * (cols / kGroupSize)));
  for (float& sum : sums) {
    double total = 0;
    for (int i = 0; i < kGroupSize; i++) total += *x++;
    sum = static_cast<float>(total);
  }
  return sums;
}

}  // namespace

void multiply_fp32_portable(const RowBlocks& rows, const FloatInputs& inputs, int64_t tokens,
                            float* y, int64_t row_stride) {
  float weight[kTileRows * kGroupSize];
  for (int64_t b = 0; b < rows.num_blocks; b++) {
    const RowBlocks block = rows.slice(b, 1);
    float* out = y + b * kTileRows;
    for (int64_t t = 0; t < tokens; t++) std::fill_n(out + t * row_stride, kTileRows, 0.f);
    for (int64_t g = 0; g < rows.groups; g++) {
      dequantize_tile(block, g, weight, kGroupSize, MOETIER_SCALAR);
      for (int64_t t = 0; t < tokens; t++) {
        const float* x = inputs.from_token(t).x + g * kGroupSize;
        for (int row = 0; row < kTileRows; row++) {
          float dot = 0.f;
          for (int i = 0; i < kGroupSize; i++) dot += weight[row * kGroupSize + i] * x[i];
          out[t * row_stride + row] += dot;
        }
      }
    }
  }
}

MultiplyFp32* multiply_fp32_for(int isa) {
#if MOETIER_X86
  if (isa == MOETIER_AVX512VNNI) return multiply_fp32_avx512;
  if (isa == MOETIER_AVX2) return multiply_fp32_avx2;
#endif
  (void)isa;
  return multiply_fp32_portable;
}

}  // namespace moetier

int32_t moetier_matmul_fp32(const MoetierMatrix* matrix, const float* x, int64_t tokens, float* y,
                            int32_t num_threads, int32_t isa) {
  using namespace moetier;
  try {
    const std::vector<float> sums = group_sums(x, tokens, matrix->cols);
    const FloatInputs inputs{x, sums.data(), matrix->cols / kGroupSize};
    multiply_all_rows(*matrix, tokens, y, num_threads,
                      [&](const RowBlocks& rows, int64_t first, int64_t n, float* out,
                          int64_t row_stride) {
                        multiply_fp32_for(isa)(rows, inputs.from_token(first), n, out, row_stride);
                      });
  } catch (const std::bad_alloc&) {
    return MOETIER_NO_MEMORY;
  }
  return MOETIER_OK;
}

int32_t moetier_low_rank_matmul_fp32(const MoetierLowRank* factors, const float* x, int64_t tokens,
                                     float* y, int32_t num_threads, int32_t isa) {
  using namespace moetier;
  try {
    const std::vector<float> sums = group_sums(x, tokens, factors->cols);
    const FloatInputs inputs{x, sums.data(), factors->cols / kGroupSize};
    low_rank_product(*factors, tokens, y, num_threads, isa,
                     [&](const RowBlocks& right, float* ranks) {
                       multiply_fp32_for(isa)(right, inputs, tokens, ranks, kTileRows);
                     });
  } catch (const std::bad_alloc&) {
    return MOETIER_NO_MEMORY;
  }
  return MOETIER_OK;
}
