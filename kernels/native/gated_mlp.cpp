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
#include "multiply_fp32.h"
#include "parallel.h"
#include "tile.h"

namespace moetier {
namespace {

constexpr int64_t kBlocksPerItem = kTileCols / kTileRows;  // an item makes one whole group
constexpr int64_t kTokensAtOnce = 32;  // gate and up of 64 rows: 2 x 8 KiB, inside the L1 cache

// What the inputs of a product are: how they are kept, seen, and multiplied.
struct Int8Form {
  using Kept = QuantizedInputs;
  using Seen = Inputs;
  using Product = Multiply*;
  static Product product(int isa) { return multiply_for(isa); }
};
struct Fp32Form {
  using Kept = KeptFloats;
  using Seen = SeenFloats;
  struct Product {
    MultiplyFp32* multiply;
    void operator()(const RowBlocks& rows, const SeenFloats& inputs, int64_t tokens, float* y,
                    int64_t row_stride) const {
      multiply(rows, inputs.for_tiles(rows), tokens, y, row_stride);
    }
  };
  static Product product(int isa) { return {multiply_fp32_for(isa)}; }
};

enum Which { kGate = 0, kUp = 1, kDown = 2 };  // in the order of MoetierGatedMlp::repair

// Tokens have places: those that are restored come first, in order, so that their repair is one
// product of adjacent tokens. A token's result depends on neither its place nor its neighbours.
template <class Form>
struct Work {
  const MoetierGatedMlp* mlp;
  typename Form::Kept inputs;   // of x, by place
  typename Form::Kept middle;   // of act(gate x) * (up x), by place
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
template <class Form, class Count, class Body>
void for_items(std::vector<Work<Form>>& works, int num_threads, const Count& count, const Body& body) {
  int64_t items = 0;
  for (Work<Form>& work : works) {
    work.first_item = items;
    items += count(work);
  }
  parallel_for(items, num_threads, [&](int64_t item) {
    // A work without items shares its first with the next one, which this search prefers.
    auto after = std::upper_bound(works.begin(), works.end(), item,
                                  [](int64_t i, const Work<Form>& work) { return i < work.first_item; });
    Work<Form>& work = *(after - 1);
    body(work, item - work.first_item);
  });
}

RowBlocks rows_of(const MoetierMatrix& matrix, int64_t group) {
  return row_blocks(matrix).slice(group * kBlocksPerItem, kBlocksPerItem);
}

template <class Form>
void set_inputs(Work<Form>& work, int isa) {
  const int64_t hidden = work.mlp->gate.cols;
  for (size_t place = 0; place < work.token.size(); place++)
    for (int64_t group = 0; group < hidden / kTileCols; group++)
      work.inputs.set_group(place, group,
                            work.mlp->x + work.token[place] * hidden + group * kTileCols, isa);
}

template <class Form>
void make_ranks(Work<Form>& work, Which which, int64_t block, const typename Form::Seen& inputs, typename Form::Product multiply) {
  multiply(row_blocks(right_factor(work.mlp->repair[which].low_rank, block)), inputs,
           work.restored, work.ranks[which].data() + block * work.block_stride(), kTileRows);
}

// values [n][64] += what the repair of one matrix makes of n restored places from `first` on.
template <class Form>
void add_repair(const Work<Form>& work, Which which, int64_t group, int64_t first, int64_t n,
                const typename Form::Seen& inputs, float (*values)[kTileCols], typename Form::Product multiply, int isa) {
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
template <class Form>
void multiply_group(const Work<Form>& work, Which which, int64_t group, int64_t first, int64_t n,
                    const typename Form::Seen& inputs, float (*values)[kTileCols], typename Form::Product multiply,
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
template <class Form>
void make_middle(Work<Form>& work, int64_t group, typename Form::Product multiply, int isa) {
  const MoetierGatedMlp& mlp = *work.mlp;
  alignas(64) float gate[kTokensAtOnce][kTileCols], up[kTokensAtOnce][kTileCols];
  for (int64_t first = 0; first < mlp.tokens; first += kTokensAtOnce) {
    const int64_t n = std::min(kTokensAtOnce, mlp.tokens - first);
    const typename Form::Seen inputs = work.inputs.view().from_token(first);
    multiply_group(work, kGate, group, first, n, inputs, gate, multiply, isa);
    multiply_group(work, kUp, group, first, n, inputs, up, multiply, isa);
    for (int64_t i = 0; i < n; i++) {
      apply_gate(static_cast<int>(mlp.activation), gate[i], up[i], gate[i], isa);
      work.middle.set_group(first + i, group, gate[i], isa);
    }
  }
}

// 64 values of the output for every token.
template <class Form>
void make_output(Work<Form>& work, int64_t group, typename Form::Product multiply, int isa) {
  const MoetierGatedMlp& mlp = *work.mlp;
  alignas(64) float values[kTokensAtOnce][kTileCols];
  for (int64_t first = 0; first < mlp.tokens; first += kTokensAtOnce) {
    const int64_t n = std::min(kTokensAtOnce, mlp.tokens - first);
    const typename Form::Seen inputs = work.middle.view().from_token(first);
    multiply_group(work, kDown, group, first, n, inputs, values, multiply, isa);
    for (int64_t i = 0; i < n; i++)
      std::copy_n(values[i], kTileCols,
                  mlp.y + work.token[first + i] * mlp.down.rows + group * kTileCols);
  }
}

template <class Form>
void run(std::vector<Work<Form>>& works, int num_threads, int isa) {
  const typename Form::Product multiply = Form::product(isa);
  auto groups = [](Which which) {
    return [which](const Work<Form>& work) { return work.num_groups(which); };
  };
  for_items(
      works, num_threads, [](const Work<Form>&) { return 1; },
      [&](Work<Form>& work, int64_t) { set_inputs(work, isa); });
  for_items(
      works, num_threads,
      [](const Work<Form>& work) { return work.num_rank_blocks(kGate) + work.num_rank_blocks(kUp); },
      [&](Work<Form>& work, int64_t place) {
        const int64_t of_gate = work.num_rank_blocks(kGate);
        const bool is_gate = place < of_gate;
        make_ranks(work, is_gate ? kGate : kUp, is_gate ? place : place - of_gate,
                   work.inputs.view(), multiply);
      });
  for_items(works, num_threads, groups(kGate),
            [&](Work<Form>& work, int64_t group) { make_middle(work, group, multiply, isa); });
  for_items(
      works, num_threads, [](const Work<Form>& work) { return work.num_rank_blocks(kDown); },
      [&](Work<Form>& work, int64_t block) {
        make_ranks(work, kDown, block, work.middle.view(), multiply);
      });
  for_items(works, num_threads, groups(kDown),
            [&](Work<Form>& work, int64_t group) { make_output(work, group, multiply, isa); });
}

template <class Form>
int32_t run_all(const MoetierGatedMlp* mlps, int64_t num_mlps, int num_threads, int isa) {
  try {
    std::vector<Work<Form>> works;
    works.reserve(static_cast<size_t>(num_mlps));
    for (int64_t i = 0; i < num_mlps; i++) works.emplace_back(mlps[i]);
    run(works, num_threads, isa);
  } catch (const std::bad_alloc&) {
    return MOETIER_NO_MEMORY;
  }
  return MOETIER_OK;
}

}  // namespace
}  // namespace moetier

int32_t moetier_gated_mlp_many(const MoetierGatedMlp* mlps, int64_t num_mlps, int32_t num_threads,
                               int32_t isa) {
  return moetier::run_all<moetier::Int8Form>(mlps, num_mlps, num_threads, isa);
}

int32_t moetier_gated_mlp_many_fp32(const MoetierGatedMlp* mlps, int64_t num_mlps,
                                    int32_t num_threads, int32_t isa) {
  return moetier::run_all<moetier::Fp32Form>(mlps, num_mlps, num_threads, isa);
}

int32_t moetier_weighted_sum(const float* outputs, const int64_t* rows, const float* weights,
                             int64_t num_pairs, int64_t hidden, int64_t num_rows, float* y) {
  std::fill_n(y, num_rows * hidden, 0.f);
  for (int64_t pair = 0; pair < num_pairs; pair++) {
    float* sum = y + rows[pair] * hidden;
    for (int64_t i = 0; i < hidden; i++) sum[i] += weights[pair] * outputs[pair * hidden + i];
  }
  return MOETIER_OK;
}
