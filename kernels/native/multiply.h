// The integer product of packed row blocks with quantised inputs, one form per instruction set.
//
// For each row n and token t, over tiles g, whose scales may be those of a larger group:
//   affine    y[t][n] = sum_g scale[n,g] * (sx[t,g] * dot(codes[n,g], xq[t,g]))
//                             - zero_scaled[n,g] * sum[t,g]
//   symmetric y[t][n] = row_scale[n]/255 * sum_g scale8[n,g]
//                             * (sx[t,g] * dot(codes[n,g], xq[t,g]) - middle * sum[t,g])
// The zero point meets the sum of the *quantised* inputs, so that its rounding error cancels. The
// dot product is exact in integers and the tiles are added in order, so a token's result does not
// depend on its batch.
#pragma once
#include <cstdint>

#include "inputs.h"
#include "tile.h"

namespace moetier {

// y[t * row_stride + n] for tokens [0, tokens) and rows [0, 16 * num_blocks).
using Multiply = void(const RowBlocks& rows, const Inputs& inputs, int64_t tokens, float* y,
                      int64_t row_stride);

Multiply multiply_portable;
Multiply multiply_avx2;    // x86 only
Multiply multiply_avx512;  // x86 only; needs VNNI

// The form for `isa`, which must not be above moetier_best_isa().
Multiply* multiply_for(int isa);

}  // namespace moetier
