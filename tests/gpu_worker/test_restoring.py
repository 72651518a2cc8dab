"""Goal: each rule restores exactly the pairs it promises, whatever columns, batch and rounding do.

Method: properties against naive per-token arithmetic, limits of every threshold, hand-made rows for
ties and signs.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from expert_store.types import Manifest
from gpu_worker.restoring import (
    PairPolicy,
    mass_mask,
    random_mask,
    repaired_errors,
    restore_mask,
    route,
)
from tests.hand_store import build_store

WEIGHT = st.sampled_from([-0.5, -0.25, 0.0, 0.125, 0.25, 0.5, 1.5])


def naive_mask(weights: list[float], top_n: int) -> list[bool]:
    ranked = sorted(range(len(weights)), key=lambda column: (-abs(weights[column]), column))
    return [column in ranked[:top_n] for column in range(len(weights))]


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[list[float]], int]:
    """Weights [T, K] with many ties and some negative ones, and an n from 0 to K."""
    num_columns = draw(st.integers(1, 6))
    row = st.lists(WEIGHT, min_size=num_columns, max_size=num_columns)
    return draw(st.lists(row, min_size=1, max_size=5)), draw(st.integers(0, num_columns))


@settings(max_examples=300, deadline=None)
@given(cases())
def test_top_n_is_the_naive_top_n(case: tuple[list[list[float]], int]) -> None:
    weights, top_n = case
    mask_TK = restore_mask(torch.tensor(weights), top_n)
    assert mask_TK.tolist() == [naive_mask(row, top_n) for row in weights]
    assert mask_TK.sum(dim=1).tolist() == [top_n] * len(weights)


def test_columns_that_are_not_sorted_do_not_matter() -> None:
    """deepseek and glm4_moe give topk(sorted=False): the largest weight may be in any column."""
    mask = restore_mask(torch.tensor([[0.1, 0.2, 0.7]]), 1)
    assert mask.tolist() == [[False, False, True]]


def test_of_equal_weights_the_earlier_column_goes_first() -> None:
    mask = restore_mask(torch.tensor([[0.5, 1.0, 1.0], [1.0, 1.0, 1.0]]), 1)
    assert mask.tolist() == [[False, True, False], [True, False, False]]


def test_a_large_negative_weight_counts_as_large() -> None:
    mask = restore_mask(torch.tensor([[0.4, -0.6]]), 1)
    assert mask.tolist() == [[False, True]]


def test_no_token_rows_give_an_empty_mask() -> None:
    empty = torch.empty(0, 3)
    assert restore_mask(empty, 2).shape == (0, 3)
    assert mass_mask(empty, 0.5).shape == (0, 3)
    assert random_mask(empty.long(), 2, layer=0, seed=0).shape == (0, 3)


@pytest.mark.parametrize("top_n", [-1, 3])
def test_top_n_outside_the_columns_is_refused(top_n: int) -> None:
    message = f"top_n: got {top_n}, expected 0 to .* 2"
    with pytest.raises(ValueError, match=message):
        restore_mask(torch.tensor([[0.5, 0.5]]), top_n)
    with pytest.raises(ValueError, match=message):
        random_mask(torch.tensor([[0, 1]]), top_n, layer=0, seed=0)


@settings(max_examples=300, deadline=None)
@given(cases(), st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.75, 0.99, 1.0]))
def test_mass_is_the_smallest_prefix_that_holds_it(
    case: tuple[list[list[float]], int], mass: float
) -> None:
    weights, _ = case
    mask_TK = mass_mask(torch.tensor(weights), mass)
    for row, flags in zip(weights, mask_TK.tolist(), strict=True):
        total, num_taken = sum(map(abs, row)), sum(flags)
        assert flags == naive_mask(row, num_taken), "a prefix by falling weight"
        held = sum(abs(weight) for weight, flag in zip(row, flags, strict=True) if flag)
        assert held >= mass * total
        if num_taken:
            fewer = held - min(abs(w) for w, flag in zip(row, flags, strict=True) if flag)
            assert fewer < mass * total, "one pair less would hold too little"


def test_mass_zero_restores_none_and_one_all_that_weigh() -> None:
    weights = torch.rand(50, 6, generator=torch.Generator().manual_seed(1)) + 1e-7
    weights[:, -1] = 1e-9  # so small that the others' shares sum to 1
    assert not mass_mask(weights, 0.0).any()
    assert mass_mask(weights, 1.0).all()
    assert mass_mask(torch.zeros(2, 3), 1.0).sum() == 0


def test_random_restores_n_of_each_token_and_all_pairs_equally_often() -> None:
    generator = torch.Generator().manual_seed(3)
    ids = torch.rand(3000, 8, generator=generator).argsort(dim=1)[:, :4]
    tags = torch.arange(3000)
    mask = random_mask(ids, 1, layer=2, seed=7, token_tags_T=tags)
    assert mask.sum(dim=1).eq(1).all()
    # 750 of 3000 expected in each column and 375 for each expert; five standard deviations.
    assert (mask.sum(dim=0) - 750).abs().max() < 5 * math.sqrt(3000 * 0.25 * 0.75)
    assert (torch.bincount(ids[mask], minlength=8) - 375).abs().max() < 5 * math.sqrt(375)
    assert random_mask(ids, 4, layer=2, seed=7, token_tags_T=tags).all()
    assert not random_mask(ids, 0, layer=2, seed=7, token_tags_T=tags).any()


def test_random_depends_on_seed_layer_and_token_and_on_nothing_else() -> None:
    generator = torch.Generator().manual_seed(4)
    ids = torch.rand(400, 8, generator=generator).argsort(dim=1)[:, :4]
    tags = torch.arange(400) * (1 << 32) + 5

    def drawn(rows: torch.Tensor, layer: int = 1, seed: int = 1) -> torch.Tensor:
        return random_mask(ids[rows], 2, layer=layer, seed=seed, token_tags_T=tags[rows])

    everyone = torch.arange(400)
    first = drawn(everyone)
    assert torch.equal(drawn(everyone), first)
    some = torch.tensor([7, 3, 399])
    assert torch.equal(drawn(some), first[some])
    flipped = random_mask(ids.flip(1), 2, layer=1, seed=1, token_tags_T=tags).flip(1)
    assert torch.equal(flipped, first), "the order of columns"
    assert not torch.equal(drawn(everyone, layer=2), first)
    assert not torch.equal(drawn(everyone, seed=2), first)
    same_experts = random_mask(ids[:1].expand(400, 4), 2, layer=1, seed=1, token_tags_T=tags)
    assert len({tuple(row) for row in same_experts.tolist()}) == 6, "all ways to take 2 of 4"


class TestRoute:
    """The rules as `route` applies them, with skipping."""

    ids = torch.tensor([[1, 0, 2], [2, 1, 0]])
    weights = torch.tensor([[0.3, 0.6, 0.1], [0.05, 0.05, 0.9]])

    def masks(self, **policy: object) -> tuple[list[list[bool]], list[list[bool]]]:
        made = route(0, self.ids, self.weights, policy=PairPolicy(**policy))  # type: ignore[arg-type]
        return made.restore_TK.tolist(), made.skip_TK.tolist()

    def test_all_is_top_n_of_k(self) -> None:
        assert self.masks(restore="all") == self.masks(restore="top_n", top_n=3)
        assert self.masks(restore="all") == self.masks(restore="random", top_n=3)

    def test_benefit_compares_share_times_what_the_expert_s_factors_repair(self) -> None:
        repaired = {0: torch.tensor([0.5, 1.0, 0.0], dtype=torch.float64)}
        restored, _ = self.masks(restore="benefit", restore_benefit=0.2, repaired=repaired)
        # Shares times repaired: .3, .3, 0 and 0, .05, .45.
        assert restored == [[True, True, False], [False, False, True]]
        restored, _ = self.masks(restore="benefit", restore_benefit=0.0, repaired=repaired)
        assert restored == [[True, True, False], [False, True, True]], "nothing to repair: not it"

    def test_skipping_is_off_at_zero_and_never_takes_the_first_expert(self) -> None:
        assert self.masks(restore="all", skip_below=0.0)[1] == [[False] * 3] * 2
        restored, skipped = self.masks(restore="all", skip_below=0.2)
        assert skipped == [[False, False, True], [True, True, False]]
        assert restored == [[True, True, False], [False, False, True]], "what is not run"
        assert self.masks(skip_below=1.0)[1] == [[True, False, True], [True, True, False]]

    def test_a_token_without_any_weight_keeps_its_first_expert(self) -> None:
        made = route(0, self.ids, torch.zeros(2, 3), policy=PairPolicy(skip_below=0.5))
        assert made.skip_TK.tolist() == [[False, True, True]] * 2
        assert made.num_skipped == 4

    def test_padding_is_neither_run_nor_counted_as_skipped(self) -> None:
        made = route(
            0,
            self.ids,
            self.weights,
            policy=PairPolicy(skip_below=0.2),
            active_T=torch.tensor([True, False]),
        )
        assert made.num_skipped == 1
        assert made.run_TK.tolist() == [[True, True, False], [False, False, False]]

    def test_router_dtypes_are_taken(self) -> None:
        ids = torch.tensor([[1, 0]], dtype=torch.int32)
        weights = torch.tensor([[0.25, 0.75]], dtype=torch.bfloat16)
        made = route(0, ids, weights, policy=PairPolicy(top_n=1))
        assert made.topk_ids_TK.dtype == torch.int64
        assert made.topk_weights_TK.dtype == torch.float32
        assert made.restore_TK.tolist() == [[False, True]]
        assert made.active_T.tolist() == [True]


def test_repaired_errors_are_the_manifest_s(tmp_path: Path) -> None:
    manifest: Manifest = build_store(tmp_path, layers=(0, 2), experts=3, ffn=64)
    key = next(iter(manifest.experts))
    info = replace(manifest.experts[key], error=0.5, restored_error=0.3)
    manifest = replace(manifest, experts={**manifest.experts, key: info})
    found = repaired_errors(manifest)
    assert found.keys() == {0, 2}
    assert found[key.layer].shape == (3,)
    assert found[key.layer][key.expert] == pytest.approx(0.4)
    without = replace(manifest, experts={key: replace(info, factors=None)})
    assert found.keys() == repaired_errors(without).keys()
    assert all(not errors_E.any() for errors_E in repaired_errors(without).values())
