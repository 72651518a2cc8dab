"""What makes the experts differ: a low-rank addition to each projection, and the routers.

Expert e's weight is base + left_t[e].T @ right[e]. Knows no model, only shapes and a file.

Legend: E experts, R rank, H hidden, F ffn.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

PROJECTIONS = ("gate", "up", "down")


@dataclass(frozen=True, slots=True)
class LayerDeltas:
    """One layer's part. `right` and `left_t` have the keys "gate", "up" and "down"."""

    router: torch.Tensor  # [E, H]
    right: Mapping[str, torch.Tensor]  # [E, R, in]
    left_t: Mapping[str, torch.Tensor]  # [E, R, out]

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor with its name in the file, less the layer's prefix."""
        yield "router", self.router
        for name in PROJECTIONS:
            yield f"{name}.right", self.right[name]
            yield f"{name}.left_t", self.left_t[name]

    def expert_weight(self, base: torch.Tensor, projection: str, expert: int) -> torch.Tensor:
        """`base` [out, in] float32 with one expert's addition.

        Ranks are added one by one: products of bfloat16 are exact in float32, so the result has the
        same bits on every machine, which a matrix product has not.
        """
        weight = base.clone()
        left_t, right = self.left_t[projection][expert], self.right[projection][expert]
        for column, row in zip(left_t.float(), right.float(), strict=True):
            weight += column[:, None] * row
        return weight


def new_layer(router: torch.Tensor, ffn: int, rank: int, seed: int) -> LayerDeltas:
    """A layer that computes what its base does: every `left_t` is zero, `right` is random."""
    num_experts, hidden = router.shape
    generator = torch.Generator().manual_seed(seed)
    sizes = {"gate": (hidden, ffn), "up": (hidden, ffn), "down": (ffn, hidden)}
    right, left_t = {}, {}
    for name, (num_in, num_out) in sizes.items():
        values = torch.randn(num_experts, rank, num_in, generator=generator)
        right[name] = values / num_in**0.5
        left_t[name] = torch.zeros(num_experts, rank, num_out)
    return LayerDeltas(router, right, left_t)


def write_deltas(path: Path, layers: Sequence[LayerDeltas], note: Mapping[str, str]) -> None:
    """Write all layers as bfloat16, with `note` as the file's metadata."""
    tensors = {
        name: value.to(torch.bfloat16).contiguous() for name, value in named_tensors(layers).items()
    }
    save_file(tensors, path, metadata=dict(note))


def read_deltas(path: Path) -> list[LayerDeltas]:
    """The layers of a file, as they are stored. Raises ValueError if names or shapes are wrong."""
    return layers_of(load_file(path), str(path))


def named_tensors(layers: Sequence[LayerDeltas]) -> dict[str, torch.Tensor]:
    """All layers' tensors by name, without gradients."""
    return {
        f"layers.{number}.{name}": value.detach()
        for number, layer in enumerate(layers)
        for name, value in layer.tensors()
    }


def layers_of(tensors: Mapping[str, torch.Tensor], where: str) -> list[LayerDeltas]:
    """The layers of what `named_tensors` gave. Raises ValueError that names `where`."""
    num_layers = sum(name.endswith(".router") for name in tensors)
    try:
        layers = [_layer(tensors, f"layers.{number}.") for number in range(num_layers)]
    except KeyError as error:
        raise ValueError(f"{where}: no tensor {error}; the file is not one of deltas") from error
    if not layers or len(tensors) != num_layers * 7:
        raise ValueError(
            f"{where}: expected 7 tensors in each of one or more layers, got {len(tensors)} "
            f"tensors and {num_layers} routers"
        )
    for number, layer in enumerate(layers):
        _check_shapes(layer, f"{where}: layer {number}")
    return layers


def _layer(tensors: Mapping[str, torch.Tensor], prefix: str) -> LayerDeltas:
    return LayerDeltas(
        tensors[f"{prefix}router"],
        {name: tensors[f"{prefix}{name}.right"] for name in PROJECTIONS},
        {name: tensors[f"{prefix}{name}.left_t"] for name in PROJECTIONS},
    )


def _check_shapes(layer: LayerDeltas, where: str) -> None:
    num_experts, hidden = layer.router.shape
    rank, ffn = layer.left_t["gate"].shape[1:]
    sizes = {"gate": (hidden, ffn), "up": (hidden, ffn), "down": (ffn, hidden)}
    for name, (num_in, num_out) in sizes.items():
        for kind, value, size in (
            ("right", layer.right[name], num_in),
            ("left_t", layer.left_t[name], num_out),
        ):
            if value.shape != (num_experts, rank, size):
                raise ValueError(
                    f"{where}: {name}.{kind}: expected shape {[num_experts, rank, size]}, got "
                    f"{list(value.shape)}"
                )
