// Packed tiles as float32.
#pragma once
#include <cstdint>

#include "tile.h"

namespace moetier {

// weight [16][64] (or [16][32]) of tile `tile` of the first row block: the operations and so the
// bits of the reference.
void dequantize_tile(const RowBlocks& rows, int64_t tile, float* weight, int64_t row_stride,
                     int isa);

}  // namespace moetier
