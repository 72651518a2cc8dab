"""Models by name: bundled, assembled in the cache folder, a folder of the user's, or the Hub's.

Knows where smol-moe lies; how it is put together is models/smol.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from cluster.environment import cache_folder
from expert_store.errors import CheckpointError
from models import smol
from models.smol.recipe import is_assembled

SMOL = smol.NAME


def find_model(name: str) -> Path:
    """The local folder of what a command's MODEL says: "smol-moe", or as `resolve_model`.

    Raises CheckpointError when smol-moe was not assembled yet, and what `resolve_model` raises.
    """
    if name == SMOL:
        if not has_smol():
            raise CheckpointError(
                f"model {SMOL!r}: not in {smol_folder()}, or made from other deltas than the ones "
                f"bundled now; run `make smol` (moetier fetch {SMOL}), which fetches 93 MB and "
                "writes 750 MB"
            )
        return smol_folder()
    # Brings transformers: seconds that the other way need not wait for.
    from expert_store.sources import resolve_model

    return resolve_model(name)


def smol_folder() -> Path:
    """Where smol-moe is assembled."""
    return cache_folder() / "models" / SMOL


def has_smol() -> bool:
    """Whether smol-moe is there, whole, and made from the bundled deltas."""
    return is_assembled(smol_folder())


def ensure_smol(say: Callable[[str], None]) -> Path:
    """smol-moe, fetched and assembled if it is not there. Raises StoreErrors of either step."""
    from models.smol.assemble import make_smol

    return make_smol(cache_folder() / "packages", smol_folder(), say=say)
