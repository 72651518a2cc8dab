"""How much memory a memory node needs: a copy of the expert store, /dev/shm, and headroom.

From a store's manifest, or from the published shape of a model and a recipe, as `moetier plan`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from cluster.plan.inputs import Recipe
from cluster.plan.shapes import shape_of
from cluster.plan.system import record_bytes
from expert_store.format import is_store, load_manifest

GIBIBYTE = 2**30
HEADROOM_BYTES = 4 * GIBIBYTE
"""Ray's processes of a node, the actors' interpreters, and the activations of near-data calls."""


@dataclass(frozen=True, slots=True)
class NodeMemory:
    """Bytes of a memory node; `source` says where the store's size is from."""

    source: str
    store_bytes: int
    shm_bytes: int
    headroom_bytes: int = HEADROOM_BYTES

    @property
    def total_bytes(self) -> int:
        return self.store_bytes + self.shm_bytes + self.headroom_bytes

    @property
    def quantity(self) -> str:
        """As Kubernetes writes it, rounded up to whole GiB."""
        return f"{math.ceil(self.total_bytes / GIBIBYTE)}Gi"


def node_memory(model: str, recipe: Recipe, *, shm_bytes: int) -> NodeMemory:
    """What a node needs that holds one whole copy of this model's experts.

    `model` is a store's folder, or what `moetier plan --model` takes; then `recipe` counts. Raises
    ValueError for neither, StoreFormatError for a store that cannot be read.
    """
    if is_store(Path(model)):
        manifest = load_manifest(Path(model))
        records = [part for e in manifest.experts.values() for part in (e.codes, e.factors) if part]
        stored = sum(record.num_bytes for record in records)
        return NodeMemory(f"manifest of {model}", stored, shm_bytes)
    shape = shape_of(model)
    record = record_bytes(shape, recipe)
    count = shape.num_moe_layers * shape.num_experts
    source = f"shape of {shape.name}, {recipe.bits} bits, rank {recipe.rank}"
    return NodeMemory(source, count * (record.codes + record.factors), shm_bytes)
