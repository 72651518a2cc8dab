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
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}

template <int BITS>
TARGET_AVX512 ALWAYS_INLINE void prefetch_tile(const uint8_t* tile) {
  constexpr int kLines = tile_bytes(BITS) / 64;
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
  } else if constexpr (BITS == 2) {
#pragma GCC unroll 4
    for (int p = 0; p < 4; p++) {
      const __m512i plane = _mm512_loadu_si512(tile + p * kVectorBytes);
      add_two_fields<2>(sums, plane, x, p, p + 4);
      add_two_fields<2>(sums, _mm512_srli_epi16(plane, 4), x, p + 8, p + 12);
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

template <int BITS, int TOKENS>
TARGET_AVX512 void multiply_block(const uint8_t* tile, int64_t groups, Inputs in, float* y,
                                  int64_t row_stride) {
  constexpr bool kInPlace = TOKENS <= kMaxTokensInPlace;
  __m512 result[TOKENS];
#pragma GCC unroll 8
  for (int t = 0; t < TOKENS; t++) result[t] = _mm512_setzero_ps();

  for (int64_t g = 0; g < groups; g++) {
    prefetch_tile<BITS>(tile + kPrefetchBytes);
    Sums<TOKENS, kInPlace> sums;
#pragma GCC unroll 8
    for (int t = 0; t < TOKENS; t++) sums.lower[t] = sums.upper[t] = _mm512_setzero_si512();
    dot_tile<BITS>(sums, tile, in.codes);

    const __m512 scale = halves_to_floats(tile + code_bytes(BITS));
    const __m512 zero_scaled = halves_to_floats(tile + code_bytes(BITS) + 2 * kTileRows);
#pragma GCC unroll 8
    for (int t = 0; t < TOKENS; t++) {
      __m512i dot = sums.lower[t];
      // Every term of `upper` is a multiple of 2^BITS: the shift is exact.
      if constexpr (kInPlace) dot = _mm512_add_epi32(dot, _mm512_srai_epi32(sums.upper[t], BITS));
      const __m512 scaled = _mm512_mul_ps(_mm512_cvtepi32_ps(dot), _mm512_set1_ps(in.scale[t]));
      const __m512 sum = _mm512_fmadd_ps(scaled, scale, result[t]);
      result[t] = _mm512_fnmadd_ps(zero_scaled, _mm512_set1_ps(in.sum[t]), sum);
    }
    tile += tile_bytes(BITS);
    in = in.next_group();
  }
#pragma GCC unroll 8
  for (int t = 0; t < TOKENS; t++) _mm512_storeu_ps(y + t * row_stride, result[t]);
}

template <int BITS>
TARGET_AVX512 void multiply_rows(const RowBlocks& rows, const Inputs& inputs, int64_t tokens,
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
        case 4: multiply_block<BITS, 4>(block, rows.groups, in, out, row_stride); break;
        case 5: multiply_block<BITS, 5>(block, rows.groups, in, out, row_stride); break;
        case 6: multiply_block<BITS, 6>(block, rows.groups, in, out, row_stride); break;
        case 7: multiply_block<BITS, 7>(block, rows.groups, in, out, row_stride); break;
        default: multiply_block<BITS, 8>(block, rows.groups, in, out, row_stride);
      }
    }
  }
}

}  // namespace

void multiply_avx512(const RowBlocks& rows, const Inputs& inputs, int64_t tokens, float* y,
                     int64_t row_stride) {
  if (rows.bits == 2) return multiply_rows<2>(rows, inputs, tokens, y, row_stride);
  if (rows.bits == 3) return multiply_rows<3>(rows, inputs, tokens, y, row_stride);
  multiply_rows<4>(rows, inputs, tokens, y, row_stride);
}

}  // namespace moetier
#endif
