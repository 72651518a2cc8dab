"""Maximum logit difference per family between this path and transformers' own, at equal weights.

For each family: write a tiny random checkpoint, compress it, and run the same tokens through the
store and through the unmodified transformers model whose expert weights were replaced by the
dequantised (for restored pairs: compensated) ones. `python -m benchmarks.families` writes a table.

Legend: B sequences, T tokens, S = B*T, K top-k, E experts, H hidden, F ffn, V vocabulary.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from benchmarks.record import RESULTS, provenance
from expert_store.compress import compress
from expert_store.config import CompressionConfig
from expert_store.families import experts_modules
from expert_store.format import parse_codes, parse_factors
from expert_store.segment import Segment
from expert_store.types import ExpertKey, RecordRequest
from gpu_worker.config import WorkerConfig
from gpu_worker.experts import StoreExperts
from gpu_worker.model import load_model
from kernels import reference
from tests.tiny_checkpoints import FAMILIES, write_tiny_checkpoint

TOLERANCE = 1e-4
"""Relative to the largest logit, float32."""
OUT = RESULTS / "families.md"
EXPERTS, TOP_K, VOCAB = 4, 2, 128
CONTROL_FACTOR = 1.01


@dataclass(frozen=True, slots=True)
class FamilyDifference:
    """Largest logit difference over the largest logit, by how many experts a token has restored.

    `control` is that of a reference in which one expert's weights were multiplied by 1.01;
    `effect` how far restoring all pairs moves the logits. Both must be far above the tolerance.
    """

    family: str
    by_top_n: dict[int, float]
    control: float
    effect: float

    @property
    def worst(self) -> float:
        return max(self.by_top_n.values())


@dataclass(frozen=True, slots=True)
class _Expert:
    """One expert in full precision, canonical [out, in]; biases as the store has them."""

    gate_FH: torch.Tensor
    up_FH: torch.Tensor
    down_HF: torch.Tensor
    biases: tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]


def measure(family: str, folder: Path, *, seed: int = 0) -> FamilyDifference:
    """Write, compress and compare one family's tiny checkpoint inside `folder`."""
    model = folder / f"{family}-model"
    store = folder / f"{family}-store"
    write_tiny_checkpoint(
        family, model, hidden=128, ffn=128, experts=EXPERTS, top_k=TOP_K, vocab=VOCAB, seed=seed
    )
    compress(model, store, CompressionConfig(recipe="paper", avg_rank=16), jobs=1)
    generator = torch.Generator().manual_seed(seed)
    ids_BT = torch.randint(0, VOCAB, (2, 12), generator=generator)
    segment = Segment(store)
    by_top_n, expected = {}, {}
    for top_n in range(TOP_K + 1):
        expected[top_n] = reference_logits(model, segment, ids_BT, top_n)
        got = store_logits(store, segment, ids_BT, top_n)
        by_top_n[top_n] = _difference(got, expected[top_n])
    busiest = ExpertKey(max(segment.manifest.model.moe_layers), 0)
    control = reference_logits(model, segment, ids_BT, 0, scaled=busiest)
    return FamilyDifference(
        family,
        by_top_n,
        control=_difference(control, expected[0]),
        effect=_difference(expected[TOP_K], expected[0]),
    )


def store_logits(store: Path, segment: Segment, ids_BT: torch.Tensor, top_n: int) -> torch.Tensor:
    """[B, T, V] through our path, float32 on the CPU."""
    config = WorkerConfig(top_n=top_n, device="cpu", dtype="float32").resolve(segment.manifest)
    experts = StoreExperts(segment, config)
    try:
        runner = load_model(store, segment.manifest, config, experts)
        positions_BT = torch.arange(ids_BT.shape[1]).expand_as(ids_BT)
        logits = runner.forward(ids_BT, positions_BT, None, None).logits
        experts.check_integrity()
        return logits
    finally:
        experts.close()


@torch.inference_mode()
def reference_logits(
    model: Path,
    segment: Segment,
    ids_BT: torch.Tensor,
    top_n: int,
    *,
    scaled: ExpertKey | None = None,
) -> torch.Tensor:
    """[B, T, V] of transformers' own model and experts code, with our weights in its parameters.

    For 0 < top_n < K each layer holds the experts twice, plain and compensated, and a token's
    Top-n indices are moved to the second set. `scaled` multiplies one expert's weights by 1.01.
    """
    reference_model = AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.float32, experts_implementation="eager"
    ).eval()
    for layer, (_, module) in experts_modules(reference_model).items():
        keys = [ExpertKey(layer, expert) for expert in range(EXPERTS)]
        plain = [_expert(segment, key, restored=False, scaled=key == scaled) for key in keys]
        restored = [_expert(segment, key, restored=True, scaled=False) for key in keys]
        if top_n in (0, TOP_K):
            _replace(module, restored if top_n else plain)
        else:
            _replace(module, plain + restored)
            _route_top_n_to_second_set(module, top_n)
    return reference_model(input_ids=ids_BT).logits


def _expert(segment: Segment, key: ExpertKey, *, restored: bool, scaled: bool) -> _Expert:
    manifest = segment.manifest
    info, shape = manifest.experts[key], manifest.model.expert
    (data,) = segment.fetch([RecordRequest(key, "codes")])
    mlp = parse_codes(key, data, shape, info.form).mlp
    matrices = {name: reference.dequantize(getattr(mlp, name)) for name in ("gate", "up", "down")}
    if restored and info.factors is not None:
        (data,) = segment.fetch([RecordRequest(key, "factors")])
        factors = parse_factors(key, data, shape, info.repair).factors
        for name in matrices:
            left, right = reference.dequantize_low_rank(getattr(factors, name))
            matrices[name] = matrices[name] + left @ right
    factor = CONTROL_FACTOR if scaled else 1.0
    gate, up, down = (matrices[name] * factor for name in ("gate", "up", "down"))
    return _Expert(gate, up, down, (mlp.gate_bias, mlp.up_bias, mlp.down_bias))


def _replace(module: Any, experts: list[_Expert]) -> None:
    """Put canonical experts into a transformers experts module, in its own layout."""

    def joined(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        if module.is_concatenated:
            return torch.cat([gate, up])
        return torch.stack([gate, up], dim=1).flatten(0, 1)  # gate 0, up 0, gate 1, up 1, ...

    parameters = {
        "gate_up_proj": torch.stack([joined(e.gate_FH, e.up_FH) for e in experts]),
        "down_proj": torch.stack([e.down_HF for e in experts]),
    }
    if module.is_transposed:
        parameters = {name: value.transpose(1, 2) for name, value in parameters.items()}
    if module.has_bias:
        gate_ups = [joined(e.biases[0], e.biases[1]) for e in experts]  # type: ignore[arg-type]
        parameters["gate_up_proj_bias"] = torch.stack(gate_ups)
        parameters["down_proj_bias"] = torch.stack([e.biases[2] for e in experts])  # type: ignore[misc]
    for name, value in parameters.items():
        old = getattr(module, name)
        assert value.shape[1:] == old.shape[1:], f"{name}: {value.shape} for {old.shape}"
        setattr(module, name, torch.nn.Parameter(value.contiguous(), requires_grad=False))
    module.num_experts = len(experts)


def _route_top_n_to_second_set(module: Any, top_n: int) -> None:
    own_forward = module.forward

    def forward(
        hidden_SH: torch.Tensor, ids_SK: torch.Tensor, weights_SK: torch.Tensor
    ) -> torch.Tensor:
        # How many columns beat each column: by size, then by coming first.
        mine_SK1, other_S1K = weights_SK.abs()[:, :, None], weights_SK.abs()[:, None, :]
        comes_first_KK = torch.ones(TOP_K, TOP_K, dtype=torch.bool).tril(-1)
        beaten_SKK = (other_S1K > mine_SK1) | ((other_S1K == mine_SK1) & comes_first_KK)
        restored_SK = beaten_SKK.sum(dim=2) < top_n
        return own_forward(hidden_SH, ids_SK + EXPERTS * restored_SK, weights_SK)

    module.forward = forward


def _difference(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got - expected).abs().max() / expected.abs().max())


def table(rows: list[FamilyDifference]) -> str:
    """The rows as a Markdown table."""
    head = [f"Top-n = {n}" for n in range(TOP_K + 1)]
    lines = [
        f"| family | {' | '.join(head)} | control | effect |",
        "|---" * (len(head) + 3) + "|",
    ]
    for row in rows:
        cells = [f"{value:.1e}" for value in (*row.by_top_n.values(), row.control, row.effect)]
        lines.append(f"| {row.family} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> int:
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for family in FAMILIES:
            rows.append(measure(family, Path(folder)))
            print(f"{family}: worst {rows[-1].worst:.1e}", flush=True)
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(f"""# Logits per family: the store's path against transformers' own model

Largest difference of a logit over the largest logit, float32, CPU, one thread. Tiny random
checkpoint of each family in its on-hub layout (2 layers, {EXPERTS} experts, top-{TOP_K}, 128 wide),
recipe paper: 2-bit codes, average rank 16. The other side is the unmodified transformers model with
its expert weights replaced by the dequantised ones, plus the compensator for the Top-n pairs.
The limit is {TOLERANCE:.0e}. control: one expert of the reference multiplied by {CONTROL_FACTOR};
effect: what restoring all pairs changes. Both show that the comparison can see a wrong expert.

{table(rows)}

Made by `python -m benchmarks.families`: {provenance()} torch {torch.__version__}.
""")
    print(f"wrote {OUT}")
    return 0 if all(row.worst <= TOLERANCE for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
