"""Recipe and model of a manifest <-> JSON, field by field, with limits.

The rules are stated in `expert_store/format.py`.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, get_args

from expert_store.forms import CODECS, GRIDS
from expert_store.json_fields import Fields
from expert_store.types import ExpertShape, ModelInfo, Recipe
from kernels.types import GRID_BITS, GROUP_SIZE, GROUP_STEP, MAX_GROUP_SIZE, Activation

MAX_LAYERS = 4096
MAX_EXPERTS_PER_LAYER = 65_536
MAX_SIZE = 1 << 20
MAX_BITS = 32.0
_ID = r"[!-~]{1,200}"  # printable ASCII, no spaces


def recipe_json(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain values; numbers that need not be whole are written as such."""
    values = asdict(recipe) | {
        "bits": float(recipe.bits),
        "rank_ladder": list(recipe.rank_ladder),
        "budget": None if recipe.budget is None else float(recipe.budget),
    }
    del values["group_size"]
    return values | group_size_json(recipe.group_size)


def group_size_json(group_size: int) -> dict[str, int]:
    """A field that is there where the group size is not 64: stores of 64 stay as they were."""
    return {} if group_size == GROUP_SIZE else {"group_size": group_size}


def read_group_size(fields: Fields) -> int:
    """The group size in these fields, 64 where they say nothing. Raises StoreFormatError."""
    if "group_size" not in fields.names():
        return GROUP_SIZE
    group_size = fields.integer("group_size", GROUP_STEP, MAX_GROUP_SIZE)
    if group_size % GROUP_STEP or group_size == GROUP_SIZE:
        allowed = f"a multiple of {GROUP_STEP} other than {GROUP_SIZE}"
        raise fields.bad("group_size", allowed, group_size)
    return group_size


def read_recipe(fields: Fields) -> Recipe:
    """The recipe in these fields. Raises StoreFormatError naming the field."""
    ladder = fields.integers("rank_ladder", 0, MAX_SIZE)
    codec = fields.choice("codec", CODECS)
    factor_grid = fields.choice("factor_grid", GRIDS)
    bits = fields.number("bits", 0.0, MAX_BITS)
    recipe = Recipe(
        name=fields.string("name", r"[a-z0-9_-]{1,64}"),
        codec=codec,
        bits=bits,
        grid=fields.choice("grid", GRIDS),
        factor_bits=fields.choice("factor_bits", GRID_BITS[factor_grid]),
        factor_grid=factor_grid,
        avg_rank=fields.integer("avg_rank", 0, MAX_SIZE),
        rank_ladder=tuple(ladder),
        top_n=fields.integer("top_n", 0, MAX_EXPERTS_PER_LAYER),
        seed=fields.integer("seed", 0, 1 << 62),
        budget=None if fields.is_null("budget") else fields.number("budget", 0.0, MAX_BITS),
        calibration=None if fields.is_null("calibration") else fields.string("calibration", _ID),
        error_bound=None if fields.is_null("error_bound") else fields.string("error_bound", _ID),
        group_size=read_group_size(fields),
    )
    fields.close()
    return recipe


def model_json(model: ModelInfo) -> dict[str, Any]:
    """The model as plain values; layer numbers become text."""
    return {
        "name": model.name,
        "model_type": model.model_type,
        "num_layers": model.num_layers,
        "top_k": model.top_k,
        "vocab_size": model.vocab_size,
        "max_positions": model.max_positions,
        "expert": asdict(model.expert),
        "moe_layers": {str(layer): path for layer, path in model.moe_layers.items()},
        "num_experts": {str(layer): n for layer, n in model.num_experts.items()},
    }


def read_model(fields: Fields) -> ModelInfo:
    """The model in these fields. Raises StoreFormatError naming the field."""
    shape = fields.fields("expert")
    expert = ExpertShape(
        hidden=shape.integer("hidden", 1, MAX_SIZE),
        ffn=shape.integer("ffn", 1, MAX_SIZE),
        activation=shape.choice("activation", get_args(Activation)),
        has_bias=shape.boolean("has_bias"),
    )
    shape.close()
    num_layers = fields.integer("num_layers", 1, MAX_LAYERS)
    paths, counts = fields.fields("moe_layers"), fields.fields("num_experts")
    if sorted(paths.names()) != sorted(counts.names()):
        raise fields.bad("num_experts", "the same layers as moe_layers", counts.names())
    layers = {}
    for name in paths.names():
        if not name.isdecimal() or str(int(name)) != name or int(name) >= num_layers:
            raise fields.bad("moe_layers", f"layers 0 to {num_layers - 1}", repr(name))
        layers[int(name)] = name
    model = ModelInfo(
        name=fields.string("name"),
        model_type=fields.string("model_type", r"[a-z0-9_]{1,64}"),
        num_layers=num_layers,
        top_k=fields.integer("top_k", 1, MAX_EXPERTS_PER_LAYER),
        vocab_size=fields.integer("vocab_size", 1, 1 << 28),
        max_positions=fields.integer("max_positions", 1, 1 << 32),
        expert=expert,
        moe_layers={i: paths.string(name, r"[\w.]+") for i, name in sorted(layers.items())},
        num_experts={
            i: counts.integer(name, 1, MAX_EXPERTS_PER_LAYER) for i, name in sorted(layers.items())
        },
    )
    fields.close()
    return model
