// Several gated MLPs in one call: gate and up, activation, down, without the middle ever leaving
// the cache.
#include <algorithm>
#include <new>
#include <vector>

#include "gate.h"
#include "inputs.h"
#include "moetier_kernels.h"
#include "multiply.h"
#include "parallel.h"
#include "tile.h"

namespace moetier {
namespace {

constexpr int64_t kBlocksPerItem = kGroupSize / kTileRows;  // an item makes one whole group
constexpr int64_t kTokensAtOnce = 32;  // gate and up of 64 rows: 2 x 8 KiB, inside the L1 cache

struct Work {
  const MoetierGatedMlp* mlp;
  QuantizedInputs inputs;  // of x
  QuantizedInputs middle;  // of act(gate x) * (up x)
  int64_t first_item;      // of the phase in hand
};

// The work that holds `item`, and the item's place in it.
std::pair<Work*, int64_t> find(std::vector<Work>& works, int64_t item) {
  auto after = std::upper_bound(works.begin(), works.end(), item,
                                [](int64_t i, const Work& work) { return i < work.first_item; });
  Work* work = &*(after - 1);
  return {work, item - work->first_item};
}

// Numbers the items of a phase through all works; returns how many there are. A work without tokens
// has none, and shares its first item with the next work, which `find` then prefers.
int64_t number_items(std::vector<Work>& works, MoetierMatrix MoetierGatedMlp::*matrix) {
  int64_t items = 0;
  for (Work& work : works) {
    work.first_item = items;
    if (work.mlp->tokens) items += (work.mlp->*matrix).rows / kGroupSize;
  }
  return items;
}

RowBlocks rows_of(const MoetierMatrix& matrix, int64_t item) {
  return row_blocks(matrix).slice(item * kBlocksPerItem, kBlocksPerItem);
}

void add_bias(float* values, const float* bias, int64_t item) {
  if (!bias) return;
  for (int i = 0; i < kGroupSize; i++) values[i] += bias[item * kGroupSize + i];
}

// 64 values of the middle for every token, quantised for the down projection.
void make_middle(Work& work, int64_t item, Multiply* multiply, int isa) {
  const MoetierGatedMlp& mlp = *work.mlp;
  const RowBlocks gate_rows = rows_of(mlp.gate, item);
  const RowBlocks up_rows = rows_of(mlp.up, item);
  alignas(64) float gate[kTokensAtOnce][kGroupSize], up[kTokensAtOnce][kGroupSize];
  for (int64_t t = 0; t < mlp.tokens; t += kTokensAtOnce) {
    const int64_t n = std::min(kTokensAtOnce, mlp.tokens - t);
    const Inputs inputs = work.inputs.view().from_token(t);
    multiply(gate_rows, inputs, n, gate[0], kGroupSize);
    multiply(up_rows, inputs, n, up[0], kGroupSize);
    for (int64_t i = 0; i < n; i++) {
      add_bias(gate[i], mlp.gate_bias, item);
      add_bias(up[i], mlp.up_bias, item);
      apply_gate(static_cast<int>(mlp.activation), gate[i], up[i], gate[i], isa);
      work.middle.set_group(t + i, item, gate[i], isa);
    }
  }
}

// 64 values of the output for every token.
void make_output(Work& work, int64_t item, Multiply* multiply) {
  const MoetierGatedMlp& mlp = *work.mlp;
  const int64_t hidden = mlp.down.rows;
  float* y = mlp.y + item * kGroupSize;
  multiply(rows_of(mlp.down, item), work.middle.view(), mlp.tokens, y, hidden);
  for (int64_t t = 0; t < mlp.tokens; t++) add_bias(y + t * hidden, mlp.down_bias, item);
}

}  // namespace
}  // namespace moetier

int32_t moetier_gated_mlp_many(const MoetierGatedMlp* mlps, int64_t num_mlps, int32_t num_threads,
                               int32_t isa) {
  using namespace moetier;
  try {
    std::vector<Work> works;
    works.reserve(static_cast<size_t>(num_mlps));
    for (int64_t i = 0; i < num_mlps; i++)
      works.push_back({mlps + i, QuantizedInputs(mlps[i].tokens, mlps[i].gate.cols),
                       QuantizedInputs(mlps[i].tokens, mlps[i].down.cols), 0});
    Multiply* const multiply = multiply_for(isa);

    parallel_for(num_mlps, num_threads,
                 [&](int64_t i) { works[i].inputs.set_all(mlps[i].x, isa); });
    parallel_for(number_items(works, &MoetierGatedMlp::gate), num_threads, [&](int64_t item) {
      auto [work, place] = find(works, item);
      make_middle(*work, place, multiply, isa);
    });
    parallel_for(number_items(works, &MoetierGatedMlp::down), num_threads, [&](int64_t item) {
      auto [work, place] = find(works, item);
      make_output(*work, place, multiply);
    });
  } catch (const std::bad_alloc&) {
    return MOETIER_NO_MEMORY;
  }
  return MOETIER_OK;
}
