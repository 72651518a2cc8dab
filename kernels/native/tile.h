// The tile in portable C++: sizes, float16 and unpacking. The bit order is that of
// kernels/packing.py.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "moetier_kernels.h"
#include "target.h"

namespace moetier {

constexpr int64_t kTileRows = 16;
constexpr int64_t kTileCols = 64;      // inputs of a tile; those of a half tile are 32
constexpr int kVectors = 16;           // vectors of a tile; a half tile has 8
constexpr int kVectorBytes = 64;       // 16 rows x 4 inputs

// How the codes of a group of inputs lie: as one tile, as several tiles (groups of 128, 192, ...)
// or as half tiles (groups of 32, 96, ...). The scales of the group follow its last tile.
enum Layout { kOneTile, kTiles, kHalfTiles };

constexpr Layout layout_of(int64_t group_size) {
  return group_size == kTileCols ? kOneTile : group_size % kTileCols ? kHalfTiles : kTiles;
}
constexpr int vectors_of(Layout layout) {
  return layout == kHalfTiles ? kVectors / 2 : kVectors;
}
constexpr int64_t tile_cols(Layout layout) { return 4 * vectors_of(layout); }
constexpr size_t code_bytes(int bits, Layout layout) {
  return static_cast<size_t>(bits * vectors_of(layout)) * kVectorBytes / 8;
}
// 16 float16 scales and 16 float16 zero*scale, or 16 uint8 scales.
constexpr size_t scale_bytes(int grid) {
  return grid == MOETIER_SYMMETRIC ? kTileRows : 4 * kTileRows;
}
constexpr int64_t num_row_blocks(int64_t rows) { return (rows + kTileRows - 1) / kTileRows; }

// One way of coding a matrix. Each is other code, so that all of this is known at compile time.
template <int BITS, int GRID, Layout LAYOUT>
struct TileForm {
  static constexpr int kBits = BITS, kGrid = GRID;
  static constexpr Layout kLayout = LAYOUT;
  static constexpr int kTileVectors = vectors_of(LAYOUT);
  static constexpr int64_t kCols = tile_cols(LAYOUT);
  static constexpr size_t kCodeBytes = code_bytes(BITS, LAYOUT);
  static constexpr size_t kScaleBytes = scale_bytes(GRID);
};

// The code that a symmetric grid takes for zero.
constexpr float middle_code(int bits) { return static_cast<float>((1 << bits) - 1) / 2.f; }
// A scale byte of 255 is the row's whole scale.
constexpr float kScale8Unit = 1.f / 255.f;

// Row blocks of a packed matrix that follow each other.
struct RowBlocks {
  int bits, grid;
  Layout layout;
  int64_t tiles_per_group;
  const uint8_t* data;        // the first tile
  const uint8_t* row_scales;  // float16, of the first row; null on an affine grid
  int64_t tiles;              // of a row block
  int64_t num_blocks;

  size_t group_bytes() const {
    return static_cast<size_t>(tiles_per_group) * code_bytes(bits, layout) + scale_bytes(grid);
  }
  size_t block_bytes() const {
    return static_cast<size_t>(tiles / tiles_per_group) * group_bytes();
  }
  RowBlocks slice(int64_t first, int64_t count) const {
    RowBlocks part = *this;
    part.data += first * block_bytes();
    if (row_scales) part.row_scales += first * kTileRows * 2;
    part.num_blocks = count;
    return part;
  }
};

inline bool has_half_tiles(const MoetierMatrix& matrix) {
  return layout_of(matrix.group_size) == kHalfTiles;
}

inline RowBlocks row_blocks(const MoetierMatrix& matrix) {
  const Layout layout = layout_of(matrix.group_size);
  const int64_t cols = tile_cols(layout);
  RowBlocks all{matrix.bits, matrix.grid, layout,
                matrix.group_size / cols, matrix.data, nullptr,
                matrix.cols / cols, num_row_blocks(matrix.rows)};
  if (matrix.grid == MOETIER_SYMMETRIC)
    all.row_scales = matrix.data + all.num_blocks * all.block_bytes();
  return all;
}

// The tiles of the first row block from left to right, each with the scales of its group.
template <class Form>
struct TileWalk {
  const uint8_t* tile;
  const uint8_t* scales;
  int64_t tiles_per_group, left;

  ALWAYS_INLINE explicit TileWalk(const RowBlocks& rows)
      : tile(rows.data),
        scales(rows.data + rows.tiles_per_group * Form::kCodeBytes),
        tiles_per_group(rows.tiles_per_group),
        left(rows.tiles_per_group) {}

  ALWAYS_INLINE void next() {
    tile += Form::kCodeBytes;
    if constexpr (Form::kLayout == kOneTile) {
      tile += Form::kScaleBytes;
      scales = tile + Form::kCodeBytes;
    } else if (--left == 0) {
      tile += Form::kScaleBytes;
      scales = tile + tiles_per_group * Form::kCodeBytes;
      left = tiles_per_group;
    }
  }
};

constexpr int64_t aligned(int64_t num_bytes) { return (num_bytes + 63) / 64 * 64; }

inline MoetierMatrix right_factor(const MoetierLowRank& factors, int64_t block) {
  return {factors.data + factors.block_offsets[block], kTileRows, factors.cols, factors.bits,
          factors.grid, kTileCols};
}
// Transposed: [16, rows of the factors].
inline MoetierMatrix left_factor(const MoetierLowRank& factors, int64_t block) {
  const size_t tile_bytes = code_bytes(factors.bits, kOneTile) + scale_bytes(factors.grid);
  int64_t right_bytes = factors.cols / kTileCols * tile_bytes;
  if (factors.grid == MOETIER_SYMMETRIC) right_bytes += 2 * kTileRows;
  return {factors.data + factors.block_offsets[block] + aligned(right_bytes), kTileRows,
          factors.rows, factors.bits, factors.grid, kTileCols};
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

template <int GRID>
ALWAYS_INLINE void read_scales(const uint8_t* scales, TileScales* out) {
  if (GRID == MOETIER_SYMMETRIC) {
    for (int row = 0; row < kTileRows; row++) out->scale[row] = scales[row];
    return;
  }
  read_halves(scales, out->scale);
  read_halves(scales + 2 * kTileRows, out->zero_scaled);
}

// Vectors of 64 codes: vectors[v][4 * row + i] is the code of (row, input 4 * v + i).
template <class Form>
ALWAYS_INLINE void unpack_vectors(const uint8_t* tile, uint8_t (*vectors)[kVectorBytes]) {
  constexpr int kBits = Form::kBits;
  if (kBits != 3) {  // plane p holds vectors p, p + planes, ... from the low bits up
    constexpr int kPlanes = kBits * Form::kTileVectors / 8, kFields = 8 / kBits;
    for (int p = 0; p < kPlanes; p++)
      for (int f = 0; f < kFields; f++)
        for (int i = 0; i < kVectorBytes; i++)
          vectors[p + f * kPlanes][i] =
              tile[p * kVectorBytes + i] >> (f * kBits) & ((1 << kBits) - 1);
  } else {
    for (int half = 0; half < Form::kTileVectors / 8; half++) {
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
template <class Form>
ALWAYS_INLINE void unpack_rows(const uint8_t* tile, uint8_t (*codes)[kTileCols]) {
  uint8_t vectors[kVectors][kVectorBytes];
  unpack_vectors<Form>(tile, vectors);
  for (int v = 0; v < Form::kTileVectors; v++)
    for (int row = 0; row < kTileRows; row++)
      std::memcpy(&codes[row][4 * v], &vectors[v][4 * row], 4);
}

template <int BITS, int GRID, class Body>
ALWAYS_INLINE void for_layout(Layout layout, const Body& body) {
  if (layout == kOneTile) body(TileForm<BITS, GRID, kOneTile>{});
  if (layout == kTiles) body(TileForm<BITS, GRID, kTiles>{});
  if (layout == kHalfTiles) body(TileForm<BITS, GRID, kHalfTiles>{});
}

// Calls body with the TileForm of these row blocks.
template <class Body>
ALWAYS_INLINE void for_form(const RowBlocks& rows, const Body& body) {
  const Layout layout = rows.layout;
  if (rows.grid == MOETIER_SYMMETRIC) {
    if (rows.bits == 1) for_layout<1, MOETIER_SYMMETRIC>(layout, body);
    if (rows.bits == 2) for_layout<2, MOETIER_SYMMETRIC>(layout, body);
    if (rows.bits == 3) for_layout<3, MOETIER_SYMMETRIC>(layout, body);
    if (rows.bits == 4) for_layout<4, MOETIER_SYMMETRIC>(layout, body);
    return;
  }
  if (rows.bits == 2) for_layout<2, MOETIER_AFFINE>(layout, body);
  if (rows.bits == 3) for_layout<3, MOETIER_AFFINE>(layout, body);
  if (rows.bits == 4) for_layout<4, MOETIER_AFFINE>(layout, body);
}

}  // namespace moetier
