// Packed tiles as float32: written once, compiled for each instruction set.
#include "dequantize.h"

#include "moetier_kernels.h"
#include "parallel.h"
#include "tile.h"

namespace moetier {
namespace {

template <class Form>
ALWAYS_INLINE void dequantize(const uint8_t* tile, const uint8_t* scales,
                              const uint8_t* row_scales, float* weight, int64_t row_stride) {
  constexpr int BITS = Form::kBits, GRID = Form::kGrid;
  uint8_t codes[kTileRows][kTileCols];
  TileScales by_row;
  float row_scale[kTileRows];
  unpack_rows<Form>(tile, codes);
  read_scales<GRID>(scales, &by_row);
  if (GRID == MOETIER_SYMMETRIC) read_halves(row_scales, row_scale);
  for (int row = 0; row < kTileRows; row++) {
    float* out = weight + row * row_stride;
    if (GRID == MOETIER_SYMMETRIC) {
      const float scale = row_scale[row] * kScale8Unit * by_row.scale[row];
      for (int i = 0; i < Form::kCols; i++)
        out[i] = scale * (static_cast<float>(codes[row][i]) - middle_code(BITS));
    } else {
      const float scale = by_row.scale[row], zero_scaled = by_row.zero_scaled[row];
      for (int i = 0; i < Form::kCols; i++)
        out[i] = scale * static_cast<float>(codes[row][i]) - zero_scaled;
    }
  }
}

template <class Form>
void dequantize_portable(const uint8_t* tile, const uint8_t* scales,
                         const uint8_t* row_scales, float* weight, int64_t row_stride) {
  dequantize<Form>(tile, scales, row_scales, weight, row_stride);
}
#if MOETIER_X86
template <class Form>
TARGET_AVX2 void dequantize_avx2(const uint8_t* tile, const uint8_t* scales,
                                 const uint8_t* row_scales, float* weight, int64_t row_stride) {
  dequantize<Form>(tile, scales, row_scales, weight, row_stride);
}
template <class Form>
TARGET_AVX512 void dequantize_avx512(const uint8_t* tile, const uint8_t* scales,
                                     const uint8_t* row_scales, float* weight, int64_t row_stride) {
  dequantize<Form>(tile, scales, row_scales, weight, row_stride);
}
#endif

}  // namespace

void dequantize_tile(const RowBlocks& rows, int64_t tile, float* weight, int64_t row_stride,
                     int isa) {
  const int64_t group = tile / rows.tiles_per_group, in_group = tile % rows.tiles_per_group;
  const size_t one = code_bytes(rows.bits, rows.layout);
  const uint8_t* first = rows.data + group * rows.group_bytes();
  const uint8_t* codes = first + in_group * one;
  const uint8_t* scales = first + rows.tiles_per_group * one;
  for_form(rows, [&](auto form) {
    using Form = decltype(form);
#if MOETIER_X86
    if (isa == MOETIER_AVX512VNNI)
      return dequantize_avx512<Form>(codes, scales, rows.row_scales, weight, row_stride);
    if (isa == MOETIER_AVX2)
      return dequantize_avx2<Form>(codes, scales, rows.row_scales, weight, row_stride);
#endif
    (void)isa;
    dequantize_portable<Form>(codes, scales, rows.row_scales, weight, row_stride);
  });
}

}  // namespace moetier

int32_t moetier_dequantize(const MoetierMatrix* matrix, float* weight, int32_t num_threads,
                           int32_t isa) {
  using namespace moetier;
  const int64_t rows = matrix->rows, cols = matrix->cols;
  const RowBlocks all = row_blocks(*matrix);
  const int64_t width = tile_cols(all.layout);
  parallel_for(all.num_blocks, num_threads, [&](int64_t block) {
    const RowBlocks one = all.slice(block, 1);
    const int64_t first_row = block * kTileRows;
    const int64_t valid_rows = rows - first_row < kTileRows ? rows - first_row : kTileRows;
    for (int64_t tile = 0; tile < one.tiles; tile++) {
      float* out = weight + first_row * cols + tile * width;
      if (valid_rows == kTileRows) {
        dequantize_tile(one, tile, out, cols, isa);
        continue;
      }
      float padded[kTileRows * kTileCols];
      dequantize_tile(one, tile, padded, kTileCols, isa);
      for (int64_t row = 0; row < valid_rows; row++)
        std::memcpy(out + row * cols, padded + row * kTileCols, width * sizeof(float));
    }
  });
  return MOETIER_OK;
}
