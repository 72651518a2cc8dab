// A packed matrix times float32 inputs that are rounded to int8.
#include <new>

#include "inputs.h"
#include "moetier_kernels.h"
#include "multiply.h"
#include "row_items.h"

int32_t moetier_matmul(const MoetierMatrix* matrix, const float* x, int64_t tokens, float* y,
                       int32_t num_threads, int32_t isa) {
  using namespace moetier;
  try {
    QuantizedInputs inputs(tokens, matrix->cols, has_half_tiles(*matrix));
    inputs.set_all(x, isa);
    const Inputs view = inputs.view();
    multiply_all_rows(*matrix, tokens, y, num_threads,
                      [&](const RowBlocks& rows, int64_t first, int64_t n, float* out,
                          int64_t row_stride) {
                        multiply_for(isa)(rows, view.from_token(first), n, out, row_stride);
                      });
  } catch (const std::bad_alloc&) {
    return MOETIER_NO_MEMORY;
  }
  return MOETIER_OK;
}
