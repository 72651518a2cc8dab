// The tile in portable C++: sizes, float16 and unpacking. The bit order is that of
// kernels/packing.py.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "moetier_kernels.h"
#include "target.h"

namespace moetier {

constexpr int64_t kTileRows = 16;
constexpr int64_t kGroupSize = 64;
constexpr int kVectors = 16;      // vectors of a tile
constexpr int kVectorBytes = 64;  // 16 rows x 4 inputs

constexpr size_t code_bytes(int bits) { return static_cast<size_t>(bits) * 2 * kVectorBytes; }
// Codes, then 16 float16 scales and 16 float16 zero*scale, or 16 uint8 scales.
constexpr size_t tile_bytes(int bits, int grid) {
  return code_bytes(bits) + (grid == MOETIER_SYMMETRIC ? kTileRows : 4 * kTileRows);
}
constexpr int64_t num_row_blocks(int64_t rows) { return (rows + kTileRows - 1) / kTileRows; }

// The code that a symmetric grid takes for zero.
constexpr float middle_code(int bits) { return static_cast<float>((1 << bits) - 1) / 2.f; }
// A scale byte of 255 is the row's whole scale.
constexpr float kScale8Unit = 1.f / 255.f;

// Row blocks of a packed matrix that follow each other.
struct RowBlocks {
  int bits, grid;
  const uint8_t* data;        // the first tile
  const uint8_t* row_scales;  // float16, of the first row; null on an affine grid
  int64_t groups;             // tiles of a row block
  int64_t num_blocks;

  size_t block_bytes() const { return static_cast<size_t>(groups) * tile_bytes(bits, grid); }
  RowBlocks slice(int64_t first, int64_t count) const {
    const uint8_t* scales = row_scales ? row_scales + first * kTileRows * 2 : nullptr;
    return {bits, grid, data + first * block_bytes(), scales, groups, count};
  }
};

inline RowBlocks row_blocks(const MoetierMatrix& matrix) {
  RowBlocks all{matrix.bits,  matrix.grid, matrix.data, nullptr, matrix.cols / kGroupSize,
                num_row_blocks(matrix.rows)};
  if (matrix.grid == MOETIER_SYMMETRIC)
    all.row_scales = matrix.data + all.num_blocks * all.block_bytes();
  return all;
}

constexpr int64_t aligned(int64_t num_bytes) { return (num_bytes + 63) / 64 * 64; }

inline MoetierMatrix right_factor(const MoetierLowRank& factors, int64_t block) {
  return {factors.data + factors.block_offsets[block], kTileRows, factors.cols, factors.bits,
          factors.grid};
}
// Transposed: [16, rows of the factors].
inline MoetierMatrix left_factor(const MoetierLowRank& factors, int64_t block) {
  int64_t right_bytes = factors.cols / kGroupSize * tile_bytes(factors.bits, factors.grid);
  if (factors.grid == MOETIER_SYMMETRIC) right_bytes += 2 * kTileRows;
  return {factors.data + factors.block_offsets[block] + aligned(right_bytes), kTileRows,
          factors.rows, factors.bits, factors.grid};
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

ALWAYS_INLINE void read_halves(const uint8_t* from, float (&to)[kTileRows]) {
  uint16_t halves[kTileRows];
  std::memcpy(halves, from, sizeof halves);
  for (int row = 0; row < kTileRows; row++) to[row] = half_to_float(halves[row]);
}

// Of an affine tile the two values of each row; of a symmetric one its scale bytes, as numbers.
struct TileScales {
  float scale[kTileRows];
  float zero_scaled[kTileRows];  // not set when symmetric
};

template <int BITS, int GRID>
ALWAYS_INLINE void read_scales(const uint8_t* tile, TileScales* out) {
  const uint8_t* scales = tile + code_bytes(BITS);
  if (GRID == MOETIER_SYMMETRIC) {
    for (int row = 0; row < kTileRows; row++) out->scale[row] = scales[row];
    return;
  }
  read_halves(scales, out->scale);
  read_halves(scales + 2 * kTileRows, out->zero_scaled);
}

// Sixteen vectors of 64 codes: vectors[v][4 * row + i] is the code of (row, input 4 * v + i).
template <int BITS>
ALWAYS_INLINE void unpack_vectors(const uint8_t* tile, uint8_t (*vectors)[kVectorBytes]) {
  if (BITS != 3) {  // plane p holds vectors p, p + planes, ... from the low bits up
    constexpr int kPlanes = 2 * BITS, kFields = 8 / BITS;
    for (int p = 0; p < kPlanes; p++)
      for (int f = 0; f < kFields; f++)
        for (int i = 0; i < kVectorBytes; i++)
          vectors[p + f * kPlanes][i] =
              tile[p * kVectorBytes + i] >> (f * BITS) & ((1 << BITS) - 1);
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

// Calls body(std::integral_constant of bits, of grid) for the pair at hand; each is other code.
template <class Body>
ALWAYS_INLINE void for_form(int bits, int grid, const Body& body) {
  using std::integral_constant;
  constexpr integral_constant<int, MOETIER_AFFINE> affine;
  constexpr integral_constant<int, MOETIER_SYMMETRIC> symmetric;
  constexpr integral_constant<int, 1> one;
  constexpr integral_constant<int, 2> two;
  constexpr integral_constant<int, 3> three;
  constexpr integral_constant<int, 4> four;
  if (grid == MOETIER_SYMMETRIC) {
    if (bits == 1) body(one, symmetric);
    if (bits == 2) body(two, symmetric);
    if (bits == 3) body(three, symmetric);
    if (bits == 4) body(four, symmetric);
    return;
  }
  if (bits == 2) body(two, affine);
  if (bits == 3) body(three, affine);
  if (bits == 4) body(four, affine);
}

}  // namespace moetier
