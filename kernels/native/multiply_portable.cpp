// The integer product in plain C++: for processors without AVX2, and for any that is not x86.
#include "multiply.h"
#include "tile.h"

namespace moetier {
namespace {

template <int BITS, int GRID>
void multiply_block(const RowBlocks& rows, const Inputs& inputs, int64_t tokens, float* y,
                    int64_t row_stride) {
  for (int64_t t = 0; t < tokens; t++)
    for (int row = 0; row < kTileRows; row++) y[t * row_stride + row] = 0.f;
  uint8_t codes[kTileRows][kGroupSize];
  TileScales scales;
  const uint8_t* tile = rows.data;
  for (int64_t g = 0; g < rows.groups; g++, tile += tile_bytes(BITS, GRID)) {
    unpack_rows<BITS>(tile, codes);
    read_scales<BITS, GRID>(tile, &scales);
    for (int64_t t = 0; t < tokens; t++) {
      const int64_t at = g * inputs.stride + t;
      const int8_t* x = inputs.codes + at * kGroupSize;
      for (int row = 0; row < kTileRows; row++) {
        int32_t dot = 0;
        for (int i = 0; i < kGroupSize; i++) dot += static_cast<int32_t>(codes[row][i]) * x[i];
        const float scaled = inputs.scale[at] * static_cast<float>(dot);
        y[t * row_stride + row] +=
            GRID == MOETIER_SYMMETRIC
                ? scales.scale[row] * (scaled - middle_code(BITS) * inputs.sum[at])
                : scales.scale[row] * scaled - scales.zero_scaled[row] * inputs.sum[at];
      }
    }
  }
  if (GRID != MOETIER_SYMMETRIC) return;
  float row_scale[kTileRows];
  read_halves(rows.row_scales, row_scale);
  for (int64_t t = 0; t < tokens; t++)
    for (int row = 0; row < kTileRows; row++)
      y[t * row_stride + row] *= row_scale[row] * kScale8Unit;
}

}  // namespace

void multiply_portable(const RowBlocks& rows, const Inputs& inputs, int64_t tokens, float* y,
                       int64_t row_stride) {
  for_form(rows.bits, rows.grid, [&](auto bits, auto grid) {
    for (int64_t b = 0; b < rows.num_blocks; b++)
      multiply_block<bits, grid>(rows.slice(b, 1), inputs, tokens, y + b * kTileRows, row_stride);
  });
}

}  // namespace moetier
