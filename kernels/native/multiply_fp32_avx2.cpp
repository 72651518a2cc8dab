// The float32 product with AVX2: a register's 8 lanes are rows; its four codes a lane are widened
// one after another and meet one input each.
#include "multiply_fp32.h"
#include "target.h"

#if MOETIER_X86
#include <immintrin.h>

#include "tile_avx2.h"

namespace moetier {
namespace {

constexpr int kMaxTokens = 2;  // eight sums; with more they spill

// One tile's sums by half of the rows, in two chains to hide the adder's latency with a single
// token.
template <int BITS, int TOKENS>
struct Sums {
  __m256 even[TOKENS][2], odd[TOKENS][2];
};

template <int BITS, int TOKENS>
TARGET_AVX2 ALWAYS_INLINE void add_products(Sums<BITS, TOKENS>& sums, const Bytes& codes,
                                            const FloatInputs& in, int v) {
  const __m256i byte = _mm256_set1_epi32(0xff);
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
#pragma GCC unroll 2
    for (int half = 0; half < 2; half++) {
      const __m256i code = _mm256_and_si256(_mm256_srli_epi32(codes.half[half], 8 * i), byte);
      // Counted from the middle code: sums of small numbers about zero lose less.
      const __m256 weights =
          _mm256_sub_ps(_mm256_cvtepi32_ps(code), _mm256_set1_ps(middle_code(BITS)));
#pragma GCC unroll 2
      for (int t = 0; t < TOKENS; t++) {
        const __m256 x = _mm256_set1_ps(in.x[t * in.cols + 4 * v + i]);
        __m256& sum = i % 2 ? sums.odd[t][half] : sums.even[t][half];
        sum = _mm256_fmadd_ps(weights, x, sum);
      }
    }
  }
}

// float32 sums need no widening.
template <int BITS, int TOKENS>
TARGET_AVX2 ALWAYS_INLINE void widen(Sums<BITS, TOKENS>&) {}

// Not inlined, as in multiply_avx2.cpp.
template <class Form, int TOKENS>
TARGET_AVX2 NEVER_INLINE void multiply_block(const RowBlocks& rows, FloatInputs in, float* y,
                                             int64_t row_stride) {
  constexpr int BITS = Form::kBits, GRID = Form::kGrid;
  __m256 result[2][TOKENS];
  for (int half = 0; half < 2; half++)
    for (int t = 0; t < TOKENS; t++) result[half][t] = _mm256_setzero_ps();
  TileWalk<Form> at(rows);
  for (int64_t i = 0; i < rows.tiles; i++, at.next(), in.x += Form::kCols, in.sums++) {
    prefetch_tile<Form>(at.tile + kPrefetchBytes);
    Sums<BITS, TOKENS> sums;
    for (int t = 0; t < TOKENS; t++)
      for (int half = 0; half < 2; half++)
        sums.even[t][half] = sums.odd[t][half] = _mm256_setzero_ps();
    dot_tile<Form>(sums, at.tile, in);
#pragma GCC unroll 2
    for (int half = 0; half < 2; half++) {
      __m256 scale, zero_scaled;
      load_scales<Form>(at.scales, half, scale, zero_scaled);
      // The weight of an affine grid's middle code; that of a symmetric one is zero.
      const __m256 middle = _mm256_fmsub_ps(scale, _mm256_set1_ps(middle_code(BITS)), zero_scaled);
      for (int t = 0; t < TOKENS; t++) {
        const __m256 dot = _mm256_add_ps(sums.even[t][half], sums.odd[t][half]);
        result[half][t] = _mm256_fmadd_ps(scale, dot, result[half][t]);
        if constexpr (GRID == MOETIER_AFFINE)
          result[half][t] =
              _mm256_fmadd_ps(middle, _mm256_set1_ps(in.sums[t * in.tiles]), result[half][t]);
      }
    }
  }
  for (int half = 0; half < 2; half++)
    for (int t = 0; t < TOKENS; t++)
      _mm256_storeu_ps(y + t * row_stride + half * kHalfRows,
                       scale_rows<GRID>(result[half][t], rows, half));
}

template <class Form>
TARGET_AVX2 void multiply_rows(const RowBlocks& rows, const FloatInputs& inputs, int64_t tokens,
                               float* y, int64_t row_stride) {
  for (int64_t b = 0; b < rows.num_blocks; b++) {
    const RowBlocks block = rows.slice(b, 1);
    for (int64_t t = 0; t < tokens; t += kMaxTokens) {
      const FloatInputs in = inputs.from_token(t);
      float* out = y + t * row_stride + b * kTileRows;
      if (tokens - t == 1)
        multiply_block<Form, 1>(block, in, out, row_stride);
      else
        multiply_block<Form, 2>(block, in, out, row_stride);
    }
  }
}

}  // namespace

void multiply_fp32_avx2(const RowBlocks& rows, const FloatInputs& inputs, int64_t tokens, float* y,
                        int64_t row_stride) {
  for_form(rows, [&](auto form) {
    multiply_rows<decltype(form)>(rows, inputs, tokens, y, row_stride);
  });
}

}  // namespace moetier
#endif
