// The packed tile in AVX-512 registers, for the products that read it. Included by their files
// only.
#pragma once
#include "target.h"

#if MOETIER_X86
#include <immintrin.h>

#include "tile.h"

namespace moetier {
namespace {

// How far ahead of the tile in hand the weights are fetched. Hardware prefetchers stop at 4 KiB
// pages, so that without this a single token waits for memory (measured best near 5 KB, AMD Zen 5).
// One row block is one sequential stream: taking two at a time was 1.1 to 1.5 times slower at 2 to
// 4 tokens and about level from 8 on.
constexpr size_t kPrefetchBytes = 5120;

TARGET_AVX512 ALWAYS_INLINE __m512 halves_to_floats(const uint8_t* from) {
  // Masked by all ones, which costs nothing: gcc 12 warns of the unmasked form's own header.
  const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return _mm512_maskz_cvtph_ps(0xffff, halves);
}

TARGET_AVX512 ALWAYS_INLINE __m512 bytes_to_floats(const uint8_t* from) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes));
}

template <class Form>
TARGET_AVX512 ALWAYS_INLINE void prefetch_tile(const uint8_t* tile) {
  constexpr int kLines = (Form::kCodeBytes + Form::kScaleBytes + 63) / 64;
#pragma GCC unroll 9
  for (int line = 0; line < kLines; line++)
    _mm_prefetch(reinterpret_cast<const char*>(tile + 64 * line), _MM_HINT_T0);
}

// The scales of one group: symmetric bytes as numbers and the code that stands for zero.
template <class Form>
TARGET_AVX512 ALWAYS_INLINE void load_scales(const uint8_t* scales, __m512& scale,
                                             __m512& zero_scaled) {
  if constexpr (Form::kGrid == MOETIER_SYMMETRIC) {
    scale = bytes_to_floats(scales);
    zero_scaled = _mm512_set1_ps(middle_code(Form::kBits));
  } else {
    scale = halves_to_floats(scales);
    zero_scaled = halves_to_floats(scales + 2 * kTileRows);
  }
}

// sum += scale * dot - zero_scaled * total, for the tile's grid; `total` is the sum of the inputs.
template <int GRID>
TARGET_AVX512 ALWAYS_INLINE __m512 add_tile(__m512 sum, __m512 dot, __m512 total, __m512 scale,
                                            __m512 zero_scaled) {
  if constexpr (GRID == MOETIER_SYMMETRIC)
    return _mm512_fmadd_ps(scale, _mm512_fnmadd_ps(zero_scaled, total, dot), sum);
  else
    return _mm512_fnmadd_ps(zero_scaled, total, _mm512_fmadd_ps(dot, scale, sum));
}

// What a row block's sums are multiplied by at the end: one on an affine grid.
template <int GRID>
TARGET_AVX512 ALWAYS_INLINE __m512 scale_rows(__m512 sum, const RowBlocks& rows) {
  if constexpr (GRID == MOETIER_SYMMETRIC)
    return _mm512_mul_ps(
        sum, _mm512_mul_ps(halves_to_floats(rows.row_scales), _mm512_set1_ps(kScale8Unit)));
  else
    return sum;
}

// Dot products of one tile with every token's inputs. It calls
// sums.add_two_fields<BITS>(bytes, inputs, low, high) for the two low fields of `bytes`: the lowest
// BITS bits are codes of vector `low`, the next of `high`.
template <class Form, class Sums, class TileInputs>
TARGET_AVX512 ALWAYS_INLINE void dot_tile(Sums& sums, const uint8_t* tile,
                                          const TileInputs& x) {
  constexpr int BITS = Form::kBits, VECTORS = Form::kTileVectors;
  if constexpr (BITS == 4) {
#pragma GCC unroll 8
    for (int p = 0; p < VECTORS / 2; p++)
      sums.template add_two_fields<BITS>(_mm512_loadu_si512(tile + p * kVectorBytes), x, p,
                                         p + VECTORS / 2);
  } else if constexpr (BITS < 3) {
    constexpr int kPlanes = BITS * VECTORS / 8, kFields = 8 / BITS;
#pragma GCC unroll 4
    for (int p = 0; p < kPlanes; p++) {
      const __m512i plane = _mm512_loadu_si512(tile + p * kVectorBytes);
#pragma GCC unroll 4
      for (int f = 0; f < kFields; f += 2)
        sums.template add_two_fields<BITS>(_mm512_srli_epi16(plane, f * BITS), x, p + f * kPlanes,
                             p + (f + 1) * kPlanes);
    }
  } else {
    const __m512i top0 = _mm512_set1_epi8(0x03), top1 = _mm512_set1_epi8(0x0c),
                  top2 = _mm512_set1_epi8(0x30);
    constexpr int kOrAnd = 0xF8;  // truth table of a | (b & c)
#pragma GCC unroll 2
    for (int half = 0; half < VECTORS / 8; half++) {
      const uint8_t* planes = tile + half * 3 * kVectorBytes;
      const __m512i a = _mm512_loadu_si512(planes);
      const __m512i b = _mm512_loadu_si512(planes + kVectorBytes);
      const __m512i c = _mm512_loadu_si512(planes + 2 * kVectorBytes);
      // The two bits that each of the three planes has left over make two more codes per byte.
      __m512i left_over = _mm512_and_si512(_mm512_srli_epi16(a, 6), top0);
      left_over = _mm512_ternarylogic_epi32(left_over, _mm512_srli_epi16(b, 4), top1, kOrAnd);
      left_over = _mm512_ternarylogic_epi32(left_over, _mm512_srli_epi16(c, 2), top2, kOrAnd);
      sums.template add_two_fields<BITS>(a, x, 8 * half, 8 * half + 3);
      sums.template add_two_fields<BITS>(b, x, 8 * half + 1, 8 * half + 4);
      sums.template add_two_fields<BITS>(c, x, 8 * half + 2, 8 * half + 5);
      sums.template add_two_fields<BITS>(left_over, x, 8 * half + 6, 8 * half + 7);
    }
  }
}

}  // namespace
}  // namespace moetier
#endif
