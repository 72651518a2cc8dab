// A packed matrix times float32 inputs.
#include <algorithm>
#include <new>

#include "inputs.h"
#include "moetier_kernels.h"
#include "multiply.h"
#include "parallel.h"
#include "tile.h"

namespace moetier {
namespace {

constexpr int64_t kBlocksPerItem = 4;  // row blocks of one parallel item
constexpr int64_t kTokensAtOnce = 32;  // bounds the buffer of a padded row block

// y [tokens, rows] = the rows of one item. The last row block may reach past `rows`, so it goes
// through a buffer and only its valid rows are copied out.
void multiply_item(Multiply* multiply, const MoetierMatrix& matrix, int64_t item,
                   const Inputs& inputs, int64_t tokens, float* y) {
  const RowBlocks all = row_blocks(matrix);
  const int64_t rows = matrix.rows;
  const int64_t first = item * kBlocksPerItem;
  const int64_t last = std::min(first + kBlocksPerItem, all.num_blocks);
  const int64_t whole = std::min(last, rows / kTileRows);
  if (whole > first)
    multiply(all.slice(first, whole - first), inputs, tokens, y + first * kTileRows, rows);
  if (whole == last) return;
  float padded[kTokensAtOnce][kTileRows];
  for (int64_t t = 0; t < tokens; t += kTokensAtOnce) {
    const int64_t n = std::min(kTokensAtOnce, tokens - t);
    multiply(all.slice(whole, 1), inputs.from_token(t), n, padded[0], kTileRows);
    for (int64_t i = 0; i < n; i++)
      std::copy_n(padded[i], rows - whole * kTileRows, y + (t + i) * rows + whole * kTileRows);
  }
}

}  // namespace
}  // namespace moetier

int32_t moetier_matmul(const MoetierMatrix* matrix, const float* x, int64_t tokens, float* y,
                       int32_t num_threads, int32_t isa) {
  using namespace moetier;
  try {
    QuantizedInputs inputs(tokens, matrix->cols);
    inputs.set_all(x, isa);
    const Inputs view = inputs.view();
    const int64_t blocks = num_row_blocks(matrix->rows);
    parallel_for((blocks + kBlocksPerItem - 1) / kBlocksPerItem, num_threads, [&](int64_t item) {
      multiply_item(multiply_for(isa), *matrix, item, view, tokens, y);
    });
  } catch (const std::bad_alloc&) {
    return MOETIER_NO_MEMORY;
  }
  return MOETIER_OK;
}
