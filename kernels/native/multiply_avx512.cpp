// The integer product with AVX-512 VNNI: one vpdpbusd takes a vector of 16 rows x 4 codes and four
// inputs.
#include "multiply.h"
#include "target.h"

#if MOETIER_X86
#include <immintrin.h>

#include <algorithm>

#include "tile.h"

namespace moetier {
namespace {

constexpr int kMaxTokens = 8;
constexpr int kMaxTokensInPlace = 4;
// How far ahead of the tile in hand the weights are fetched. Hardware prefetchers stop at 4 KiB
// pages, so that without this a single token waits for memory (measured best near 5 KB, AMD Zen 5).
// One row block is one sequential stream: taking two at a time was 1.1 to 1.5 times slower at 2 to 4
// tokens and about level from 8 on.
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

template <int TILE_BYTES>
TARGET_AVX512 ALWAYS_INLINE void prefetch_tile(const uint8_t* tile) {
  constexpr int kLines = (TILE_BYTES + 63) / 64;
#pragma GCC unroll 9
  for (int line = 0; line < kLines; line++)
    _mm_prefetch(reinterpret_cast<const char*>(tile + 64 * line), _MM_HINT_T0);
}

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
};

// sums += codes of vector `v` times each token's inputs 4v..4v+3, which every row shares.
template <int TOKENS>
TARGET_AVX512 ALWAYS_INLINE void add_products(__m512i (&sums)[TOKENS], __m512i codes,
                                              const int8_t* x, int v) {
#pragma GCC unroll 8
  for (int t = 0; t < TOKENS; t++) {
    int32_t four_inputs;
    std::memcpy(&four_inputs, x + t * kGroupSize + 4 * v, sizeof four_inputs);
    sums[t] = _mm512_dpbusd_epi32(sums[t], codes, _mm512_set1_epi32(four_inputs));
  }
}

// The products of the two low fields of `bytes`: the lowest BITS bits are vector `low`, the next
// `high`.
template <int BITS, int TOKENS, bool IN_PLACE>
TARGET_AVX512 ALWAYS_INLINE void add_two_fields(Sums<TOKENS, IN_PLACE>& sums, __m512i bytes,
                                                const int8_t* x, int low, int high) {
  constexpr int kField = (1 << BITS) - 1;
  const __m512i mask = _mm512_set1_epi8(static_cast<char>(kField));
  add_products(sums.lower, _mm512_and_si512(bytes, mask), x, low);
  if constexpr (IN_PLACE) {
    const __m512i upper_mask = _mm512_set1_epi8(static_cast<char>(kField << BITS));
    add_products(sums.upper, _mm512_and_si512(bytes, upper_mask), x, high);
  } else {
    add_products(sums.lower, _mm512_and_si512(_mm512_srli_epi16(bytes, BITS), mask), x, high);
  }
}

// Dot products of one tile with every token's 64 inputs at x.
template <int BITS, int TOKENS, bool IN_PLACE>
TARGET_AVX512 ALWAYS_INLINE void dot_tile(Sums<TOKENS, IN_PLACE>& sums, const uint8_t* tile,
                                          const int8_t* x) {
  if constexpr (BITS == 4) {
#pragma GCC unroll 8
    for (int p = 0; p < 8; p++)
      add_two_fields<4>(sums, _mm512_loadu_si512(tile + p * kVectorBytes), x, p, p + 8);
  } else if constexpr (BITS < 3) {
    constexpr int kPlanes = 2 * BITS, kFields = 8 / BITS;
#pragma GCC unroll 4
    for (int p = 0; p < kPlanes; p++) {
      const __m512i plane = _mm512_loadu_si512(tile + p * kVectorBytes);
#pragma GCC unroll 4
      for (int f = 0; f < kFields; f += 2)
        add_two_fields<BITS>(sums, _mm512_srli_epi16(plane, f * BITS), x, p + f * kPlanes,
                             p + (f + 1) * kPlanes);
    }
  } else {
    const __m512i top0 = _mm512_set1_epi8(0x03), top1 = _mm512_set1_epi8(0x0c),
                  top2 = _mm512_set1_epi8(0x30);
    constexpr int kOrAnd = 0xF8;  // truth table of a | (b & c)
#pragma GCC unroll 2
    for (int half = 0; half < 2; half++) {
      const uint8_t* planes = tile + half * 3 * kVectorBytes;
      const __m512i a = _mm512_loadu_si512(planes);
      const __m512i b = _mm512_loadu_si512(planes + kVectorBytes);
      const __m512i c = _mm512_loadu_si512(planes + 2 * kVectorBytes);
      // The two bits that each of the three planes has left over make two more codes per byte.
      __m512i left_over = _mm512_and_si512(_mm512_srli_epi16(a, 6), top0);
      left_over = _mm512_ternarylogic_epi32(left_over, _mm512_srli_epi16(b, 4), top1, kOrAnd);
      left_over = _mm512_ternarylogic_epi32(left_over, _mm512_srli_epi16(c, 2), top2, kOrAnd);
      add_two_fields<3>(sums, a, x, 8 * half, 8 * half + 3);
      add_two_fields<3>(sums, b, x, 8 * half + 1, 8 * half + 4);
      add_two_fields<3>(sums, c, x, 8 * half + 2, 8 * half + 5);
      add_two_fields<3>(sums, left_over, x, 8 * half + 6, 8 * half + 7);
    }
  }
}

template <int BITS, int GRID, int TOKENS>
TARGET_AVX512 void multiply_block(const RowBlocks& rows, Inputs in, float* y, int64_t row_stride) {
  constexpr bool kInPlace = TOKENS <= kMaxTokensInPlace;
  constexpr size_t kTileBytes = tile_bytes(BITS, GRID);
  __m512 result[TOKENS];
#pragma GCC unroll 8
  for (int t = 0; t < TOKENS; t++) result[t] = _mm512_setzero_ps();

  const uint8_t* tile = rows.data;
  for (int64_t g = 0; g < rows.groups; g++, tile += kTileBytes, in = in.next_group()) {
    prefetch_tile<kTileBytes>(tile + kPrefetchBytes);
    Sums<TOKENS, kInPlace> sums;
#pragma GCC unroll 8
    for (int t = 0; t < TOKENS; t++) sums.lower[t] = sums.upper[t] = _mm512_setzero_si512();
    dot_tile<BITS>(sums, tile, in.codes);

    const uint8_t* scales = tile + code_bytes(BITS);
    __m512 scale, zero_scaled;
    if constexpr (GRID == MOETIER_SYMMETRIC) {
      scale = bytes_to_floats(scales);
      zero_scaled = _mm512_set1_ps(middle_code(BITS));
    } else {
      scale = halves_to_floats(scales);
      zero_scaled = halves_to_floats(scales + 2 * kTileRows);
    }
#pragma GCC unroll 8
    for (int t = 0; t < TOKENS; t++) {
      __m512i dot = sums.lower[t];
      // Every term of `upper` is a multiple of 2^BITS: the shift is exact.
      if constexpr (kInPlace) dot = _mm512_add_epi32(dot, _mm512_srai_epi32(sums.upper[t], BITS));
      const __m512 scaled = _mm512_mul_ps(_mm512_cvtepi32_ps(dot), _mm512_set1_ps(in.scale[t]));
      const __m512 sum = _mm512_set1_ps(in.sum[t]);
      if constexpr (GRID == MOETIER_SYMMETRIC) {
        result[t] = _mm512_fmadd_ps(scale, _mm512_fnmadd_ps(zero_scaled, sum, scaled), result[t]);
      } else {
        result[t] = _mm512_fnmadd_ps(zero_scaled, sum, _mm512_fmadd_ps(scaled, scale, result[t]));
      }
    }
  }
  __m512 row_scale;
  if constexpr (GRID == MOETIER_SYMMETRIC)
    row_scale = _mm512_mul_ps(halves_to_floats(rows.row_scales), _mm512_set1_ps(kScale8Unit));
#pragma GCC unroll 8
  for (int t = 0; t < TOKENS; t++) {
    if constexpr (GRID == MOETIER_SYMMETRIC) result[t] = _mm512_mul_ps(result[t], row_scale);
    _mm512_storeu_ps(y + t * row_stride, result[t]);
  }
}

template <int BITS, int GRID>
TARGET_AVX512 void multiply_rows(const RowBlocks& rows, const Inputs& inputs, int64_t tokens,
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
        case 4: multiply_block<BITS, GRID, 4>(block, in, out, row_stride); break;
        case 5: multiply_block<BITS, GRID, 5>(block, in, out, row_stride); break;
        case 6: multiply_block<BITS, GRID, 6>(block, in, out, row_stride); break;
        case 7: multiply_block<BITS, GRID, 7>(block, in, out, row_stride); break;
        default: multiply_block<BITS, GRID, 8>(block, in, out, row_stride);
      }
    }
  }
}

}  // namespace

void multiply_avx512(const RowBlocks& rows, const Inputs& inputs, int64_t tokens, float* y,
                     int64_t row_stride) {
  for_form(rows.bits, rows.grid, [&](auto bits, auto grid) {
    multiply_rows<bits, grid>(rows, inputs, tokens, y, row_stride);
  });
}

}  // namespace moetier
#endif
