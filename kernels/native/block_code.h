// The C ABI of the block code's decoder: what kernels/cpu_block_code.py calls through ctypes.
#pragma once
#include "moetier_kernels.h"

enum MoetierBlockCodeStatus { MOETIER_BLOCK_CODE_MALFORMED = 2 };

// The layout is in kernels/block_code.py; offsets and flags come from a header that was checked.
struct MoetierBlockCode {
  const uint8_t* data;
  int64_t num_bytes, rows, cols;
  int64_t chunk_starts, plane_counts, factors, payload;  // where the sections start, in bytes
  int32_t is_differenced, is_grouped;
};

// weight [rows, cols] float32, the bits of kernels/block_code.py. Reads nothing outside of the
// data; MOETIER_BLOCK_CODE_MALFORMED when its parts contradict one another.
MOETIER_EXPORT int32_t moetier_decode_block_code(const MoetierBlockCode* code, float* weight,
                                                 int32_t num_threads, int32_t isa);
