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

float sum_of(const float* x, int64_t n) {
  double total = 0;
  for (int64_t i = 0; i < n; i++) total += x[i];
  return static_cast<float>(total);
}

// The sum of the inputs of each of `tiles` tiles, [tokens, tiles].
std::vector<float> tile_sums(const float* x, int64_t tokens, int64_t cols, int64_t tiles) {
  std::vector<float> sums(static_cast<size_t>(tokens * tiles));
  for (float& sum : sums) {
    sum = sum_of(x, cols / tiles);
    x += cols / tiles;
  }
  return sums;
}

}  // namespace

KeptFloats::KeptFloats(int64_t tokens, int64_t cols, bool with_half_sums)
    : cols_(cols),
      x_(static_cast<size_t>(tokens * cols)),
      sums_(static_cast<size_t>(tokens * (cols / kTileCols))),
      half_sums_(with_half_sums ? 2 * sums_.size() : 0) {}

void KeptFloats::set_group(int64_t token, int64_t group, const float* x, int) {
  const int64_t at = token * (cols_ / kTileCols) + group;
  std::copy_n(x, kTileCols, x_.data() + at * kTileCols);
  sums_[at] = sum_of(x, kTileCols);
  constexpr int kHalf = kTileCols / 2;
  if (half_sums_.empty()) return;
  half_sums_[2 * at] = sum_of(x, kHalf);
  half_sums_[2 * at + 1] = sum_of(x + kHalf, kHalf);
}

void multiply_fp32_portable(const RowBlocks& rows, const FloatInputs& inputs, int64_t tokens,
                            float* y, int64_t row_stride) {
  float weight[kTileRows * kTileCols];
  for (int64_t b = 0; b < rows.num_blocks; b++) {
    const RowBlocks block = rows.slice(b, 1);
    float* out = y + b * kTileRows;
    for (int64_t t = 0; t < tokens; t++) std::fill_n(out + t * row_stride, kTileRows, 0.f);
    const int64_t cols = tile_cols(rows.layout);
    for (int64_t tile = 0; tile < rows.tiles; tile++) {
      dequantize_tile(block, tile, weight, kTileCols, MOETIER_SCALAR);
      for (int64_t t = 0; t < tokens; t++) {
        const float* x = inputs.from_token(t).x + tile * cols;
        for (int row = 0; row < kTileRows; row++) {
          float dot = 0.f;
          for (int64_t i = 0; i < cols; i++) dot += weight[row * kTileCols + i] * x[i];
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
    const int64_t tiles = row_blocks(*matrix).tiles;
    const std::vector<float> sums = tile_sums(x, tokens, matrix->cols, tiles);
    const FloatInputs inputs{x, sums.data(), matrix->cols, tiles};
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
    const int64_t tiles = factors->cols / kTileCols;
    const std::vector<float> sums = tile_sums(x, tokens, factors->cols, tiles);
    const FloatInputs inputs{x, sums.data(), factors->cols, tiles};
    low_rank_product(*factors, tokens, y, num_threads, isa,
                     [&](const RowBlocks& right, float* ranks) {
                       multiply_fp32_for(isa)(right, inputs, tokens, ranks, kTileRows);
                     });
  } catch (const std::bad_alloc&) {
    return MOETIER_NO_MEMORY;
  }
  return MOETIER_OK;
}
