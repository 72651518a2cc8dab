// The packed tile in AVX2 registers, two for a vector, for the products that read it. Included by
// their files only.
#pragma once
#include "target.h"

#if MOETIER_X86
#include <immintrin.h>

#include "tile.h"

namespace moetier {
namespace {

constexpr int kHalfRows = 8;  // rows of one register
constexpr size_t kPrefetchBytes = 4096;

template <class Form>
TARGET_AVX2 ALWAYS_INLINE void prefetch_tile(const uint8_t* tile) {
  constexpr int kBytes = Form::kCodeBytes + Form::kScaleBytes;
  for (int line = 0; line < kBytes; line += 64)
    _mm_prefetch(reinterpret_cast<const char*>(tile + line), _MM_HINT_T0);
}

// A vector of 64 bytes: rows 0 to 7 and rows 8 to 15.
struct Bytes {
  __m256i half[2];
};

TARGET_AVX2 ALWAYS_INLINE Bytes load(const uint8_t* from) {
  const __m256i* halves = reinterpret_cast<const __m256i*>(from);
  return {{_mm256_loadu_si256(halves), _mm256_loadu_si256(halves + 1)}};
}

TARGET_AVX2 ALWAYS_INLINE Bytes bits_at(const Bytes& bytes, int shift, __m256i mask) {
  return {{_mm256_and_si256(_mm256_srli_epi16(bytes.half[0], shift), mask),
           _mm256_and_si256(_mm256_srli_epi16(bytes.half[1], shift), mask)}};
}

TARGET_AVX2 ALWAYS_INLINE Bytes either(const Bytes& a, const Bytes& b) {
  return {{_mm256_or_si256(a.half[0], b.half[0]), _mm256_or_si256(a.half[1], b.half[1])}};
}

TARGET_AVX2 ALWAYS_INLINE __m256 bytes_to_floats(const uint8_t* from) {
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
  return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes));
}

TARGET_AVX2 ALWAYS_INLINE __m256 halves_to_floats(const uint8_t* from) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}

// The scales of half the rows of a group: symmetric bytes as numbers and the code that stands for
// zero.
template <class Form>
TARGET_AVX2 ALWAYS_INLINE void load_scales(const uint8_t* scales, int half, __m256& scale,
                                           __m256& zero_scaled) {
  scales += half * kHalfRows * (Form::kGrid == MOETIER_SYMMETRIC ? 1 : 2);
  if constexpr (Form::kGrid == MOETIER_SYMMETRIC) {
    scale = bytes_to_floats(scales);
    zero_scaled = _mm256_set1_ps(middle_code(Form::kBits));
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
    return _mm256_mul_ps(
        sum, _mm256_mul_ps(halves_to_floats(rows.row_scales + half * 2 * kHalfRows),
                           _mm256_set1_ps(kScale8Unit)));
  else
    return sum;
}

// Dot products of one tile with every token's inputs. It calls
// add_products(sums, codes, inputs, v) for vector v and widen(sums) at the end; with 4 bits also
// after each eight vectors.
template <class Form, class Sums, class TileInputs>
TARGET_AVX2 ALWAYS_INLINE void dot_tile(Sums& sums, const uint8_t* tile, const TileInputs& x) {
  constexpr int BITS = Form::kBits, VECTORS = Form::kTileVectors;
  const __m256i mask = _mm256_set1_epi8((1 << BITS) - 1);
  if constexpr (BITS == 4) {
#pragma GCC unroll 8
    for (int p = 0; p < VECTORS / 2; p++) {
      const Bytes plane = load(tile + p * kVectorBytes);
      add_products(sums, bits_at(plane, 0, mask), x, p);
      add_products(sums, bits_at(plane, 4, mask), x, p + VECTORS / 2);
      if (p == 3 && VECTORS > 8) widen(sums);
    }
  } else if constexpr (BITS < 3) {
    constexpr int kPlanes = BITS * VECTORS / 8, kFields = 8 / BITS;
#pragma GCC unroll 4
    for (int p = 0; p < kPlanes; p++) {
      const Bytes plane = load(tile + p * kVectorBytes);
#pragma GCC unroll 8
      for (int f = 0; f < kFields; f++)
        add_products(sums, bits_at(plane, f * BITS, mask), x, p + f * kPlanes);
    }
  } else {
    const __m256i top0 = _mm256_set1_epi8(0x03), top1 = _mm256_set1_epi8(0x0c),
                  top2 = _mm256_set1_epi8(0x30);
#pragma GCC unroll 2
    for (int h = 0; h < VECTORS / 8; h++) {
      const uint8_t* planes = tile + h * 3 * kVectorBytes;
      Bytes left_over = {{_mm256_setzero_si256(), _mm256_setzero_si256()}};
#pragma GCC unroll 3
      for (int k = 0; k < 3; k++) {
        const Bytes plane = load(planes + k * kVectorBytes);
        add_products(sums, bits_at(plane, 0, mask), x, 8 * h + k);
        add_products(sums, bits_at(plane, 3, mask), x, 8 * h + 3 + k);
        const __m256i top = k == 0 ? top0 : k == 1 ? top1 : top2;
        left_over = either(left_over, bits_at(plane, 6 - 2 * k, top));
      }
      add_products(sums, bits_at(left_over, 0, mask), x, 8 * h + 6);
      add_products(sums, bits_at(left_over, 3, mask), x, 8 * h + 7);
    }
  }
  widen(sums);
}

}  // namespace
}  // namespace moetier
#endif
