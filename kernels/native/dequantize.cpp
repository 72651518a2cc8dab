// Packed tiles as float32: written once, compiled for each instruction set.
#include "dequantize.h"

#include "moetier_kernels.h"
#include "parallel.h"
#include "tile.h"

namespace moetier {
namespace {

template <int BITS>
ALWAYS_INLINE void dequantize(const uint8_t* tile, float* weight, int64_t row_stride) {
  uint8_t codes[kTileRows][kGroupSize];
  TileScales scales;
  unpack_rows<BITS>(tile, codes);
  read_scales(tile, BITS, &scales);
  for (int row = 0; row < kTileRows; row++) {
    const float scale = scales.scale[row], zero_scaled = scales.zero_scaled[row];
    float* out = weight + row * row_stride;
    for (int i = 0; i < kGroupSize; i++)
      out[i] = scale * static_cast<float>(codes[row][i]) - zero_scaled;
  }
}

ALWAYS_INLINE void dequantize_any(int bits, const uint8_t* tile, float* weight,
                                  int64_t row_stride) {
  if (bits == 2) return dequantize<2>(tile, weight, row_stride);
  if (bits == 3) return dequantize<3>(tile, weight, row_stride);
  dequantize<4>(tile, weight, row_stride);
}

#if MOETIER_X86
TARGET_AVX2 void dequantize_avx2(int bits, const uint8_t* tile, float* weight,
                                 int64_t row_stride) {
  dequantize_any(bits, tile, weight, row_stride);
}
TARGET_AVX512 void dequantize_avx512(int bits, const uint8_t* tile, float* weight,
                                     int64_t row_stride) {
  dequantize_any(bits, tile, weight, row_stride);
}
#endif

}  // namespace

void dequantize_tile(int bits, const uint8_t* tile, float* weight, int64_t row_stride, int isa) {
#if MOETIER_X86
  if (isa == MOETIER_AVX512VNNI) return dequantize_avx512(bits, tile, weight, row_stride);
  if (isa == MOETIER_AVX2) return dequantize_avx2(bits, tile, weight, row_stride);
#endif
  (void)isa;
  dequantize_any(bits, tile, weight, row_stride);
}

}  // namespace moetier

int32_t moetier_dequantize(int32_t bits, const uint8_t* data, int64_t rows, int64_t cols,
                           float* weight, int32_t num_threads, int32_t isa) {
  using namespace moetier;
  const int64_t groups = cols / kGroupSize;
  parallel_for(num_row_blocks(rows), num_threads, [&](int64_t block) {
    const uint8_t* tile = data + static_cast<size_t>(block * groups) * tile_bytes(bits);
    const int64_t first_row = block * kTileRows;
    const int64_t valid_rows = rows - first_row < kTileRows ? rows - first_row : kTileRows;
    for (int64_t g = 0; g < groups; g++, tile += tile_bytes(bits)) {
      float* out = weight + first_row * cols + g * kGroupSize;
      if (valid_rows == kTileRows) {
        dequantize_tile(bits, tile, out, cols, isa);
        continue;
      }
      float padded[kTileRows * kGroupSize];
      dequantize_tile(bits, tile, padded, kGroupSize, isa);
      for (int64_t row = 0; row < valid_rows; row++)
        std::memcpy(out + row * cols, padded + row * kGroupSize, kGroupSize * sizeof(float));
    }
  });
  return MOETIER_OK;
}
