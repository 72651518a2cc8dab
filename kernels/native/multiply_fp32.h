// The float32 product of packed row blocks, one form per instruction set: nothing is rounded to
// int8.
//
// For each row n and token t, over tiles g, whose scales may be those of a larger group, with codes counted from the grid's middle one:
//   affine    y[t][n] = sum_g scale[n,g] * dot(codes[n,g], x[t,g])
//                             + (middle * scale[n,g] - zero_scaled[n,g]) * sum[t,g]
//   symmetric y[t][n] = row_scale[n]/255 * sum_g scale8[n,g] * dot(codes[n,g], x[t,g])
// The tiles are added in order and each tile's inputs in an order that does not depend on the
// token count, so a token's result does not depend on its batch.
#pragma once
#include <cstdint>
#include <vector>

#include "tile.h"

namespace moetier {

// Inputs as they came, with the sum of each tile's, which meets the middle code.
struct FloatInputs {
  const float* x;     // [tokens, cols]
  const float* sums;  // [tokens, tiles]
  int64_t cols, tiles;

  FloatInputs from_token(int64_t token) const {
    return {x + token * cols, sums + token * tiles, cols, tiles};
  }
};

// Inputs of matrices in tiles of 64 and of 32: what of them a product reads, its tiles say.
struct SeenFloats {
  const float* x;          // [tokens, cols]
  const float* sums;       // of each 64 of them
  const float* half_sums;  // of each 32 of them; may be null
  int64_t cols;

  SeenFloats from_token(int64_t token) const {
    return {x + token * cols, sums + token * (cols / kTileCols),
            half_sums ? half_sums + token * 2 * (cols / kTileCols) : nullptr, cols};
  }
  FloatInputs for_tiles(const RowBlocks& rows) const {
    return {x, rows.layout == kHalfTiles ? half_sums : sums, cols, rows.tiles};
  }
};

// Owns inputs of [tokens, cols]. Throws std::bad_alloc.
class KeptFloats {
 public:
  // Matrices in half tiles need the half sums.
  KeptFloats(int64_t tokens, int64_t cols, bool with_half_sums);
  SeenFloats view() const {
    return {x_.data(), sums_.data(), half_sums_.empty() ? nullptr : half_sums_.data(), cols_};
  }
  // Keeps the 64 inputs at x as group `group` of token `token`. Any two calls may run at once.
  void set_group(int64_t token, int64_t group, const float* x, int isa);

 private:
  int64_t cols_;
  std::vector<float> x_, sums_, half_sums_;
};

// y[t * row_stride + n] for tokens [0, tokens) and rows [0, 16 * num_blocks).
using MultiplyFp32 = void(const RowBlocks& rows, const FloatInputs& inputs, int64_t tokens,
                          float* y, int64_t row_stride);

MultiplyFp32 multiply_fp32_portable;
MultiplyFp32 multiply_fp32_avx2;    // x86 only
MultiplyFp32 multiply_fp32_avx512;  // x86 only

// The form for `isa`, which must not be above moetier_best_isa().
MultiplyFp32* multiply_fp32_for(int isa);

}  // namespace moetier
