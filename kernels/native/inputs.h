// Activations as the integer kernels read them: int8 per 64 inputs, with a scale for those. Weights
// in groups of 32 inputs or of 128 meet the same; so one matrix may be in other groups than the next.
#pragma once
#include <cstdint>
#include <vector>

#include "target.h"
#include "tile.h"

namespace moetier {

// A view of quantised inputs. Arrays are [group][token] with `stride` tokens per group of 64,
// so that a kernel walking along the groups of one row block reads them in order.
struct Inputs {
  const int8_t* codes;  // 64 bytes per (group, token)
  const float* scale;   // x is about scale * code
  const float* sum;     // scale * (sum of the 64 codes); meets the zero points
  const float* half_sums;  // of codes 0 to 31, then of 32 to 63: [group][2][token]; may be null
  int64_t stride;

  Inputs from_token(int64_t token) const {
    return Inputs{codes + token * 64, scale + token, sum + token,
                  half_sums ? half_sums + token : nullptr, stride};
  }
  Inputs next_group() const {
    return Inputs{codes + stride * 64, scale + stride, sum + stride,
                  half_sums ? half_sums + 2 * stride : nullptr, stride};
  }
};

// The inputs that each tile of a row block meets, from left to right.
template <class Form>
class InputWalk {
 public:
  ALWAYS_INLINE explicit InputWalk(const Inputs& inputs) : in_(inputs) {}

  // Of token t: 64 bytes further than those of token t - 1.
  ALWAYS_INLINE const int8_t* codes() const { return in_.codes + half_ * Form::kCols; }
  ALWAYS_INLINE float scale(int64_t t) const { return in_.scale[t]; }
  ALWAYS_INLINE float sum(int64_t t) const {
    return kIsHalf ? in_.half_sums[half_ * in_.stride + t] : in_.sum[t];
  }
  ALWAYS_INLINE void next() {
    if (kIsHalf && (half_ ^= 1)) return;
    in_ = in_.next_group();
  }

 private:
  static constexpr bool kIsHalf = Form::kLayout == kHalfTiles;
  Inputs in_;
  int64_t half_ = 0;  // stays 0 with whole tiles
};

// Owns quantised inputs of [tokens, cols]. Throws std::bad_alloc.
class QuantizedInputs {
 public:
  // Matrices in half tiles need the half sums.
  QuantizedInputs(int64_t tokens, int64_t cols, bool with_half_sums);
  Inputs view() const {
    const float* halves = half_sums_.empty() ? nullptr : half_sums_.data();
    return Inputs{codes_.data(), scale_.data(), sum_.data(), halves, tokens_};
  }
  // Quantises the 64 inputs at x as group `group` of token `token`. Any two calls may run at once.
  void set_group(int64_t token, int64_t group, const float* x, int isa);
  // Quantises all of x [tokens, cols].
  void set_all(const float* x, int isa);

 private:
  int64_t tokens_, groups_;
  std::vector<int8_t> codes_;
  std::vector<float> scale_, sum_, half_sums_;
};

}  // namespace moetier
