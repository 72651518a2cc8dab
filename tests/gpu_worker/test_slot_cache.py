"""Goal: a slot holds exactly what its sequence wrote, and nothing of who had it before.

Method: writes against a plain list, in rows of any order; memory poisoned with NaN before use where
it can be; masks against their definition, for full, sliding and mixed layers.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gpu_worker.slot_cache import AttentionMasks, SlotCache
from tests.tiny_checkpoints import tiny_config


def states(rows: int, tokens: int, width: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, 2, tokens, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("rows", [[0, 1, 2], [1, 2], [3], [2, 0], [0, 3]])
def test_what_was_written_is_read_back(rows: list[int]) -> None:
    cache = SlotCache(4, 8)
    prompts = {row: states(1, 3 + row, 5, row) for row in rows}
    for row in rows:
        cache.begin([row], torch.arange(3 + row)[None])
        keys, values = cache.update(prompts[row], prompts[row][..., :3] * 2, 0)
        torch.testing.assert_close(keys, prompts[row])
        torch.testing.assert_close(values, prompts[row][..., :3] * 2)  # widths may differ
    new = states(len(rows), 1, 5, 99)
    cache.begin(rows, torch.tensor([[3 + row] for row in rows]))
    keys, _ = cache.update(new, new[..., :3], 0)
    assert keys.shape == (len(rows), 2, 4 + max(rows), 5)
    for i, row in enumerate(rows):
        torch.testing.assert_close(keys[i, :, : 3 + row], prompts[row][0])
        torch.testing.assert_close(keys[i, :, 3 + row], new[i, :, 0])


def test_layers_are_allocated_when_first_written() -> None:
    cache = SlotCache(2, 16)
    assert cache.num_bytes == 0
    cache.begin([0], torch.arange(4)[None])
    cache.update(states(1, 4, 24, 0), states(1, 4, 8, 1), 3)
    assert cache.num_bytes == 2 * 2 * 16 * (24 + 8) * 4


def test_slots_grow_with_the_longest_sequence_and_keep_what_they_hold() -> None:
    cache = SlotCache(2, 1000)
    first = states(1, 3, 4, 0)
    cache.begin([1], torch.arange(3)[None])
    cache.update(first, first, 0)
    small = cache.num_bytes
    assert small == 2 * 2 * 256 * (4 + 4) * 4
    longer = states(1, 300, 4, 1)
    cache.begin([0], torch.arange(300)[None])
    keys, _ = cache.update(longer, longer, 0)
    torch.testing.assert_close(keys, longer)
    assert cache.num_bytes == 2 * small
    cache.begin([0, 1], torch.tensor([[300], [3]]))
    keys, _ = cache.update(states(2, 1, 4, 2), states(2, 1, 4, 2), 0)
    torch.testing.assert_close(keys[1, :, :3], first[0])
    torch.testing.assert_close(keys[0, :, :300], longer[0])
    cache.begin([0], torch.tensor([[999]]))
    cache.update(states(1, 1, 4, 3), states(1, 1, 4, 3), 0)
    assert cache.num_bytes == 2 * 2 * 1000 * (4 + 4) * 4, "never more than the context"


def test_released_slots_hold_nothing() -> None:
    cache = SlotCache(2, 8)
    poison = torch.full((1, 2, 6, 4), float("nan"))
    cache.begin([1], torch.arange(6)[None])
    cache.update(poison, poison, 0)
    cache.begin([0], torch.arange(2)[None])
    kept = states(1, 2, 4, 0)
    cache.update(kept, kept, 0)
    cache.release(1)
    keys, values = cache._layers[0]
    assert not keys[1].any()
    assert not values[1].any()
    torch.testing.assert_close(keys[0, :, :2], kept[0])


def test_positions_past_the_context_are_refused() -> None:
    cache = SlotCache(1, 4)
    with pytest.raises(ValueError, match="position 4: the slots hold 4"):
        cache.begin([0], torch.tensor([[4]]))
    with pytest.raises(ValueError, match="expected at least 1"):
        SlotCache(0, 4)


def mask_config(family: str = "mixtral", attention: str = "sdpa", **overrides: Any) -> Any:
    config = tiny_config(family, **overrides)
    config._attn_implementation = attention
    return config


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("window", [None, 3])
def test_masks_by_definition(attention: str, window: int | None) -> None:
    positions = torch.tensor([[4, 5, 6], [0, 1, 2]])
    made = AttentionMasks(mask_config(attention=attention, sliding_window=window)).make(
        positions, torch.float32
    )
    assert isinstance(made, torch.Tensor)
    assert made.shape == (2, 1, 3, 7)
    assert made.dtype == (torch.bool if attention == "sdpa" else torch.float32)
    for b in range(2):
        for t in range(3):
            at = int(positions[b, t])
            looks = [k <= at and (window is None or k > at - window) for k in range(7)]
            got = made[b, 0, t]
            assert (got if attention == "sdpa" else got == 0).tolist() == looks


def test_mixed_layers_get_a_mask_each() -> None:
    made = AttentionMasks(mask_config("gpt_oss", "eager")).make(torch.tensor([[20]]), torch.float32)
    assert isinstance(made, dict)
    assert {kind: int((mask == 0).sum()) for kind, mask in made.items()} == {
        "full_attention": 21,
        "sliding_attention": 16,
    }


def test_attention_that_slots_cannot_serve_is_refused() -> None:
    config = mask_config()
    config.layer_types = ["linear_attention", "full_attention"]
    with pytest.raises(ValueError, match="layer_types.*linear_attention"):
        AttentionMasks(config)
    with pytest.raises(ValueError, match="attention: got 'flash_attention_2'"):
        AttentionMasks(mask_config(attention="flash_attention_2"))
