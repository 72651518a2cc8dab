"""How much disk a store will need, asked before hours of work. Knows no weight."""

from __future__ import annotations

from pathlib import Path

from expert_store.checkpoint import Checkpoint
from expert_store.config import CompressionConfig
from expert_store.errors import StoreWriteError
from expert_store.factor_records import factors_bytes
from expert_store.files import Disk
from expert_store.records import codes_bytes
from expert_store.types import PROJECTIONS, CodesForm, ModelInfo, RepairForm

CODEC_BITS = 4.0
"""Bits per weight to expect of an error-bounded codec, before it is done."""
_MARGIN_BYTES = 1 << 20  # headers, configuration, info files of the staging folder


def check_space(
    checkpoint: Checkpoint, config: CompressionConfig, store: Path, staged: Path, disk: Disk
) -> None:
    """Refuse at the door what cannot fit: the store, and one layer twice while it is joined."""
    info = checkpoint.model_info
    num_experts = sum(info.num_experts.values())
    experts = _experts_bytes(config, info)
    layer = -(-experts * max(info.num_experts.values()) // num_experts)
    dense = sum(stored.entry.num_bytes for stored in checkpoint.dense.values())
    done = sum(path.stat().st_size for path in staged.rglob("*") if path.is_file())
    needed = experts + layer + dense + _MARGIN_BYTES - done
    folder = next(path for path in (store, *store.absolute().parents) if path.is_dir())
    if (free := disk.free_bytes(folder)) < needed:
        raise StoreWriteError(
            f"{store}: too little disk: compressing needs {needed} more bytes, {free} are free in "
            f"{folder}; free some space or choose another disk"
        )


def _experts_bytes(config: CompressionConfig, info: ModelInfo) -> int:
    """All records: exact where the recipe fixes the width, else what is known before planning."""
    num_experts = sum(info.num_experts.values())
    recipe, how = config.as_recipe(), config.how
    if recipe.budget is not None or how.codec != "tiles":
        bits = recipe.budget if recipe.budget is not None else CODEC_BITS
        return int(num_experts * 3 * info.expert.hidden * info.expert.ffn * bits / 8)
    blocks = recipe.avg_rank * num_experts // 16 * len(PROJECTIONS)
    one = RepairForm.of_letters(recipe.factor_bits, recipe.factor_grid, "g")
    block = factors_bytes(info.expert, one)  # the same for all three
    codes = codes_bytes(
        info.expert, CodesForm.uniform(int(recipe.bits), recipe.grid, recipe.group_size)
    )
    return num_experts * codes + blocks * block
