"""Goal: a wrong recipe is refused at once, by field and value. Method: a table."""

from __future__ import annotations

from typing import Any

import pytest

from expert_store.config import CompressionConfig


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"recipe": "best"}, "recipe: got 'best', expected one of paper, static, original"),
        ({"bits": 1}, r"bits: got 1, expected one of \(2, 3, 4\)"),
        ({"bits": 5}, r"bits: got 5, expected one of \(2, 3, 4\)"),
        ({"bits": 8}, r"bits: got 8"),
        ({"bits": 16}, r"bits: got 16, expected one of \(2, 3, 4\) for recipe 'paper'"),
        ({"bits": 0}, "bits: got 0"),
        ({"bits": -2}, "bits: got -2"),
        ({"recipe": "original", "bits": 2}, r"bits: got 2, expected one of \(16,\)"),
        ({"group_size": 48}, "group_size: got 48, expected 64.*do not divide"),
        ({"group_size": 0}, "group_size: got 0"),
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
    assert (found.group_size, found.factor_bits) == (64, 3)
    assert found.rank_ladder == (0, 16, 32, 128, 256, 512, 1024)


def test_fingerprint_is_of_what_it_resolves_to() -> None:
    default = CompressionConfig().fingerprint("source")
    assert default == CompressionConfig(bits=2, avg_rank=16, top_n=1).fingerprint("source")
    others = [
        CompressionConfig(bits=3).fingerprint("source"),
        CompressionConfig(recipe="static").fingerprint("source"),
        CompressionConfig(top_n=2).fingerprint("source"),
        CompressionConfig().fingerprint("another source"),
    ]
    assert len({default, *others}) == 5
