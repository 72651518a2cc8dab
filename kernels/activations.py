"""What joins the gate and up projections of a gated MLP, in plain torch.

Knows no matrix. The native forms in `kernels/native/gate.cpp` follow these formulas.

Legend: T tokens, F ffn.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from kernels.types import Activation

SWIGLU_ALPHA = 1.702
"""Slope of gpt-oss' sigmoid: gate * sigmoid(alpha * gate)."""
SWIGLU_LIMIT = 7.0
"""gpt-oss clamps gate from above and up from both sides at this value."""


def apply_gate(activation: Activation, gate_TF: torch.Tensor, up_TF: torch.Tensor) -> torch.Tensor:
    """act(gate) * up, [T, F] in the inputs' dtype; gpt-oss' clamped form adds one to up.

    Raises ValueError for an unknown activation.
    """
    if activation == "silu":
        return F.silu(gate_TF) * up_TF
    if activation == "gelu":
        return F.gelu(gate_TF) * up_TF
    if activation == "gelu_tanh":
        return F.gelu(gate_TF, approximate="tanh") * up_TF
    if activation == "relu":
        return F.relu(gate_TF) * up_TF
    if activation == "clamped_swiglu":
        gate = gate_TF.clamp(max=SWIGLU_LIMIT)
        up = up_TF.clamp(min=-SWIGLU_LIMIT, max=SWIGLU_LIMIT)
        return (up + 1) * (gate * torch.sigmoid(SWIGLU_ALPHA * gate))
    raise ValueError(f"activation: got {activation!r}, see kernels.types.Activation")
