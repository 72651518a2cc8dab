"""Keys and values of all sequences, one slot each, behind transformers' Cache interface.

A step says which slots it runs and at which positions; each layer then writes there and reads its
slots back. Layers are allocated when first written, with whatever widths they use (MLA's differ),
and grow with the longest sequence so far.
Sliding-window layers keep all positions and are masked. Knows no request and no scheduling.

Legend: S slots, B sequences of a step, T tokens of each, C context, L positions read, N heads,
D width.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PretrainedConfig
from transformers.cache_utils import Cache

FULL, SLIDING = "full_attention", "sliding_attention"
MIN_POSITIONS = 256
"""A slot's first allocation, where the context is not shorter."""


class SlotCache(Cache):
    """Keys and values [S, N, up to C, D] per layer, on the device and in the dtype they come in."""

    def __init__(self, num_slots: int, max_positions: int) -> None:
        super().__init__(layers=[])
        if num_slots < 1 or max_positions < 1:
            raise ValueError(
                f"slots, positions: got {num_slots}, {max_positions}, expected at least 1 of each"
            )
        self.num_slots = num_slots
        self.max_positions = max_positions
        self._layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._rows_B = torch.zeros(0, dtype=torch.long)
        self._positions_BT = torch.zeros(0, 0, dtype=torch.long)
        self._view: slice | None = None
        self._span = 0
        self._used = [0] * num_slots  # positions written since the slot was last released

    def begin(self, rows: list[int], positions_BT: torch.Tensor) -> None:
        """Set the slots of the coming forward and the positions they write; reads are up to those.

        `positions_BT` rises along T and is on the model's device. Raises ValueError when a position
        is past the context.
        """
        span = int(positions_BT.max()) + 1
        if span > self.max_positions:
            raise ValueError(f"position {span - 1}: the slots hold {self.max_positions} positions")
        assert set(rows) <= set(range(self.num_slots)), rows
        assert len(set(rows)) == len(rows), rows
        self._rows_B = torch.tensor(rows, device=positions_BT.device)
        self._positions_BT, self._span = positions_BT, span
        contiguous = rows == list(range(rows[0], rows[0] + len(rows)))
        self._view = slice(rows[0], rows[0] + len(rows)) if contiguous else None
        for row, last in zip(rows, positions_BT[:, -1].tolist(), strict=True):
            self._used[row] = max(self._used[row], last + 1)

    def update(
        self,
        key_states: torch.Tensor,  # [B, N, T, D]
        value_states: torch.Tensor,  # [B, N, T, D]
        layer_idx: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the step's keys and values, return those of its slots, [B, N, L, D] each."""
        keys, values = self._layers.get(layer_idx, (None, None))
        keys, values = self._grown(keys, key_states), self._grown(values, value_states)
        self._layers[layer_idx] = keys, values
        rows_BT = self._rows_B[:, None].expand_as(self._positions_BT)
        keys[rows_BT, :, self._positions_BT] = key_states.transpose(1, 2)
        values[rows_BT, :, self._positions_BT] = value_states.transpose(1, 2)
        rows = self._rows_B if self._view is None else self._view  # a slice does not copy
        return keys[rows, :, : self._span], values[rows, :, : self._span]

    def _grown(self, slots: torch.Tensor | None, states: torch.Tensor) -> torch.Tensor:
        """`slots` with room for this step: as it is, or copied into twice the room."""
        held = 0 if slots is None else slots.shape[2]
        if slots is not None and held >= self._span:
            return slots
        room = min(self.max_positions, max(self._span, 2 * held, MIN_POSITIONS))
        # Zeros, not empty: a masked position enters attention as 0 * value, and 0 * NaN is NaN.
        grown = states.new_zeros(self.num_slots, states.shape[1], room, states.shape[3])
        if slots is not None:
            grown[:, :, :held] = slots
        return grown

    def release(self, slot: int) -> None:
        """Forget a slot: what was written there is zeroed in every layer; nobody can read it."""
        used, self._used[slot] = self._used[slot], 0
        with torch.inference_mode():  # as they were made
            for keys, values in self._layers.values():
                keys[slot, :, :used] = 0
                values[slot, :, :used] = 0

    @property
    def num_bytes(self) -> int:
        """Bytes allocated so far."""
        return sum(t.numel() * t.element_size() for pair in self._layers.values() for t in pair)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0  # positions are given explicitly

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self._span, 0


class AttentionMasks:
    """Makes a model's attention masks from the positions of a step.

    Raises ValueError for attention that slots of keys and values cannot serve (linear, chunked) and
    for attention implementations that take no explicit mask.
    """

    def __init__(self, config: PretrainedConfig) -> None:
        implementation = config._attn_implementation
        if implementation not in ("eager", "sdpa"):
            raise ValueError(
                f"attention: got {implementation!r}, expected 'eager' or 'sdpa', which take a mask"
            )
        self._additive = implementation == "eager"
        self._window = getattr(config, "sliding_window", None) or None
        kinds = getattr(config, "layer_types", None) or [SLIDING if self._window else FULL]
        self._kinds = sorted(set(kinds))
        unknown = [kind for kind in self._kinds if kind not in (FULL, SLIDING)]
        if unknown or (SLIDING in self._kinds and self._window is None):
            raise ValueError(
                f"layer_types: model type {config.model_type!r} has {self._kinds} with "
                f"sliding_window {self._window}; supported are {FULL!r}, and {SLIDING!r} with one"
            )

    def make(
        self, positions_BT: torch.Tensor, dtype: torch.dtype
    ) -> torch.Tensor | dict[str, torch.Tensor]:
        """[B, 1, T, L] mask: true (or 0 where masks are added) where a token may look.

        One mask per kind of layer when the model mixes kinds, as transformers' mixed models take.
        """
        keys_L = torch.arange(int(positions_BT.max()) + 1, device=positions_BT.device)
        query_BT1 = positions_BT[:, :, None]
        masks = {FULL: keys_L <= query_BT1}
        if self._window is not None:
            masks[SLIDING] = masks[FULL] & (keys_L > query_BT1 - self._window)
        wanted = {kind: self._form(masks[kind][:, None], dtype) for kind in self._kinds}
        return wanted if len(wanted) > 1 else wanted[self._kinds[0]]

    def _form(self, allowed_B1TL: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        if not self._additive:
            return allowed_B1TL
        lowest = torch.finfo(dtype).min
        return torch.zeros_like(allowed_B1TL, dtype=dtype).masked_fill_(~allowed_B1TL, lowest)
