// Packed tiles as float32.
#pragma once
#include <cstdint>

namespace moetier {

// weight [16][64] of one tile: scale * code - zero_scaled, the operations and so the bits of the
// reference.
void dequantize_tile(int bits, const uint8_t* tile, float* weight, int64_t row_stride, int isa);

}  // namespace moetier
