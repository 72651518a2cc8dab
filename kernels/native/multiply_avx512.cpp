// The integer product with AVX-512 VNNI: one vpdpbusd takes a vector of 16 rows x 4 codes and four inputs.
#include "multiply.h"
#include "target.h"

#if MOETIER_X86
#include <immintrin.h>

#include <algorithm>

#include "tile.h"

namespace moetier {
namespace {

constexpr int kMaxTokens = 8;
#ifndef PAIR
#define PAIR 2
#endif
constexpr int64_t kPairTokens = PAIR;
// How far ahead of the tile in hand the weights are fetched. Hardware prefetchers stop at 4 KiB pages, so
// that without this a single token waits for memory (measured best near 5 KB, AMD Zen 5).
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

// Integer sums of BLOCKS row blocks with TOKENS tokens.
//
// With few tokens (IN_PLACE) the upper field of a byte is masked but not shifted down: its codes then weigh
// 2^BITS, are summed apart in `upper`, and are folded in once a group. That saves a shift per vector and
// gives twice the independent sums to hide the multiplier's latency. With many tokens registers are what
// is short, so that fields are shifted and `upper` is the same as `lower`.
template <int BLOCKS, int TOKENS, bool IN_PLACE>
struct Sums {
  __m512i lower[BLOCKS][TOKENS];
  __m512i upper[IN_PLACE ? BLOCKS : 1][IN_PLACE ? TOKENS : 1];
};

// sums += codes of vector `v` of each block times each token's inputs 4v..4v+3, which every row shares.
template <int BLOCKS, int TOKENS>
TARGET_AVX512 ALWAYS_INLINE void add_products(__m512i (&sums)[BLOCKS][TOKENS],
                                              const __m512i (&codes)[BLOCKS], const int8_t* x,
                                              int v) {
#pragma GCC unroll 8
  for (int t = 0; t < TOKENS; t++) {
    int32_t four_inputs;
    std::memcpy(&four_inputs, x + t * kGroupSize + 4 * v, sizeof four_inputs);
    const __m512i inputs = _mm512_set1_epi32(four_inputs);
#pragma GCC unroll 2
    for (int b = 0; b < BLOCKS; b++)
      sums[b][t] = _mm512_dpbusd_epi32(sums[b][t], codes[b], inputs);
  }
}

// The products of the two low fields of `bytes`: the lowest BITS bits are vector `low`, the next `high`.
template <int BITS, int BLOCKS, int TOKENS, bool IN_PLACE>
TARGET_AVX512 ALWAYS_INLINE void add_two_fields(Sums<BLOCKS, TOKENS, IN_PLACE>& sums,
                                                const __m512i (&bytes)[BLOCKS], const int8_t* x,
                                                int low, int high) {
  constexpr int kField = (1 << BITS) - 1;
  const __m512i mask = _mm512_set1_epi8(static_cast<char>(kField));
  const __m512i upper_mask = _mm512_set1_epi8(static_cast<char>(kField << BITS));
  __m512i lower[BLOCKS], upper[BLOCKS];
#pragma GCC unroll 2
  for (int b = 0; b < BLOCKS; b++) {
    lower[b] = _mm512_and_si512(bytes[b], mask);
    upper[b] = IN_PLACE ? _mm512_and_si512(bytes[b], upper_mask)
                        : _mm512_and_si512(_mm512_srli_epi16(bytes[b], BITS), mask);
  }
  add_products(sums.lower, lower, x, low);
  if constexpr (IN_PLACE)
    add_products(sums.upper, upper, x, high);
  else
    add_products(sums.lower, upper, x, high);
}

template <int BLOCKS>
TARGET_AVX512 ALWAYS_INLINE void load_plane(__m512i (&plane)[BLOCKS], const uint8_t* tile,
                                            size_t block_bytes, int index) {
#pragma GCC unroll 2
  for (int b = 0; b < BLOCKS; b++)
    plane[b] = _mm512_loadu_si512(tile + b * block_bytes + index * kVectorBytes);
}

// Dot products of one tile of each block with every token's 64 inputs at x.
template <int BITS, int BLOCKS, int TOKENS, bool IN_PLACE>
TARGET_AVX512 ALWAYS_INLINE void dot_tile(Sums<BLOCKS, TOKENS, IN_PLACE>& sums, const uint8_t* tile,
                                          size_t block_bytes, const int8_t* x) {
  __m512i plane[BLOCKS];
  if constexpr (BITS == 4) {
#pragma GCC unroll 8
    for (int p = 0; p < 8; p++) {
      load_plane(plane, tile, block_bytes, p);
      add_two_fields<4>(sums, plane, x, p, p + 8);
    }
  } else if constexpr (BITS == 2) {
#pragma GCC unroll 4
    for (int p = 0; p < 4; p++) {
      load_plane(plane, tile, block_bytes, p);
      add_two_fields<2>(sums, plane, x, p, p + 4);
#pragma GCC unroll 2
      for (int b = 0; b < BLOCKS; b++) plane[b] = _mm512_srli_epi16(plane[b], 4);
      add_two_fields<2>(sums, plane, x, p + 8, p + 12);
    }
  } else {
    const __m512i top0 = _mm512_set1_epi8(0x03), top1 = _mm512_set1_epi8(0x0c),
                  top2 = _mm512_set1_epi8(0x30);
#pragma GCC unroll 2
    for (int half = 0; half < 2; half++) {
      // The two bits that each of the three planes has left over make two more codes per byte.
      __m512i left_over[BLOCKS];
#pragma GCC unroll 3
      for (int k = 0; k < 3; k++) {
        load_plane(plane, tile, block_bytes, 3 * half + k);
#pragma GCC unroll 2
        for (int b = 0; b < BLOCKS; b++) {
          const __m512i down = _mm512_srli_epi16(plane[b], 6 - 2 * k);
          const __m512i top = k == 0 ? top0 : k == 1 ? top1 : top2;
          constexpr int kOrAnd = 0xF8;  // truth table of a | (b & c)
          left_over[b] = k == 0 ? _mm512_and_si512(down, top)
                                : _mm512_ternarylogic_epi32(left_over[b], down, top, kOrAnd);
        }
        add_two_fields<3>(sums, plane, x, 8 * half + k, 8 * half + 3 + k);
      }
      add_two_fields<3>(sums, left_over, x, 8 * half + 6, 8 * half + 7);
    }
  }
}

template <int BITS, int BLOCKS, int TOKENS, bool IN_PLACE>
TARGET_AVX512 void multiply_blocks(const uint8_t* tile, size_t block_bytes, int64_t groups,
                                   Inputs in, float* y, int64_t row_stride) {
  __m512 result[BLOCKS][TOKENS];
#pragma GCC unroll 2
  for (int b = 0; b < BLOCKS; b++)
#pragma GCC unroll 8
    for (int t = 0; t < TOKENS; t++) result[b][t] = _mm512_setzero_ps();

  for (int64_t g = 0; g < groups; g++) {
#pragma GCC unroll 2
    for (int b = 0; b < BLOCKS; b++) prefetch_tile<BITS>(tile + b * block_bytes + kPrefetchBytes);

    Sums<BLOCKS, TOKENS, IN_PLACE> sums;
#pragma GCC unroll 2
    for (int b = 0; b < BLOCKS; b++)
#pragma GCC unroll 8
      for (int t = 0; t < TOKENS; t++) {
        sums.lower[b][t] = _mm512_setzero_si512();
        if (IN_PLACE) sums.upper[b][t] = _mm512_setzero_si512();
      }
    dot_tile<BITS>(sums, tile, block_bytes, in.codes);

#pragma GCC unroll 2
    for (int b = 0; b < BLOCKS; b++) {
      const uint8_t* scales = tile + b * block_bytes + code_bytes(BITS);
      const __m512 scale = halves_to_floats(scales);
      const __m512 zero_scaled = halves_to_floats(scales + 2 * kTileRows);
#pragma GCC unroll 8
      for (int t = 0; t < TOKENS; t++) {
        __m512i dot = sums.lower[b][t];
        // Every term of `upper` is a multiple of 2^BITS: the shift is exact.
        if constexpr (IN_PLACE)
          dot = _mm512_add_epi32(dot, _mm512_srai_epi32(sums.upper[b][t], BITS));
        const __m512 scaled = _mm512_mul_ps(_mm512_cvtepi32_ps(dot), _mm512_set1_ps(in.scale[t]));
        const __m512 r = _mm512_fmadd_ps(scaled, scale, result[b][t]);
        result[b][t] = _mm512_fnmadd_ps(zero_scaled, _mm512_set1_ps(in.sum[t]), r);
      }
    }
    tile += tile_bytes(BITS);
    in = Inputs{in.codes + in.stride * kGroupSize, in.scale + in.stride, in.sum + in.stride,
                in.stride};
  }
#pragma GCC unroll 2
  for (int b = 0; b < BLOCKS; b++)
#pragma GCC unroll 8
    for (int t = 0; t < TOKENS; t++)
      _mm512_storeu_ps(y + t * row_stride + b * kTileRows, result[b][t]);
}

// BLOCKS row blocks with all tokens, at most kMaxTokens at a time.
template <int BITS, int BLOCKS>
TARGET_AVX512 void multiply_tokens(const uint8_t* data, size_t block_bytes, int64_t groups,
                                   const Inputs& inputs, int64_t tokens, float* y,
                                   int64_t row_stride) {
  for (int64_t t = 0; t < tokens; t += kMaxTokens) {
    const Inputs in = inputs.from_token(t);
    float* out = y + t * row_stride;
#define MOETIER_CASE(count, in_place)                                                           \
  case count:                                                                                   \
    multiply_blocks<BITS, BLOCKS, count, in_place>(data, block_bytes, groups, in, out, row_stride); \
    break;
    switch (std::min<int64_t>(tokens - t, kMaxTokens)) {
      MOETIER_CASE(1, true)
      MOETIER_CASE(2, true)
      MOETIER_CASE(3, true)
      MOETIER_CASE(4, true)
      MOETIER_CASE(5, false)
      MOETIER_CASE(6, false)
      MOETIER_CASE(7, false)
      MOETIER_CASE(8, false)
    }
#undef MOETIER_CASE
  }
}

template <int BITS>
TARGET_AVX512 void multiply_rows(const RowBlocks& rows, const Inputs& inputs, int64_t tokens,
                                 float* y, int64_t row_stride) {
  const size_t block_bytes = static_cast<size_t>(rows.groups) * tile_bytes(BITS);
  int64_t b = 0;
  // Two row blocks share each broadcast of the inputs, which pays from two tokens on; for one token a
  // second stream of weights only disturbs the prefetching of the first.
  if (tokens >= kPairTokens)
    for (; b + 2 <= rows.num_blocks; b += 2)
      multiply_tokens<BITS, 2>(rows.data + b * block_bytes, block_bytes, rows.groups, inputs,
                               tokens, y + b * kTileRows, row_stride);
  for (; b < rows.num_blocks; b++)
    multiply_tokens<BITS, 1>(rows.data + b * block_bytes, block_bytes, rows.groups, inputs, tokens,
                             y + b * kTileRows, row_stride);
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
