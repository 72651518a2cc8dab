// The integer product with AVX2: u8 x s8 pairs into int16 (vpmaddubsw), widened to int32 once or
// twice a group.
#include "multiply.h"
#include "target.h"

#if MOETIER_X86
#include <immintrin.h>

#include <algorithm>

#include "tile_avx2.h"

namespace moetier {
namespace {

// Eight int16 sums for both halves of the rows, and what they are added to: more would spill.
constexpr int kMaxTokens = 4;

// The sums of one tile with TOKENS tokens, by half of the rows. An int16 sum of pairs stays below
// 32767: at most 16 x 2 x 7 x 127 = 28448 for 3 bits, 8 x 2 x 15 x 127 = 30480 for 4.
template <int TOKENS>
struct Sums {
  __m256i narrow[TOKENS][2];  // int16
  __m256i wide[TOKENS][2];    // int32
};

// narrow += codes of vector `v` times each token's inputs 4v..4v+3, which every row shares.
template <int TOKENS>
TARGET_AVX2 ALWAYS_INLINE void add_products(Sums<TOKENS>& sums, const Bytes& codes,
                                            const int8_t* x, int v) {
#pragma GCC unroll 4
  for (int t = 0; t < TOKENS; t++) {
    int32_t four_inputs;
    std::memcpy(&four_inputs, x + t * kTileCols + 4 * v, sizeof four_inputs);
    const __m256i inputs = _mm256_set1_epi32(four_inputs);
#pragma GCC unroll 2
    for (int half = 0; half < 2; half++) {
      __m256i& sum = sums.narrow[t][half];
      sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(codes.half[half], inputs));
      // gcc would otherwise add in another order, for which it keeps the products on the stack:
      // twice the instructions.
      __asm__("" : "+x"(sum));
    }
  }
}

template <int TOKENS>
TARGET_AVX2 ALWAYS_INLINE void widen(Sums<TOKENS>& sums) {
  const __m256i one = _mm256_set1_epi16(1);
#pragma GCC unroll 4
  for (int t = 0; t < TOKENS; t++)
#pragma GCC unroll 2
    for (int half = 0; half < 2; half++) {
      sums.wide[t][half] =
          _mm256_add_epi32(sums.wide[t][half], _mm256_madd_epi16(sums.narrow[t][half], one));
      sums.narrow[t][half] = _mm256_setzero_si256();
    }
}

// Not inlined: beside those of other token counts GCC made it up to a tenth slower.
template <class Form, int TOKENS>
TARGET_AVX2 NEVER_INLINE void multiply_block(const RowBlocks& rows, const Inputs& inputs, float* y,
                                             int64_t row_stride) {
  constexpr int GRID = Form::kGrid;
  __m256 result[2][TOKENS];
  for (int half = 0; half < 2; half++)
    for (int t = 0; t < TOKENS; t++) result[half][t] = _mm256_setzero_ps();
  TileWalk<Form> at(rows);
  InputWalk<Form> in(inputs);
  for (int64_t i = 0; i < rows.tiles; i++, at.next(), in.next()) {
    prefetch_tile<Form>(at.tile + kPrefetchBytes);
    Sums<TOKENS> sums;
#pragma GCC unroll 4
    for (int t = 0; t < TOKENS; t++)
#pragma GCC unroll 2
      for (int half = 0; half < 2; half++)
        sums.narrow[t][half] = sums.wide[t][half] = _mm256_setzero_si256();
    dot_tile<Form>(sums, at.tile, in.codes());
#pragma GCC unroll 2
    for (int half = 0; half < 2; half++) {
      __m256 scale, zero_scaled;
      load_scales<Form>(at.scales, half, scale, zero_scaled);
#pragma GCC unroll 4
      for (int t = 0; t < TOKENS; t++) {
        const __m256 dot =
            _mm256_mul_ps(_mm256_cvtepi32_ps(sums.wide[t][half]), _mm256_set1_ps(in.scale(t)));
        result[half][t] = add_tile<GRID>(result[half][t], dot, _mm256_set1_ps(in.sum(t)), scale,
                                         zero_scaled);
      }
    }
  }
  for (int half = 0; half < 2; half++)
    for (int t = 0; t < TOKENS; t++)
      _mm256_storeu_ps(y + t * row_stride + half * kHalfRows,
                       scale_rows<GRID>(result[half][t], rows, half));
}

template <class Form>
TARGET_AVX2 void multiply_rows(const RowBlocks& rows, const Inputs& inputs, int64_t tokens,
                               float* y, int64_t row_stride) {
  for (int64_t b = 0; b < rows.num_blocks; b++) {
    const RowBlocks block = rows.slice(b, 1);
    for (int64_t t = 0; t < tokens; t += kMaxTokens) {
      const Inputs in = inputs.from_token(t);
      float* out = y + t * row_stride + b * kTileRows;
      switch (std::min<int64_t>(tokens - t, kMaxTokens)) {
        case 1: multiply_block<Form, 1>(block, in, out, row_stride); break;
        case 2: multiply_block<Form, 2>(block, in, out, row_stride); break;
        case 3: multiply_block<Form, 3>(block, in, out, row_stride); break;
        default: multiply_block<Form, 4>(block, in, out, row_stride);
      }
    }
  }
}

}  // namespace

void multiply_avx2(const RowBlocks& rows, const Inputs& inputs, int64_t tokens, float* y,
                   int64_t row_stride) {
  for_form(rows, [&](auto form) {
    multiply_rows<decltype(form)>(rows, inputs, tokens, y, row_stride);
  });
}

}  // namespace moetier
#endif
