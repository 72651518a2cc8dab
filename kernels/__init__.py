"""Low-bit and low-rank matrix maths, three ways: reference (truth), Triton (GPU), native (CPU).

Knows matrices only: no expert, no layer, no Ray. `kernels.ops` is the public face.
"""
