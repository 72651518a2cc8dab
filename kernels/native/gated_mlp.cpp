// Several gated MLPs in one call: gate and up, activation, down, each with its repair, without the
// middle ever leaving the cache.
#include <algorithm>
#include <new>
#include <vector>

#include "gate.h"
#include "inputs.h"
#include "low_rank.h"
#include "moetier_kernels.h"
#include "multiply.h"
#include "parallel.h"
#include "tile.h"

namespace moetier {
namespace {

constexpr int64_t kBlocksPerItem = kTileCols / kTileRows;  // an item makes one whole group
constexpr int64_t kTokensAtOnce = 32;  // gate and up of 64 rows: 2 x 8 KiB, inside the L1 cache

enum Which { kGate = 0, kUp = 1, kDown = 2 };  // in the order of MoetierGatedMlp::repair

// Tokens have places: those that are restored come first, in order, so that their repair is one
// product of adjacent tokens. A token's result depends on neither its place nor its neighbours.
struct Work {
  const MoetierGatedMlp* mlp;
  QuantizedInputs inputs;      // of x, by place
  QuantizedInputs middle;      // of act(gate x) * (up x), by place
  std::vector<int64_t> token;  // at each place
  int64_t restored;            // how many places
  std::vector<float> ranks[3];  // right x of gate, up and down: [block][restored place][16]
  int64_t first_item;          // of the phase in hand

  Work(const MoetierGatedMlp& of)
      : mlp(&of),
        inputs(of.tokens, of.gate.cols, has_half_tiles(of.gate) || has_half_tiles(of.up)),
        middle(of.tokens, of.down.cols, has_half_tiles(of.down)),
        first_item(0) {
    auto is_restored = [&](int64_t t) { return of.repair && (!of.restored || of.restored[t]); };
    for (bool wanted : {true, false}) {
      for (int64_t t = 0; t < of.tokens; t++)
        if (is_restored(t) == wanted) token.push_back(t);
      if (wanted) restored = static_cast<int64_t>(token.size());
    }
    for (Which which : {kGate, kUp, kDown})
      ranks[which].resize(static_cast<size_t>(num_rank_blocks(which) * block_stride()));
  }

  int64_t block_stride() const { return restored * kTileRows; }
  int64_t num_rank_blocks(Which which) const {
    return restored ? mlp->repair[which].low_rank.num_blocks : 0;
  }
  // Groups of 64 rows of gate and up, or of down.
  int64_t num_groups(Which which) const {
    return mlp->tokens ? (which == kDown ? mlp->down : mlp->gate).rows / kTileCols : 0;
  }
};

// Calls body(work, place) for every item of every work; `count(work)` says how many it has.
template <class Count, class Body>
void for_items(std::vector<Work>& works, int num_threads, const Count& count, const Body& body) {
  int64_t items = 0;
  for (Work& work : works) {
    work.first_item = items;
    items += count(work);
  }
  parallel_for(items, num_threads, [&](int64_t item) {
    // A work without items shares its first with the next one, which this search prefers.
    auto after = std::upper_bound(works.begin(), works.end(), item,
                                  [](int64_t i, const Work& work) { return i < work.first_item; });
    Work& work = *(after - 1);
    body(work, item - work.first_item);
  });
}

RowBlocks rows_of(const MoetierMatrix& matrix, int64_t group) {
  return row_blocks(matrix).slice(group * kBlocksPerItem, kBlocksPerItem);
}

void set_inputs(Work& work, int isa) {
  const int64_t hidden = work.mlp->gate.cols;
  for (size_t place = 0; place < work.token.size(); place++)
    for (int64_t group = 0; group < hidden / kTileCols; group++)
      work.inputs.set_group(place, group,
                            work.mlp->x + work.token[place] * hidden + group * kTileCols, isa);
}

void make_ranks(Work& work, Which which, int64_t block, const Inputs& inputs, Multiply* multiply) {
  multiply(row_blocks(right_factor(work.mlp->repair[which].low_rank, block)), inputs,
           work.restored, work.ranks[which].data() + block * work.block_stride(), kTileRows);
}

// values [n][64] += what the repair of one matrix makes of n restored places from `first` on.
void add_repair(const Work& work, Which which, int64_t group, int64_t first, int64_t n,
                const Inputs& inputs, float (*values)[kTileCols], Multiply* multiply, int isa) {
  const MoetierRepair& repair = work.mlp->repair[which];
  alignas(64) float part[kTokensAtOnce][kTileCols];
  auto add_part = [&] {
    for (int64_t i = 0; i < n; i++)
      for (int row = 0; row < kTileCols; row++) values[i][row] += part[i][row];
  };
  if (repair.low_rank.num_blocks) {
    for (int64_t i = 0; i < n; i++) std::fill_n(part[i], kTileCols, 0.f);
    add_left(repair.low_rank, work.ranks[which].data() + first * kTileRows, work.block_stride(), n,
             group, part[0], kTileCols, isa);
    add_part();
  }
  for (int64_t plane = 0; plane < repair.num_planes; plane++) {
    multiply(rows_of(repair.planes[plane], group), inputs, n, part[0], kTileCols);
    add_part();
  }
}

// values [n][64]: a group of rows of one matrix, its repair and its bias, for n places.
void multiply_group(const Work& work, Which which, int64_t group, int64_t first, int64_t n,
                    const Inputs& inputs, float (*values)[kTileCols], Multiply* multiply,
                    int isa) {
  const MoetierGatedMlp& mlp = *work.mlp;
  const MoetierMatrix& matrix = which == kGate ? mlp.gate : which == kUp ? mlp.up : mlp.down;
  const float* bias =
      which == kGate ? mlp.gate_bias : which == kUp ? mlp.up_bias : mlp.down_bias;
  multiply(rows_of(matrix, group), inputs, n, values[0], kTileCols);
  const int64_t restored = std::min(n, work.restored - first);
  if (restored > 0)
    add_repair(work, which, group, first, restored, inputs, values, multiply, isa);
  if (!bias) return;
  for (int64_t i = 0; i < n; i++)
    for (int row = 0; row < kTileCols; row++) values[i][row] += bias[group * kTileCols + row];
}

// 64 values of the middle for every token, quantised for the down projection.
void make_middle(Work& work, int64_t group, Multiply* multiply, int isa) {
  const MoetierGatedMlp& mlp = *work.mlp;
  alignas(64) float gate[kTokensAtOnce][kTileCols], up[kTokensAtOnce][kTileCols];
  for (int64_t first = 0; first < mlp.tokens; first += kTokensAtOnce) {
    const int64_t n = std::min(kTokensAtOnce, mlp.tokens - first);
    const Inputs inputs = work.inputs.view().from_token(first);
    multiply_group(work, kGate, group, first, n, inputs, gate, multiply, isa);
    multiply_group(work, kUp, group, first, n, inputs, up, multiply, isa);
    for (int64_t i = 0; i < n; i++) {
      apply_gate(static_cast<int>(mlp.activation), gate[i], up[i], gate[i], isa);
      work.middle.set_group(first + i, group, gate[i], isa);
    }
  }
}

// 64 values of the output for every token.
void make_output(Work& work, int64_t group, Multiply* multiply, int isa) {
  const MoetierGatedMlp& mlp = *work.mlp;
  alignas(64) float values[kTokensAtOnce][kTileCols];
  for (int64_t first = 0; first < mlp.tokens; first += kTokensAtOnce) {
    const int64_t n = std::min(kTokensAtOnce, mlp.tokens - first);
    const Inputs inputs = work.middle.view().from_token(first);
    multiply_group(work, kDown, group, first, n, inputs, values, multiply, isa);
    for (int64_t i = 0; i < n; i++)
      std::copy_n(values[i], kTileCols,
                  mlp.y + work.token[first + i] * mlp.down.rows + group * kTileCols);
  }
}

void run(std::vector<Work>& works, int num_threads, int isa) {
  Multiply* const multiply = multiply_for(isa);
  auto groups = [](Which which) {
    return [which](const Work& work) { return work.num_groups(which); };
  };
  for_items(
      works, num_threads, [](const Work&) { return 1; },
      [&](Work& work, int64_t) { set_inputs(work, isa); });
  for_items(
      works, num_threads,
      [](const Work& work) { return work.num_rank_blocks(kGate) + work.num_rank_blocks(kUp); },
      [&](Work& work, int64_t place) {
        const int64_t of_gate = work.num_rank_blocks(kGate);
        const bool is_gate = place < of_gate;
        make_ranks(work, is_gate ? kGate : kUp, is_gate ? place : place - of_gate,
                   work.inputs.view(), multiply);
      });
  for_items(works, num_threads, groups(kGate),
            [&](Work& work, int64_t group) { make_middle(work, group, multiply, isa); });
  for_items(
      works, num_threads, [](const Work& work) { return work.num_rank_blocks(kDown); },
      [&](Work& work, int64_t block) {
        make_ranks(work, kDown, block, work.middle.view(), multiply);
      });
  for_items(works, num_threads, groups(kDown),
            [&](Work& work, int64_t group) { make_output(work, group, multiply, isa); });
}

}  // namespace
}  // namespace moetier

int32_t moetier_gated_mlp_many(const MoetierGatedMlp* mlps, int64_t num_mlps, int32_t num_threads,
                               int32_t isa) {
  using namespace moetier;
  try {
    std::vector<Work> works;
    works.reserve(static_cast<size_t>(num_mlps));
    for (int64_t i = 0; i < num_mlps; i++) works.emplace_back(mlps[i]);
    run(works, num_threads, isa);
  } catch (const std::bad_alloc&) {
    return MOETIER_NO_MEMORY;
  }
  return MOETIER_OK;
}
