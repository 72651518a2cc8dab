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

TARGET_AVX2 ALWAYS_INLINE __m256 bytes_to_floats(const uint8_t* from) {
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
  return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes));
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
  } else if constexpr (BITS < 3) {
    constexpr int kPlanes = 2 * BITS, kFields = 8 / BITS;
#pragma GCC unroll 4
    for (int p = 0; p < kPlanes; p++) {
      const __m256i plane = load(half + p * kVectorBytes);
#pragma GCC unroll 8
      for (int f = 0; f < kFields; f++)
        add_products(sums, bits_at(plane, f * BITS, mask), x, p + f * kPlanes);
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

// result += what one half tile adds for every token; `scales` are those of its eight rows.
template <int BITS, int GRID, int TOKENS>
TARGET_AVX2 ALWAYS_INLINE void add_half_tile(__m256 (&result)[TOKENS], const Sums<TOKENS>& sums,
                                             const uint8_t* scales, const Inputs& in) {
  __m256 scale, zero_scaled;
  if constexpr (GRID == MOETIER_SYMMETRIC) {
    scale = bytes_to_floats(scales);
    zero_scaled = _mm256_set1_ps(middle_code(BITS));
  } else {
    scale = halves_to_floats(scales);
    zero_scaled = halves_to_floats(scales + 2 * kTileRows);
  }
  for (int t = 0; t < TOKENS; t++) {
    const __m256 dot =
        _mm256_mul_ps(_mm256_cvtepi32_ps(sums.wide[t]), _mm256_set1_ps(in.scale[t]));
    const __m256 sum = _mm256_set1_ps(in.sum[t]);
    if constexpr (GRID == MOETIER_SYMMETRIC) {
      result[t] = _mm256_fmadd_ps(scale, _mm256_fnmadd_ps(zero_scaled, sum, dot), result[t]);
    } else {
      result[t] = _mm256_fnmadd_ps(zero_scaled, sum, _mm256_fmadd_ps(dot, scale, result[t]));
    }
  }
}

template <int BITS, int GRID, int TOKENS>
TARGET_AVX2 void multiply_block(const RowBlocks& rows, Inputs in, float* y, int64_t row_stride) {
  constexpr size_t kTileBytes = tile_bytes(BITS, GRID);
  constexpr size_t kScaleBytes = GRID == MOETIER_SYMMETRIC ? 1 : 2;
  __m256 result[2][TOKENS];
  for (int half = 0; half < 2; half++)
    for (int t = 0; t < TOKENS; t++) result[half][t] = _mm256_setzero_ps();
  const uint8_t* tile = rows.data;
  for (int64_t g = 0; g < rows.groups; g++, tile += kTileBytes, in = in.next_group()) {
    for (size_t line = 0; line < kTileBytes; line += 64)
      _mm_prefetch(reinterpret_cast<const char*>(tile + kPrefetchBytes + line), _MM_HINT_T0);
#pragma GCC unroll 2
    for (int half = 0; half < 2; half++) {
      Sums<TOKENS> sums;
      for (int t = 0; t < TOKENS; t++)
        sums.narrow[t] = sums.wide[t] = _mm256_setzero_si256();
      dot_half_tile<BITS, TOKENS>(sums, tile + 32 * half, in.codes);
      const uint8_t* scales = tile + code_bytes(BITS) + half * kScaleBytes * kHalfRows;
      add_half_tile<BITS, GRID, TOKENS>(result[half], sums, scales, in);
    }
  }
  for (int half = 0; half < 2; half++) {
    __m256 row_scale;
    if constexpr (GRID == MOETIER_SYMMETRIC)
      row_scale = _mm256_mul_ps(halves_to_floats(rows.row_scales + half * 2 * kHalfRows),
                                _mm256_set1_ps(kScale8Unit));
    for (int t = 0; t < TOKENS; t++) {
      if constexpr (GRID == MOETIER_SYMMETRIC)
        result[half][t] = _mm256_mul_ps(result[half][t], row_scale);
      _mm256_storeu_ps(y + t * row_stride + half * kHalfRows, result[half][t]);
    }
  }
}

template <int BITS, int GRID>
TARGET_AVX2 void multiply_rows(const RowBlocks& rows, const Inputs& inputs, int64_t tokens,
                               float* y, int64_t row_stride) {
  for (int64_t b = 0; b < rows.num_blocks; b++) {
    const RowBlocks block = rows.slice(b, 1);
    for (int64_t t = 0; t < tokens; t += kMaxTokens) {
      const Inputs in = inputs.from_token(t);
      float* out = y + t * row_stride + b * kTileRows;
      switch (std::min<int64_t>(tokens - t, kMaxTokens)) {
        case 1: multiply_block<BITS, GRID, 1>(block, in, out, row_stride); break;
        case 2: multiply_block<BITS, GRID, 2>(block, in, out, row_stride); break;
        case 3: multiply_block<BITS, GRID, 3>(block, in, out, row_stride); break;
        default: multiply_block<BITS, GRID, 4>(block, in, out, row_stride);
      }
    }
  }
}

}  // namespace

void multiply_avx2(const RowBlocks& rows, const Inputs& inputs, int64_t tokens, float* y,
                   int64_t row_stride) {
  for_form(rows.bits, rows.grid, [&](auto bits, auto grid) {
    multiply_rows<bits, grid>(rows, inputs, tokens, y, row_stride);
  });
}

}  // namespace moetier
#endif
