// The integer product with AVX2: u8 x s8 pairs into int16 (vpmaddubsw), widened to int32 once or
// twice a group.
#include "multiply.h"
#include "target.h"

#if MOETIER_X86
#include <immintrin.h>

#include <algorithm>

#include "tile.h"

namespace moetier {
namespace {

// More would spill: each token holds an int16, an int32 and a float sum.
constexpr int kMaxTokens = 4;
// One tile is read as two halves of eight rows: a 64-byte vector is two 32-byte registers.
constexpr int kHalfRows = 8;
constexpr size_t kPrefetchBytes = 4096;

TARGET_AVX2 ALWAYS_INLINE __m256i load(const uint8_t* from) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
}

TARGET_AVX2 ALWAYS_INLINE __m256i bits_at(__m256i bytes, int shift, __m256i mask) {
  return _mm256_and_si256(_mm256_srli_epi16(bytes, shift), mask);
}

TARGET_AVX2 ALWAYS_INLINE __m256 halves_to_floats(const uint8_t* from) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}

// The sums of one half tile with TOKENS tokens.
template <int TOKENS>
struct Sums {
  __m256i narrow[TOKENS];  // int16, at most 16 products deep
  __m256i wide[TOKENS];    // int32
};

// narrow += codes of vector `v` times each token's inputs 4v..4v+3, which every row shares.
template <int TOKENS>
TARGET_AVX2 ALWAYS_INLINE void add_products(Sums<TOKENS>& sums, __m256i codes, const int8_t* x,
                                            int v) {
#pragma GCC unroll 4
  for (int t = 0; t < TOKENS; t++) {
    int32_t four_inputs;
    std::memcpy(&four_inputs, x + t * kGroupSize + 4 * v, sizeof four_inputs);
    sums.narrow[t] = _mm256_add_epi16(
        sums.narrow[t], _mm256_maddubs_epi16(codes, _mm256_set1_epi32(four_inputs)));
  }
}

template <int TOKENS>
TARGET_AVX2 ALWAYS_INLINE void widen(Sums<TOKENS>& sums) {
  const __m256i one = _mm256_set1_epi16(1);
#pragma GCC unroll 4
  for (int t = 0; t < TOKENS; t++) {
    sums.wide[t] = _mm256_add_epi32(sums.wide[t], _mm256_madd_epi16(sums.narrow[t], one));
    sums.narrow[t] = _mm256_setzero_si256();
  }
}

// Dot products of one half tile. An int16 sum of pairs stays below 32767: at most
// 16 x 2 x 7 x 127 = 28448 for 3 bits; 4 bits (15 x 127 x 2 = 3810 each) widen after eight.
template <int BITS, int TOKENS>
TARGET_AVX2 ALWAYS_INLINE void dot_half_tile(Sums<TOKENS>& sums, const uint8_t* half,
                                             const int8_t* x) {
  const __m256i mask = _mm256_set1_epi8((1 << BITS) - 1);
  if constexpr (BITS == 4) {
#pragma GCC unroll 8
    for (int p = 0; p < 8; p++) {
      const __m256i plane = load(half + p * kVectorBytes);
      add_products(sums, _mm256_and_si256(plane, mask), x, p);
      add_products(sums, bits_at(plane, 4, mask), x, p + 8);
      if (p == 3) widen(sums);
    }
  } else if constexpr (BITS == 2) {
#pragma GCC unroll 4
    for (int p = 0; p < 4; p++) {
      const __m256i plane = load(half + p * kVectorBytes);
      add_products(sums, _mm256_and_si256(plane, mask), x, p);
      add_products(sums, bits_at(plane, 2, mask), x, p + 4);
      add_products(sums, bits_at(plane, 4, mask), x, p + 8);
      add_products(sums, bits_at(plane, 6, mask), x, p + 12);
    }
  } else {
    const __m256i top0 = _mm256_set1_epi8(0x03), top1 = _mm256_set1_epi8(0x0c),
                  top2 = _mm256_set1_epi8(0x30);
#pragma GCC unroll 2
    for (int h = 0; h < 2; h++) {
      const uint8_t* planes = half + h * 3 * kVectorBytes;
      __m256i left_over = _mm256_setzero_si256();
#pragma GCC unroll 3
      for (int k = 0; k < 3; k++) {
        const __m256i plane = load(planes + k * kVectorBytes);
        add_products(sums, _mm256_and_si256(plane, mask), x, 8 * h + k);
        add_products(sums, bits_at(plane, 3, mask), x, 8 * h + 3 + k);
        left_over = _mm256_or_si256(
            left_over, bits_at(plane, 6 - 2 * k, k == 0 ? top0 : k == 1 ? top1 : top2));
      }
      add_products(sums, _mm256_and_si256(left_over, mask), x, 8 * h + 6);
      add_products(sums, bits_at(left_over, 3, mask), x, 8 * h + 7);
    }
  }
  widen(sums);
}

template <int BITS, int TOKENS>
TARGET_AVX2 void multiply_block(const uint8_t* block, int64_t groups, Inputs in, float* y,
                                int64_t row_stride) {
  __m256 result[2][TOKENS];
  for (int half = 0; half < 2; half++)
    for (int t = 0; t < TOKENS; t++) result[half][t] = _mm256_setzero_ps();
  for (int64_t g = 0; g < groups; g++) {
    for (size_t line = 0; line < tile_bytes(BITS); line += 64)
      _mm_prefetch(reinterpret_cast<const char*>(block + kPrefetchBytes + line), _MM_HINT_T0);
#pragma GCC unroll 2
    for (int half = 0; half < 2; half++) {
      Sums<TOKENS> sums;
      for (int t = 0; t < TOKENS; t++)
        sums.narrow[t] = sums.wide[t] = _mm256_setzero_si256();
      dot_half_tile<BITS, TOKENS>(sums, block + 32 * half, in.codes);
      const uint8_t* scales = block + code_bytes(BITS) + half * 2 * kHalfRows;
      const __m256 scale = halves_to_floats(scales);
      const __m256 zero_scaled = halves_to_floats(scales + 2 * kTileRows);
      for (int t = 0; t < TOKENS; t++) {
        const __m256 dot =
            _mm256_mul_ps(_mm256_cvtepi32_ps(sums.wide[t]), _mm256_set1_ps(in.scale[t]));
        __m256 r = _mm256_fmadd_ps(dot, scale, result[half][t]);
        result[half][t] = _mm256_fnmadd_ps(zero_scaled, _mm256_set1_ps(in.sum[t]), r);
      }
    }
    block += tile_bytes(BITS);
    in = in.next_group();
  }
  for (int t = 0; t < TOKENS; t++) {
    _mm256_storeu_ps(y + t * row_stride, result[0][t]);
    _mm256_storeu_ps(y + t * row_stride + kHalfRows, result[1][t]);
  }
}

template <int BITS>
TARGET_AVX2 void multiply_rows(const RowBlocks& rows, const Inputs& inputs, int64_t tokens,
                               float* y, int64_t row_stride) {
  const size_t block_bytes = static_cast<size_t>(rows.groups) * tile_bytes(BITS);
  for (int64_t b = 0; b < rows.num_blocks; b++) {
    const uint8_t* block = rows.data + b * block_bytes;
    for (int64_t t = 0; t < tokens; t += kMaxTokens) {
      const Inputs in = inputs.from_token(t);
      float* out = y + t * row_stride + b * kTileRows;
      switch (std::min<int64_t>(tokens - t, kMaxTokens)) {
        case 1: multiply_block<BITS, 1>(block, rows.groups, in, out, row_stride); break;
        case 2: multiply_block<BITS, 2>(block, rows.groups, in, out, row_stride); break;
        case 3: multiply_block<BITS, 3>(block, rows.groups, in, out, row_stride); break;
        default: multiply_block<BITS, 4>(block, rows.groups, in, out, row_stride);
      }
    }
  }
}

}  // namespace

void multiply_avx2(const RowBlocks& rows, const Inputs& inputs, int64_t tokens, float* y,
                   int64_t row_stride) {
  if (rows.bits == 2) return multiply_rows<2>(rows, inputs, tokens, y, row_stride);
  if (rows.bits == 3) return multiply_rows<3>(rows, inputs, tokens, y, row_stride);
  multiply_rows<4>(rows, inputs, tokens, y, row_stride);
}

}  // namespace moetier
#endif
