// The integer product with AVX-512 VNNI: one vpdpbusd takes a vector of 16 rows x 4 codes and four
// inputs.
#include "multiply.h"
#include "target.h"

#if MOETIER_X86
#include <immintrin.h>

#include <algorithm>

#include "tile_avx512.h"

namespace moetier {
namespace {

// Sixteen integer sums leave no register for the float ones, which are used once a group and lie in
// the L1 cache; unpacking and reading a tile once instead of twice is worth more (3 to 10 %).
constexpr int kManyTokens = 16;
constexpr int kMaxTokens = 8;  // of fewer
constexpr int kMaxTokensInPlace = 4;

// Integer sums of one row block with TOKENS tokens.
//
// With few tokens (IN_PLACE) the upper field of a byte is masked but not shifted down: its codes
// then weigh 2^BITS, are summed apart in `upper`, and are folded in once a group. That saves a
// shift per vector and gives twice the independent sums to hide the multiplier's latency. With more
// tokens the shift is shared by all of them, and `upper` is not used.
template <int TOKENS, bool IN_PLACE>
struct Sums {
  __m512i lower[TOKENS];
  __m512i upper[TOKENS];

  template <int BITS>
  TARGET_AVX512 ALWAYS_INLINE void add_two_fields(__m512i bytes, const int8_t* x, int low,
                                                  int high) {
    constexpr int kField = (1 << BITS) - 1;
    const __m512i mask = _mm512_set1_epi8(static_cast<char>(kField));
    add_products(lower, _mm512_and_si512(bytes, mask), x, low);
    if constexpr (IN_PLACE) {
      const __m512i upper_mask = _mm512_set1_epi8(static_cast<char>(kField << BITS));
      add_products(upper, _mm512_and_si512(bytes, upper_mask), x, high);
    } else {
      add_products(lower, _mm512_and_si512(_mm512_srli_epi16(bytes, BITS), mask), x, high);
    }
  }

  // sums += codes of vector `v` times each token's inputs 4v..4v+3, which every row shares.
  TARGET_AVX512 static ALWAYS_INLINE void add_products(__m512i (&sums)[TOKENS], __m512i codes,
                                                       const int8_t* x, int v) {
#pragma GCC unroll 16
    for (int t = 0; t < TOKENS; t++) {
      int32_t four_inputs;
      std::memcpy(&four_inputs, x + t * kTileCols + 4 * v, sizeof four_inputs);
      sums[t] = _mm512_dpbusd_epi32(sums[t], codes, _mm512_set1_epi32(four_inputs));
    }
  }
};

// Not inlined, as in multiply_avx2.cpp.
template <class Form, int TOKENS>
TARGET_AVX512 NEVER_INLINE void multiply_block(const RowBlocks& rows, const Inputs& inputs,
                                               float* y, int64_t row_stride) {
  constexpr int BITS = Form::kBits, GRID = Form::kGrid;
  constexpr bool kInPlace = TOKENS <= kMaxTokensInPlace;
  __m512 result[TOKENS];
#pragma GCC unroll 16
  for (int t = 0; t < TOKENS; t++) result[t] = _mm512_setzero_ps();

  TileWalk<Form> at(rows);
  InputWalk<Form> in(inputs);
  for (int64_t i = 0; i < rows.tiles; i++, at.next(), in.next()) {
    prefetch_tile<Form>(at.tile + kPrefetchBytes);
    Sums<TOKENS, kInPlace> sums;
#pragma GCC unroll 16
    for (int t = 0; t < TOKENS; t++) sums.lower[t] = sums.upper[t] = _mm512_setzero_si512();
    dot_tile<Form>(sums, at.tile, in.codes());

    __m512 scale, zero_scaled;
    load_scales<Form>(at.scales, scale, zero_scaled);
#pragma GCC unroll 16
    for (int t = 0; t < TOKENS; t++) {
      __m512i dot = sums.lower[t];
      // Every term of `upper` is a multiple of 2^BITS: the shift is exact.
      if constexpr (kInPlace) dot = _mm512_add_epi32(dot, _mm512_srai_epi32(sums.upper[t], BITS));
      const __m512 scaled = _mm512_mul_ps(_mm512_cvtepi32_ps(dot), _mm512_set1_ps(in.scale(t)));
      result[t] = add_tile<GRID>(result[t], scaled, _mm512_set1_ps(in.sum(t)), scale, zero_scaled);
    }
  }
#pragma GCC unroll 16
  for (int t = 0; t < TOKENS; t++)
    _mm512_storeu_ps(y + t * row_stride, scale_rows<GRID>(result[t], rows));
}

template <class Form>
TARGET_AVX512 void multiply_rows(const RowBlocks& rows, const Inputs& inputs, int64_t tokens,
                                 float* y, int64_t row_stride) {
  for (int64_t b = 0; b < rows.num_blocks; b++) {
    const RowBlocks block = rows.slice(b, 1);
    int64_t step;
    for (int64_t t = 0; t < tokens; t += step) {
      const int64_t left = tokens - t;
      step = left >= kManyTokens ? kManyTokens : std::min<int64_t>(left, kMaxTokens);
      const Inputs in = inputs.from_token(t);
      float* out = y + t * row_stride + b * kTileRows;
      switch (step) {
        case 1: multiply_block<Form, 1>(block, in, out, row_stride); break;
        case 2: multiply_block<Form, 2>(block, in, out, row_stride); break;
        case 3: multiply_block<Form, 3>(block, in, out, row_stride); break;
        case 4: multiply_block<Form, 4>(block, in, out, row_stride); break;
        case 5: multiply_block<Form, 5>(block, in, out, row_stride); break;
        case 6: multiply_block<Form, 6>(block, in, out, row_stride); break;
        case 7: multiply_block<Form, 7>(block, in, out, row_stride); break;
        case 8: multiply_block<Form, 8>(block, in, out, row_stride); break;
        default: multiply_block<Form, 16>(block, in, out, row_stride);
      }
    }
  }
}

}  // namespace

void multiply_avx512(const RowBlocks& rows, const Inputs& inputs, int64_t tokens, float* y,
                     int64_t row_stride) {
  for_form(rows, [&](auto form) {
    multiply_rows<decltype(form)>(rows, inputs, tokens, y, row_stride);
  });
}

}  // namespace moetier
#endif
