"""Goal: a wrong recipe is refused at once, by field and value. Method: a table."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from expert_store.config import CompressionConfig
from expert_store.layer_codecs import LayerCodec

FIRST = LayerCodec((0,), "cuszp", "row:0.1")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"recipe": "finest"}, "recipe: got 'finest', expected one of paper, static, mixed"),
        ({"recipe": "best"}, "calibration: recipe 'best' needs the folder that `moetier calibrate"),
        ({"recipe": "sz3", "bits": 2}, "bits: got 2, but recipe 'sz3' has an error bound instead"),
        ({"recipe": "sz3", "error_bound": "row"}, "error bound: got 'row', expected MODE:VALUE"),
        (
            {"recipe": "paper", "error_bound": "row:0.1"},
            "error_bound: got 'row:0.1', but recipe 'paper' is not",
        ),
        (
            {"recipe": "paper", "budget": 3.0},
            "budget: got 3.0, but recipe 'paper' has none; use recipe fast",
        ),
        ({"recipe": "fast", "budget": 0.0}, "budget: got 0.0, expected bits per weight up to 16"),
        ({"recipe": "fast", "budget": math.nan}, "budget: got nan, expected bits per weight"),
        ({"recipe": "fast", "avg_rank": 16}, "avg_rank: got 16, but recipe 'fast' chooses ranks"),
        ({"layer_codecs": (FIRST, FIRST)}, "layer_codecs: layer 0 is given two codecs"),
        ({"bits": 1}, r"bits: got 1, expected one of \(2, 3, 4\)"),
        ({"bits": 5}, r"bits: got 5, expected one of \(2, 3, 4\)"),
        ({"bits": 8}, r"bits: got 8"),
        (
            {"recipe": "paper", "bits": 16},
            r"bits: got 16, expected one of \(2, 3, 4\) for recipe 'paper'",
        ),
        ({"bits": 0}, "bits: got 0"),
        ({"bits": -2}, "bits: got -2"),
        ({"recipe": "original", "bits": 2}, r"bits: got 2, expected one of \(16,\)"),
        ({"group_size": 48}, "group_size: got 48, expected a multiple of 32 up to 4096"),
        ({"group_size": 0}, "group_size: got 0"),
        ({"group_size": 8192}, "group_size: got 8192"),
        ({"recipe": "original", "group_size": 32}, "group_size: got 32, but neither bfloat16"),
        ({"recipe": "cuszp", "group_size": 128}, "group_size: got 128, but neither bfloat16"),
        (
            {"recipe": "best", "calibration": Path("c"), "group_size": 128},
            "group_size: got 128, but error feedback",
        ),
        ({"factor_bits": 8}, "factor_bits: got 8"),
        ({"avg_rank": -1}, "avg_rank: got -1, expected 0 or more"),
        ({"recipe": "static", "avg_rank": 16}, "avg_rank: got 16, but recipe 'static' has no"),
        ({"top_n": -1}, "top_n: got -1, expected 0 to"),
        ({"top_n": 10_000}, "top_n: got 10000"),
        ({"rank_ladder": (0, 24)}, "rank_ladder: got"),
        ({"rank_ladder": (16, 32)}, "rank_ladder: got"),
        ({"rank_ladder": (0, 32, 16)}, "rank_ladder: got"),
        ({"seed": -1}, "seed: got -1"),
    ],
)
def test_wrong_values(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CompressionConfig(**fields)


@pytest.mark.parametrize(
    ("recipe", "bits", "avg_rank", "top_n"),
    [("paper", 2, 16, 1), ("static", 2, 0, 0), ("original", 16, 0, 0)],
)
def test_defaults_of_the_recipes(recipe: str, bits: int, avg_rank: int, top_n: int) -> None:
    found = CompressionConfig(recipe=recipe).as_recipe()
    assert (found.name, found.bits, found.avg_rank, found.top_n) == (recipe, bits, avg_rank, top_n)
    assert found.factor_bits == 3
    assert found.rank_ladder == (0, 16, 32, 128, 256, 512, 1024)


def test_fingerprint_is_of_what_it_resolves_to() -> None:
    default = CompressionConfig(recipe="paper").fingerprint("source")
    told = CompressionConfig(recipe="paper", bits=2, avg_rank=16, top_n=1)
    assert default == told.fingerprint("source")
    others = [
        CompressionConfig(recipe="paper", bits=3).fingerprint("source"),
        CompressionConfig(recipe="static").fingerprint("source"),
        CompressionConfig(recipe="paper", top_n=2).fingerprint("source"),
        CompressionConfig(recipe="paper").fingerprint("another source"),
    ]
    assert len({default, *others}) == 5


@pytest.mark.parametrize(
    ("text", "layers", "codec", "bound"),
    [
        ("0-3:cuszp:row:0.2", (0, 1, 2, 3), "cuszp", "row:0.2"),
        ("7:sz3:absolute:1e-3", (7,), "sz3", "absolute:1e-3"),
    ],
)
def test_layer_codecs_are_parsed(
    text: str, layers: tuple[int, ...], codec: str, bound: str
) -> None:
    assert LayerCodec.parse(text) == LayerCodec(layers, codec, bound)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cuszp", "expected LAYERS:CODEC:MODE:VALUE, for example 0-3:cuszp:row:0.2"),
        ("3-1:cuszp:row:0.1", "got layers 3 to 1"),
        ("0-9999:cuszp:row:0.1", "got layers 0 to 9999"),
        ("0:zip:row:0.1", "got codec 'zip', expected sz3 or cuszp"),
        ("0:tiles:row:0.1", "got 'tiles', expected sz3 or cuszp"),
        ("0:sz3:row:nought", "error bound: got 'row:nought'"),
    ],
)
def test_layer_codecs_that_make_no_sense(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LayerCodec.parse(text)
