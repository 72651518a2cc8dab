// Activations as the integer kernels read them: int8 per group of 64 inputs, with a scale per
// group.
#pragma once
#include <cstdint>
#include <vector>

namespace moetier {

// A view of quantised inputs. All three arrays are [group][token] with `stride` tokens per group,
// so that a kernel walking along the groups of one row block reads them in order.
struct Inputs {
  const int8_t* codes;  // 64 bytes per (group, token)
  const float* scale;   // x is about scale * code
  const float* sum;     // scale * (sum of the 64 codes); meets the zero points
  int64_t stride;

  Inputs from_token(int64_t token) const {
    return Inputs{codes + token * 64, scale + token, sum + token, stride};
  }
  Inputs next_group() const {
    return Inputs{codes + stride * 64, scale + stride, sum + stride, stride};
  }
};

// Owns quantised inputs of [tokens, cols]. Throws std::bad_alloc.
class QuantizedInputs {
 public:
  QuantizedInputs(int64_t tokens, int64_t cols);
  Inputs view() const { return Inputs{codes_.data(), scale_.data(), sum_.data(), tokens_}; }
  // Quantises the 64 inputs at x as group `group` of token `token`. Any two calls may run at once.
  void set_group(int64_t token, int64_t group, const float* x, int isa);
  // Quantises all of x [tokens, cols].
  void set_all(const float* x, int isa);

 private:
  int64_t tokens_, groups_;
  std::vector<int8_t> codes_;
  std::vector<float> scale_, sum_;
};

}  // namespace moetier
