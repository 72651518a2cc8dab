// The integer product in plain C++: for processors without AVX2, and for any that is not x86.
#include "multiply.h"
#include "tile.h"

namespace moetier {
namespace {

template <int BITS>
void multiply_block(const uint8_t* block, int64_t groups, const Inputs& inputs, int64_t tokens,
                    float* y, int64_t row_stride) {
  for (int64_t t = 0; t < tokens; t++)
    for (int row = 0; row < kTileRows; row++) y[t * row_stride + row] = 0.f;
  uint8_t codes[kTileRows][kGroupSize];
  TileScales scales;
  for (int64_t g = 0; g < groups; g++, block += tile_bytes(BITS)) {
    unpack_rows<BITS>(block, codes);
    read_scales(block, BITS, &scales);
    for (int64_t t = 0; t < tokens; t++) {
      const int64_t at = g * inputs.stride + t;
      const int8_t* x = inputs.codes + at * kGroupSize;
      for (int row = 0; row < kTileRows; row++) {
        int32_t dot = 0;
        for (int i = 0; i < kGroupSize; i++) dot += static_cast<int32_t>(codes[row][i]) * x[i];
        const float scaled = inputs.scale[at] * static_cast<float>(dot);
        y[t * row_stride + row] +=
            scales.scale[row] * scaled - scales.zero_scaled[row] * inputs.sum[at];
      }
    }
  }
}

}  // namespace

void multiply_portable(const RowBlocks& rows, const Inputs& inputs, int64_t tokens, float* y,
                       int64_t row_stride) {
  const size_t block_bytes = static_cast<size_t>(rows.groups) * tile_bytes(rows.bits);
  for (int64_t b = 0; b < rows.num_blocks; b++) {
    const uint8_t* block = rows.data + b * block_bytes;
    float* out = y + b * kTileRows;
    if (rows.bits == 2) multiply_block<2>(block, rows.groups, inputs, tokens, out, row_stride);
    if (rows.bits == 3) multiply_block<3>(block, rows.groups, inputs, tokens, out, row_stride);
    if (rows.bits == 4) multiply_block<4>(block, rows.groups, inputs, tokens, out, row_stride);
  }
}

}  // namespace moetier
