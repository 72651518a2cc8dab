// The C ABI of the native CPU kernels: what kernels/cpu_native.py calls through ctypes.
//
// Every matrix is packed as kernels/packing.py says (tiles of 16 rows x 64 or 32 inputs, plain
// row-block-major, on an affine or a symmetric grid). Pointers need no alignment beyond that of
// their type; packed data needs none at all: it may lie anywhere in a mapped file. Functions
// return MOETIER_OK or MOETIER_NO_MEMORY and never throw.
#pragma once
#include <cstdint>

#if defined(__GNUC__)
#define MOETIER_EXPORT extern "C" __attribute__((visibility("default")))
#else
#define MOETIER_EXPORT extern "C"
#endif

enum MoetierStatus { MOETIER_OK = 0, MOETIER_NO_MEMORY = 1 };
enum MoetierIsa { MOETIER_SCALAR = 0, MOETIER_AVX2 = 1, MOETIER_AVX512VNNI = 2 };
// In the order of kernels.types.Grid.
enum MoetierGrid { MOETIER_AFFINE = 0, MOETIER_SYMMETRIC = 1 };
// In the order of kernels.types.Activation.
enum MoetierActivation {
  MOETIER_SILU = 0,
  MOETIER_GELU = 1,
  MOETIER_GELU_TANH = 2,
  MOETIER_RELU = 3,
  MOETIER_CLAMPED_SWIGLU = 4
};

// The structures below are mirrored in cpu_records.py, field by field.

// A packed [rows, cols]: 2 to 4 bits on an affine grid, 1 to 4 on a symmetric one. group_size is a
// multiple of 32; cols is one of it and of 64.
struct MoetierMatrix {
  const uint8_t* data;
  int64_t rows, cols;
  int32_t bits, grid;
  int64_t group_size;
};

// Rank blocks of left right: block b is at data + block_offsets[b], right [16, cols] and then, from
// the next multiple of 64 bytes on, left transposed [16, rows], both in groups of 64.
struct MoetierLowRank {
  const uint8_t* data;
  const int64_t* block_offsets;  // [num_blocks]
  int64_t num_blocks, rows, cols;
  int32_t bits, grid;
};

// What is added to one matrix's product for restored tokens: left (right x), then each plane's
// product. A plane is a matrix of the same shape.
struct MoetierRepair {
  MoetierLowRank low_rank;      // num_blocks may be 0
  const MoetierMatrix* planes;  // [num_planes]
  int64_t num_planes;
};

// One gated MLP and its tokens.
struct MoetierGatedMlp {
  MoetierMatrix gate, up;     // [ffn, hidden]
  MoetierMatrix down;         // [hidden, ffn]
  const MoetierRepair* repair;  // [3], of gate, up and down, or null
  const uint8_t* restored;  // [tokens], 0 for a token without repair; null: every token has it
  const float* gate_bias;  // [ffn] or null
  const float* up_bias;    // [ffn] or null
  const float* down_bias;  // [hidden] or null
  const float* x;  // [tokens, hidden]
  float* y;        // [tokens, hidden], overwritten
  int64_t tokens;
  int64_t activation;  // a MoetierActivation
};

// Raised with every change of this file, so that a stale build is noticed at load.
MOETIER_EXPORT int32_t moetier_abi_version();
// The fastest instruction set this processor has; any lower one may be passed as `isa` too.
MOETIER_EXPORT int32_t moetier_best_isa();
// weight [rows, cols] float32, the bits of kernels/reference.py.
MOETIER_EXPORT int32_t moetier_dequantize(const MoetierMatrix* matrix, float* weight,
                                          int32_t num_threads, int32_t isa);
// y [tokens, rows] = x [tokens, cols] times the transposed matrix, inputs quantised to int8 per
// 64, whatever the matrix's groups.
MOETIER_EXPORT int32_t moetier_matmul(const MoetierMatrix* matrix, const float* x, int64_t tokens,
                                      float* y, int32_t num_threads, int32_t isa);
// y [tokens, rows] = left (right x). Writes zeros when there is no block.
MOETIER_EXPORT int32_t moetier_low_rank_matmul(const MoetierLowRank* factors, const float* x,
                                               int64_t tokens, float* y, int32_t num_threads,
                                               int32_t isa);
// The same two without rounding the inputs: about 1e-6 of the reference.
MOETIER_EXPORT int32_t moetier_matmul_fp32(const MoetierMatrix* matrix, const float* x,
                                           int64_t tokens, float* y, int32_t num_threads,
                                           int32_t isa);
MOETIER_EXPORT int32_t moetier_low_rank_matmul_fp32(const MoetierLowRank* factors, const float* x,
                                                    int64_t tokens, float* y, int32_t num_threads,
                                                    int32_t isa);
// All of `mlps` at once, sharing at most num_threads threads.
MOETIER_EXPORT int32_t moetier_gated_mlp_many(const MoetierGatedMlp* mlps, int64_t num_mlps,
                                              int32_t num_threads, int32_t isa);
// The same in float32: what moetier_matmul_fp32 and moetier_low_rank_matmul_fp32 make, to the bit.
MOETIER_EXPORT int32_t moetier_gated_mlp_many_fp32(const MoetierGatedMlp* mlps, int64_t num_mlps,
                                                   int32_t num_threads, int32_t isa);
// y [num_rows, hidden]: of each row its pairs' outputs [num_pairs, hidden] times their weights,
// product and sum rounded one by one, added in the order of the pairs. rows [num_pairs] say whose.
MOETIER_EXPORT int32_t moetier_weighted_sum(const float* outputs, const int64_t* rows,
                                            const float* weights, int64_t num_pairs,
                                            int64_t hidden, int64_t num_rows, float* y);
// Helper threads stay on these cores from now on, round robin from the second: the first is the
// caller's. Only Linux heeds it.
MOETIER_EXPORT int32_t moetier_pin_helpers(const int32_t* cores, int64_t num_cores);
