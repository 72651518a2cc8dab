// The float32 product with AVX-512: a vector's 16 lanes are rows; its four codes a lane are widened
// one after another and meet one input each.
#include "multiply_fp32.h"
#include "target.h"

#if MOETIER_X86
#include <immintrin.h>

#include <algorithm>

#include "tile_avx512.h"

namespace moetier {
namespace {

constexpr int kMaxTokens = 4;

// What each code stands for, counted from the middle one: sums of small numbers about zero lose
// less than those of codes from zero up. The table repeats for narrower codes.
template <int BITS>
struct Levels {
  alignas(64) float value[16];
  constexpr Levels() : value() {
    for (int i = 0; i < 16; i++)
      value[i] = static_cast<float>(i & ((1 << BITS) - 1)) - middle_code(BITS);
  }
};
template <int BITS>
constexpr Levels<BITS> kLevels;

// One tile's sums of 16 rows; a lane's inputs are summed in two chains, to hide the adder's latency
// with a single token.
template <int TOKENS>
struct Sums {
  __m512 even[TOKENS], odd[TOKENS];

  template <int BITS>
  TARGET_AVX512 ALWAYS_INLINE void add_two_fields(__m512i bytes, const FloatInputs& in, int low,
                                                  int high) {
    add_codes<BITS, 0>(bytes, in, low);
    add_codes<BITS, BITS>(bytes, in, high);
  }

  // The codes at bits FIRST.. of each byte are those of vector `v`.
  template <int BITS, int FIRST>
  TARGET_AVX512 ALWAYS_INLINE void add_codes(__m512i bytes, const FloatInputs& in, int v) {
    const __m512 table = _mm512_load_ps(kLevels<BITS>.value);
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
      // The look-up reads the four low bits of a lane; those above the code are no matter.
      const __m512 weights =
          _mm512_permutexvar_ps(_mm512_srli_epi32(bytes, 8 * i + FIRST), table);
#pragma GCC unroll 4
      for (int t = 0; t < TOKENS; t++) {
        const __m512 x = _mm512_set1_ps(in.x[t * in.cols + 4 * v + i]);
        __m512& sum = i % 2 ? odd[t] : even[t];
        sum = _mm512_fmadd_ps(weights, x, sum);
      }
    }
  }
};

// Not inlined, as in multiply_avx2.cpp.
template <class Form, int TOKENS>
TARGET_AVX512 NEVER_INLINE void multiply_block(const RowBlocks& rows, FloatInputs in, float* y,
                                               int64_t row_stride) {
  constexpr int BITS = Form::kBits, GRID = Form::kGrid;
  __m512 result[TOKENS];
#pragma GCC unroll 4
  for (int t = 0; t < TOKENS; t++) result[t] = _mm512_setzero_ps();
  TileWalk<Form> at(rows);
  for (int64_t i = 0; i < rows.tiles; i++, at.next(), in.x += Form::kCols, in.sums++) {
    prefetch_tile<Form>(at.tile + kPrefetchBytes);
    Sums<TOKENS> sums;
#pragma GCC unroll 4
    for (int t = 0; t < TOKENS; t++) sums.even[t] = sums.odd[t] = _mm512_setzero_ps();
    dot_tile<Form>(sums, at.tile, in);
    __m512 scale, zero_scaled;
    load_scales<Form>(at.scales, scale, zero_scaled);
    // The weight of an affine grid's middle code; that of a symmetric one is zero.
    const __m512 middle = _mm512_fmsub_ps(scale, _mm512_set1_ps(middle_code(BITS)), zero_scaled);
#pragma GCC unroll 4
    for (int t = 0; t < TOKENS; t++) {
      const __m512 dot = _mm512_add_ps(sums.even[t], sums.odd[t]);
      result[t] = _mm512_fmadd_ps(scale, dot, result[t]);
      if constexpr (GRID == MOETIER_AFFINE)
        result[t] = _mm512_fmadd_ps(middle, _mm512_set1_ps(in.sums[t * in.tiles]), result[t]);
    }
  }
#pragma GCC unroll 4
  for (int t = 0; t < TOKENS; t++)
    _mm512_storeu_ps(y + t * row_stride, scale_rows<GRID>(result[t], rows));
}

template <class Form>
TARGET_AVX512 void multiply_rows(const RowBlocks& rows, const FloatInputs& inputs, int64_t tokens,
                                 float* y, int64_t row_stride) {
  for (int64_t b = 0; b < rows.num_blocks; b++) {
    const RowBlocks block = rows.slice(b, 1);
    for (int64_t t = 0; t < tokens; t += kMaxTokens) {
      const FloatInputs in = inputs.from_token(t);
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

void multiply_fp32_avx512(const RowBlocks& rows, const FloatInputs& inputs, int64_t tokens,
                          float* y, int64_t row_stride) {
  for_form(rows, [&](auto form) {
    multiply_rows<decltype(form)>(rows, inputs, tokens, y, row_stride);
  });
}

}  // namespace moetier
#endif
