// The integer product in plain C++: for processors without AVX2, and for any that is not x86.
#include "multiply.h"
#include "tile.h"

namespace moetier {
namespace {

template <class Form>
void multiply_block(const RowBlocks& rows, const Inputs& inputs, int64_t tokens, float* y,
                    int64_t row_stride) {
  constexpr int BITS = Form::kBits, GRID = Form::kGrid;
  for (int64_t t = 0; t < tokens; t++)
    for (int row = 0; row < kTileRows; row++) y[t * row_stride + row] = 0.f;
  uint8_t codes[kTileRows][kTileCols];
  TileScales scales;
  TileWalk<Form> at(rows);
  InputWalk<Form> in(inputs);
  for (int64_t i = 0; i < rows.tiles; i++, at.next(), in.next()) {
    unpack_rows<Form>(at.tile, codes);
    read_scales<GRID>(at.scales, &scales);
    for (int64_t t = 0; t < tokens; t++) {
      const int8_t* x = in.codes() + t * kTileCols;
      for (int row = 0; row < kTileRows; row++) {
        int32_t dot = 0;
        for (int k = 0; k < Form::kCols; k++) dot += static_cast<int32_t>(codes[row][k]) * x[k];
        const float scaled = in.scale(t) * static_cast<float>(dot);
        y[t * row_stride + row] +=
            GRID == MOETIER_SYMMETRIC
                ? scales.scale[row] * (scaled - middle_code(BITS) * in.sum(t))
                : scales.scale[row] * scaled - scales.zero_scaled[row] * in.sum(t);
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
  for_form(rows, [&](auto form) {
    for (int64_t b = 0; b < rows.num_blocks; b++)
      multiply_block<decltype(form)>(rows.slice(b, 1), inputs, tokens, y + b * kTileRows,
                                     row_stride);
  });
}

}  // namespace moetier
