"""A small calibration of random statistics, for tests that need one and no model."""

from __future__ import annotations

from pathlib import Path

import torch

from expert_store.calibration import Calibration, save_calibration
from expert_store.statistics import (
    CalibratedModel,
    CalibrationInfo,
    LayerTable,
    LayerTensors,
    MomentForm,
    MomentForms,
    Sensitivity,
    TextInfo,
)
from expert_store.types import ExpertShape

FULL = MomentForms("full", "full", "full")


def random_moment(
    size: int, form: MomentForm, generator: torch.Generator, tokens: int = 4096
) -> torch.Tensor:
    """Second moment of correlated Gaussian rows."""
    mix = torch.randn(size, size, generator=generator) / size**0.5 + torch.eye(size)
    x_TK = torch.randn(tokens, size, generator=generator) @ mix
    full = x_TK.T @ x_TK / tokens
    if form == "full":
        return full
    return torch.stack([full[i : i + 64, i : i + 64] for i in range(0, size, 64)])


def calibration_parts(
    *,
    layers: tuple[int, ...] = (0, 2),
    experts: int = 3,
    hidden: int = 128,
    ffn: int = 64,
    top_k: int = 2,
    forms: MomentForms = FULL,
    tokens: tuple[int, ...] = (1000, 0, 60),
    has_sensitivity: bool = True,
    seed: int = 0,
) -> tuple[CalibrationInfo, dict[int, LayerTensors]]:
    """What `save_calibration` takes. An expert without tokens has zeros, as in collecting."""
    generator = torch.Generator().manual_seed(seed)
    total = sum(tokens)
    seen = torch.tensor([count > 0 for count in tokens])

    def rows() -> torch.Tensor:
        return torch.rand(experts, ffn, generator=generator) + 0.5

    def moments(size: int, form: MomentForm) -> torch.Tensor:
        made = torch.stack([random_moment(size, form, generator) for _ in range(experts)])
        return made * seen.view(-1, *(1,) * (made.dim() - 1))

    tensors, tables = {}, {}
    for layer in layers:
        tensors[layer] = LayerTensors(
            pooled=random_moment(hidden, forms.pooled, generator),
            input_E=moments(hidden, forms.input),
            middle_E=moments(ffn, forms.middle),
            gate_weight_EF=rows() * seen[:, None],
            up_weight_EF=rows() * seen[:, None],
            sample_middle_EF=rows(),
            sample_gate_weight_EF=rows(),
            sample_up_weight_EF=rows(),
        )
        tables[layer] = LayerTable(
            num_tokens=total,
            tokens_E=tokens,
            use_at_EK=tuple((count / total, 0.0) for count in tokens),
            weight2_at_EK=tuple((0.5 if count else 0.0, 0.0) for count in tokens),
            expert_energy_E=tuple(float(count > 0) for count in tokens),
            skew_K=(0.75, 0.25),
            output_energy=2.5,
        )
    sensitivity = Sensitivity(512, {layer: 0.1 * (layer + 1) for layer in layers})
    info = CalibrationInfo(
        model=CalibratedModel(
            "by hand",
            "mixtral",
            top_k,
            ExpertShape(hidden=hidden, ffn=ffn, activation="silu", has_bias=False),
            dict.fromkeys(layers, experts),
        ),
        texts=(TextInfo("text", total, "0" * 64),),
        asked_tokens=total,
        num_tokens=total,
        window_tokens=64,
        seed=seed,
        forms=forms,
        alike=False,
        tables=tables,
        sensitivity=sensitivity if has_sensitivity else None,
    )
    return info, tensors


def build_calibration(folder: Path, **options: object) -> Calibration:
    """The same, written."""
    info, tensors = calibration_parts(**options)  # type: ignore[arg-type]
    return save_calibration(folder, info, tensors)
