// Quantises activations to int8, one scale (largest magnitude / 127) per token and 64 inputs.
//
// The formula is written once and compiled for each instruction set; without fused multiply-add in
// it the results are the same to the bit everywhere.
#include "inputs.h"

#include <cstring>
#include <limits>

#include "moetier_kernels.h"
#include "target.h"
#include "tile.h"

namespace moetier {
namespace {

ALWAYS_INLINE void quantize_group(const float* x, int8_t* codes, float* scale, float* sum) {
  // Magnitudes compare as integers, and a NaN is the largest of them, so none can hide in the
  // maximum.
  int32_t largest_bits = 0;
  for (int i = 0; i < kTileCols; i++) {
    int32_t bits;
    std::memcpy(&bits, x + i, sizeof bits);
    bits &= 0x7fffffff;
    largest_bits = bits > largest_bits ? bits : largest_bits;
  }
  float largest;
  std::memcpy(&largest, &largest_bits, sizeof largest);
  if (largest_bits >= 0x7f800000) {  // NaN or infinity: the token's results become NaN, visibly
    std::memset(codes, 0, kTileCols);
    *scale = *sum = std::numeric_limits<float>::quiet_NaN();
    return;
  }
  // Below 2^-100 the inverse scale would overflow; such a group is zero to every float32 sum.
  const float inverse = largest > 0x1p-100f ? 127.f / largest : 0.f;
  int32_t total = 0;
  for (int i = 0; i < kTileCols; i++) {
    // Adding and subtracting 1.5 * 2^23 rounds to the nearest integer, ties to even, on any
    // machine.
    const float rounded = (x[i] * inverse + 12582912.f) - 12582912.f;
    const int32_t code = static_cast<int32_t>(rounded);
    codes[i] = static_cast<int8_t>(code);
    total += code;
  }
  *scale = largest / 127.f;
  *sum = *scale * static_cast<float>(total);
}

void quantize_portable(const float* x, int8_t* codes, float* scale, float* sum) {
  quantize_group(x, codes, scale, sum);
}
#if MOETIER_X86
TARGET_AVX2 void quantize_avx2(const float* x, int8_t* codes, float* scale, float* sum) {
  quantize_group(x, codes, scale, sum);
}
TARGET_AVX512 void quantize_avx512(const float* x, int8_t* codes, float* scale, float* sum) {
  quantize_group(x, codes, scale, sum);
}
#endif

void quantize(const float* x, int8_t* codes, float* scale, float* sum, int isa) {
#if MOETIER_X86
  if (isa == MOETIER_AVX512VNNI) return quantize_avx512(x, codes, scale, sum);
  if (isa == MOETIER_AVX2) return quantize_avx2(x, codes, scale, sum);
#endif
  (void)isa;
  quantize_portable(x, codes, scale, sum);
}

}  // namespace

QuantizedInputs::QuantizedInputs(int64_t tokens, int64_t cols, bool with_half_sums)
    : tokens_(tokens),
      groups_(cols / kTileCols),
      codes_(static_cast<size_t>(tokens * cols)),
      scale_(static_cast<size_t>(tokens * groups_)),
      sum_(static_cast<size_t>(tokens * groups_)),
      half_sums_(with_half_sums ? static_cast<size_t>(2 * tokens * groups_) : 0) {}

void QuantizedInputs::set_group(int64_t token, int64_t group, const float* x, int isa) {
  const int64_t at = group * tokens_ + token;
  int8_t* codes = codes_.data() + at * kTileCols;
  quantize(x, codes, scale_.data() + at, sum_.data() + at, isa);
  if (half_sums_.empty()) return;
  for (int half = 0; half < 2; half++) {
    int32_t total = 0;
    for (int i = 0; i < kTileCols / 2; i++) total += codes[half * kTileCols / 2 + i];
    half_sums_[at + (group + half) * tokens_] = scale_[at] * static_cast<float>(total);
  }
}

void QuantizedInputs::set_all(const float* x, int isa) {
  for (int64_t token = 0; token < tokens_; token++)
    for (int64_t group = 0; group < groups_; group++)
      set_group(token, group, x + (token * groups_ + group) * kTileCols, isa);
}

}  // namespace moetier
