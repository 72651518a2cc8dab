// What joins gate and up: act(gate) * up, for one run of 64 values.
#pragma once

namespace moetier {

// out[i] = act(gate[i]) * up[i] for i in [0, 64); out may be gate. `activation` is a
// MoetierActivation.
void apply_gate(int activation, const float* gate, const float* up, float* out, int isa);

}  // namespace moetier
