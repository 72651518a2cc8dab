// The tile in portable C++: sizes, float16 and unpacking. The bit order is that of
// kernels/packing.py.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "target.h"

namespace moetier {

constexpr int64_t kTileRows = 16;
constexpr int64_t kGroupSize = 64;
constexpr int kVectors = 16;      // vectors of a tile
constexpr int kVectorBytes = 64;  // 16 rows x 4 inputs

constexpr size_t code_bytes(int bits) { return static_cast<size_t>(bits) * 2 * kVectorBytes; }
constexpr size_t tile_bytes(int bits) {
  return code_bytes(bits) + 2 * kTileRows * sizeof(uint16_t);
}
constexpr int64_t num_row_blocks(int64_t rows) { return (rows + kTileRows - 1) / kTileRows; }
constexpr size_t packed_bytes(int bits, int64_t rows, int64_t cols) {
  return static_cast<size_t>(num_row_blocks(rows) * (cols / kGroupSize)) * tile_bytes(bits);
}

// float16 to float32. The exponents differ by 112, so the shifted bits times 2^112 are the value,
// subnormal numbers included; only infinity and NaN need their exponent filled.
ALWAYS_INLINE float half_to_float(uint16_t half) {
  uint32_t magnitude = static_cast<uint32_t>(half & 0x7fff) << 13;
  float value;
  std::memcpy(&value, &magnitude, sizeof value);
  value *= 0x1p112f;
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  if (magnitude >= 0x0f800000u) bits |= 0x7f800000u;
  bits |= static_cast<uint32_t>(half & 0x8000) << 16;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

struct TileScales {
  float scale[kTileRows];
  float zero_scaled[kTileRows];
};

ALWAYS_INLINE void read_scales(const uint8_t* tile, int bits, TileScales* out) {
  uint16_t halves[2 * kTileRows];
  std::memcpy(halves, tile + code_bytes(bits), sizeof halves);
  for (int row = 0; row < kTileRows; row++) {
    out->scale[row] = half_to_float(halves[row]);
    out->zero_scaled[row] = half_to_float(halves[kTileRows + row]);
  }
}

// Sixteen vectors of 64 codes: vectors[v][4 * row + i] is the code of (row, input 4 * v + i).
template <int BITS>
ALWAYS_INLINE void unpack_vectors(const uint8_t* tile, uint8_t (*vectors)[kVectorBytes]) {
  if (BITS == 4) {
    for (int p = 0; p < 8; p++)
      for (int i = 0; i < kVectorBytes; i++) {
        uint8_t byte = tile[p * kVectorBytes + i];
        vectors[p][i] = byte & 15;
        vectors[p + 8][i] = byte >> 4;
      }
  } else if (BITS == 2) {
    for (int p = 0; p < 4; p++)
      for (int i = 0; i < kVectorBytes; i++) {
        uint8_t byte = tile[p * kVectorBytes + i];
        vectors[p][i] = byte & 3;
        vectors[p + 4][i] = byte >> 2 & 3;
        vectors[p + 8][i] = byte >> 4 & 3;
        vectors[p + 12][i] = byte >> 6;
      }
  } else {
    for (int half = 0; half < 2; half++) {
      const uint8_t* plane = tile + half * 3 * kVectorBytes;
      uint8_t(*out)[kVectorBytes] = vectors + half * 8;
      for (int i = 0; i < kVectorBytes; i++) {
        uint8_t a = plane[i], b = plane[kVectorBytes + i], c = plane[2 * kVectorBytes + i];
        uint8_t left_over = a >> 6 | b >> 6 << 2 | c >> 6 << 4;
        out[0][i] = a & 7;
        out[1][i] = b & 7;
        out[2][i] = c & 7;
        out[3][i] = a >> 3 & 7;
        out[4][i] = b >> 3 & 7;
        out[5][i] = c >> 3 & 7;
        out[6][i] = left_over & 7;
        out[7][i] = left_over >> 3;
      }
    }
  }
}

// The codes of a tile by row: codes[row][input].
template <int BITS>
ALWAYS_INLINE void unpack_rows(const uint8_t* tile, uint8_t (*codes)[kGroupSize]) {
  uint8_t vectors[kVectors][kVectorBytes];
  unpack_vectors<BITS>(tile, vectors);
  for (int v = 0; v < kVectors; v++)
    for (int row = 0; row < kTileRows; row++)
      std::memcpy(&codes[row][4 * v], &vectors[v][4 * row], 4);
}

}  // namespace moetier
