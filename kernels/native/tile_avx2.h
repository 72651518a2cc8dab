// Half a packed tile, eight rows, in AVX2 registers, for the products that read it. Included by
// their files only.
#pragma once
#include "target.h"

#if MOETIER_X86
#include <immintrin.h>

#include "tile.h"

namespace moetier {
namespace {

// One tile is read as two halves of eight rows: a 64-byte vector is two 32-byte registers.
constexpr int kHalfRows = 8;
constexpr size_t kPrefetchBytes = 4096;

template <int TILE_BYTES>
TARGET_AVX2 ALWAYS_INLINE void prefetch_tile(const uint8_t* tile) {
  for (int line = 0; line < TILE_BYTES; line += 64)
    _mm_prefetch(reinterpret_cast<const char*>(tile + line), _MM_HINT_T0);
}

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

// The scales of half `half` of a tile: symmetric bytes as numbers and the code that stands for zero.
template <int BITS, int GRID>
TARGET_AVX2 ALWAYS_INLINE void load_scales(const uint8_t* tile, int half, __m256& scale,
                                           __m256& zero_scaled) {
  constexpr int kScaleBytes = GRID == MOETIER_SYMMETRIC ? 1 : 2;
  const uint8_t* scales = tile + code_bytes(BITS) + half * kScaleBytes * kHalfRows;
  if constexpr (GRID == MOETIER_SYMMETRIC) {
    scale = bytes_to_floats(scales);
    zero_scaled = _mm256_set1_ps(middle_code(BITS));
  } else {
    scale = halves_to_floats(scales);
    zero_scaled = halves_to_floats(scales + 2 * kTileRows);
  }
}

// sum += scale * dot - zero_scaled * total, for the tile's grid; `total` is the sum of the inputs.
template <int GRID>
TARGET_AVX2 ALWAYS_INLINE __m256 add_tile(__m256 sum, __m256 dot, __m256 total, __m256 scale,
                                          __m256 zero_scaled) {
  if constexpr (GRID == MOETIER_SYMMETRIC)
    return _mm256_fmadd_ps(scale, _mm256_fnmadd_ps(zero_scaled, total, dot), sum);
  else
    return _mm256_fnmadd_ps(zero_scaled, total, _mm256_fmadd_ps(dot, scale, sum));
}

// What a row block's sums are multiplied by at the end: one on an affine grid.
template <int GRID>
TARGET_AVX2 ALWAYS_INLINE __m256 scale_rows(__m256 sum, const RowBlocks& rows, int half) {
  if constexpr (GRID == MOETIER_SYMMETRIC)
    return _mm256_mul_ps(sum, _mm256_mul_ps(halves_to_floats(rows.row_scales + half * 2 * kHalfRows),
                                            _mm256_set1_ps(kScale8Unit)));
  else
    return sum;
}

// Dot products of one half tile with every token's 64 inputs. It calls
// add_products(sums, codes, inputs, v) for vector v and widen(sums) at the end; with 4 bits also
// after eight vectors.
template <int BITS, class Sums, class TileInputs>
TARGET_AVX2 ALWAYS_INLINE void dot_half_tile(Sums& sums, const uint8_t* half,
                                             const TileInputs& x) {
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

}  // namespace
}  // namespace moetier
#endif
