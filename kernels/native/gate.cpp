// The activations of kernels/activations.py, written once and compiled for each instruction set.
#include "gate.h"

#include <cmath>
#include <cstdint>
#include <cstring>

#include "moetier_kernels.h"
#include "target.h"
#include "tile.h"

namespace moetier {
namespace {

// e^x to about 2e-7 relative, without branches or calls so that a loop of it becomes vector code.
// x = n ln 2 + r; the polynomial is Cephes' expf. Outside [-87, 88] the result saturates.
ALWAYS_INLINE float exponential(float x) {
  x = x < -87.f ? -87.f : x;  // NaN passes through both
  x = x > 88.f ? 88.f : x;
  const float n = (x * 1.44269504f + 12582912.f) - 12582912.f;  // nearest integer
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.f;
  const float bounded = n >= -127.f ? n : -127.f;  // gives NaN a defined conversion
  const int32_t power_bits = (static_cast<int32_t>(bounded) + 127) << 23;
  float power;
  std::memcpy(&power, &power_bits, sizeof power);
  return p * power;
}

ALWAYS_INLINE float sigmoid(float x) { return 1.f / (1.f + exponential(-x)); }

ALWAYS_INLINE float gelu_tanh(float x) {
  // 0.5 x (1 + tanh(u)) is x sigmoid(2u).
  const float u = 0.7978845608f * (x + 0.044715f * x * x * x);
  return x * sigmoid(2.f * u);
}

ALWAYS_INLINE void gate_loop(int activation, const float* gate, const float* up, float* out) {
  constexpr int n = kTileCols;
  if (activation == MOETIER_SILU) {
    for (int i = 0; i < n; i++) out[i] = gate[i] * sigmoid(gate[i]) * up[i];
  } else if (activation == MOETIER_GELU) {
    for (int i = 0; i < n; i++)
      out[i] = 0.5f * gate[i] * (1.f + std::erf(gate[i] * 0.7071067812f)) * up[i];
  } else if (activation == MOETIER_GELU_TANH) {
    for (int i = 0; i < n; i++) out[i] = gelu_tanh(gate[i]) * up[i];
  } else if (activation == MOETIER_RELU) {
    for (int i = 0; i < n; i++) out[i] = (gate[i] < 0.f ? 0.f : gate[i]) * up[i];
  } else {  // clamped_swiglu
    constexpr float kAlpha = 1.702f, kLimit = 7.f;
    for (int i = 0; i < n; i++) {
      const float g = gate[i] > kLimit ? kLimit : gate[i];
      float u = up[i] > kLimit ? kLimit : up[i];
      u = u < -kLimit ? -kLimit : u;
      out[i] = (u + 1.f) * (g * sigmoid(kAlpha * g));
    }
  }
}

#if MOETIER_X86
TARGET_AVX2 void gate_avx2(int activation, const float* gate, const float* up, float* out) {
  gate_loop(activation, gate, up, out);
}
TARGET_AVX512 void gate_avx512(int activation, const float* gate, const float* up, float* out) {
  gate_loop(activation, gate, up, out);
}
#endif

}  // namespace

void apply_gate(int activation, const float* gate, const float* up, float* out, int isa) {
#if MOETIER_X86
  if (isa == MOETIER_AVX512VNNI) return gate_avx512(activation, gate, up, out);
  if (isa == MOETIER_AVX2) return gate_avx2(activation, gate, up, out);
#endif
  (void)isa;
  gate_loop(activation, gate, up, out);
}

}  // namespace moetier
