// Packed tiles as float32: written once, compiled for each instruction set.
#include "dequantize.h"

#include "moetier_kernels.h"
#include "parallel.h"
#include "tile.h"

namespace moetier {
namespace {

template <int BITS, int GRID>
ALWAYS_INLINE void dequantize(const uint8_t* tile, const uint8_t* row_scales, float* weight,
                              int64_t row_stride) {
  uint8_t codes[kTileRows][kGroupSize];
  TileScales scales;
  float row_scale[kTileRows];
  unpack_rows<BITS>(tile, codes);
  read_scales<BITS, GRID>(tile, &scales);
  if (GRID == MOETIER_SYMMETRIC) read_halves(row_scales, row_scale);
  for (int row = 0; row < kTileRows; row++) {
    float* out = weight + row * row_stride;
    if (GRID == MOETIER_SYMMETRIC) {
      const float scale = row_scale[row] * kScale8Unit * scales.scale[row];
      for (int i = 0; i < kGroupSize; i++)
        out[i] = scale * (static_cast<float>(codes[row][i]) - middle_code(BITS));
    } else {
      const float scale = scales.scale[row], zero_scaled = scales.zero_scaled[row];
      for (int i = 0; i < kGroupSize; i++)
        out[i] = scale * static_cast<float>(codes[row][i]) - zero_scaled;
    }
  }
}

template <int BITS, int GRID>
void dequantize_portable(const uint8_t* tile, const uint8_t* row_scales, float* weight,
                         int64_t row_stride) {
  dequantize<BITS, GRID>(tile, row_scales, weight, row_stride);
}
#if MOETIER_X86
template <int BITS, int GRID>
TARGET_AVX2 void dequantize_avx2(const uint8_t* tile, const uint8_t* row_scales, float* weight,
                                 int64_t row_stride) {
  dequantize<BITS, GRID>(tile, row_scales, weight, row_stride);
}
template <int BITS, int GRID>
TARGET_AVX512 void dequantize_avx512(const uint8_t* tile, const uint8_t* row_scales, float* weight,
                                     int64_t row_stride) {
  dequantize<BITS, GRID>(tile, row_scales, weight, row_stride);
}
#endif

}  // namespace

void dequantize_tile(const RowBlocks& rows, int64_t group, float* weight, int64_t row_stride,
                     int isa) {
  const uint8_t* tile = rows.data + group * tile_bytes(rows.bits, rows.grid);
  for_form(rows.bits, rows.grid, [&](auto bits, auto grid) {
#if MOETIER_X86
    if (isa == MOETIER_AVX512VNNI)
      return dequantize_avx512<bits, grid>(tile, rows.row_scales, weight, row_stride);
    if (isa == MOETIER_AVX2)
      return dequantize_avx2<bits, grid>(tile, rows.row_scales, weight, row_stride);
#endif
    (void)isa;
    dequantize_portable<bits, grid>(tile, rows.row_scales, weight, row_stride);
  });
}

}  // namespace moetier

int32_t moetier_dequantize(const MoetierMatrix* matrix, float* weight, int32_t num_threads,
                           int32_t isa) {
  using namespace moetier;
  const int64_t rows = matrix->rows, cols = matrix->cols;
  const RowBlocks all = row_blocks(*matrix);
  parallel_for(all.num_blocks, num_threads, [&](int64_t block) {
    const RowBlocks one = all.slice(block, 1);
    const int64_t first_row = block * kTileRows;
    const int64_t valid_rows = rows - first_row < kTileRows ? rows - first_row : kTileRows;
    for (int64_t g = 0; g < one.groups; g++) {
      float* out = weight + first_row * cols + g * kGroupSize;
      if (valid_rows == kTileRows) {
        dequantize_tile(one, g, out, cols, isa);
        continue;
      }
      float padded[kTileRows * kGroupSize];
      dequantize_tile(one, g, padded, kGroupSize, isa);
      for (int64_t row = 0; row < valid_rows; row++)
        std::memcpy(out + row * cols, padded + row * kGroupSize, kGroupSize * sizeof(float));
    }
  });
  return MOETIER_OK;
}
