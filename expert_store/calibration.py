"""A calibration: what the experts of a model really see, collected once, read layer by layer.

Opened from the folder that `moetier calibrate` writes (`expert_store/calibration_file.py`). Knows
no text and no running model.

Legend: H hidden, F ffn, G groups of 64.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path

import torch

from expert_store.calibration_file import (
    CALIBRATION_FILE,
    load_info,
    load_layer,
    save_info,
    save_layer,
)
from expert_store.errors import StoreFormatError
from expert_store.files import Disk
from expert_store.matrix.moments import Moment
from expert_store.statistics import (
    CalibratedModel,
    CalibrationInfo,
    ExpertStatistics,
    LayerTensors,
    MomentForm,
)
from expert_store.types import ExpertKey, ModelInfo

__all__ = ["Calibration", "ExpertStatistics", "is_calibration", "save_calibration"]

INPUT_SHARE, MIDDLE_SHARE = 0.5, 0.25
"""Of n tokens about this share counts as independent ones: neighbours are alike, and middles have
heavy tails. Close to the best shrinkage on mixtral-mini, judged by the moments of other text (300
to 1800 tokens per expert; 6 layers, 3 experts each)."""
SAMPLE_WEIGHT = 64
"""Tokens' worth of the layer's sample in an expert's row weights."""
FEW_TOKENS = 128
"""Below this an expert's statistics lean visibly on its layer's; `moetier calibrate` says so."""
_RIDGE = 1e-4


class Calibration:
    """The calibration in a folder. Thread-safe; holds one layer's tensors at a time.

    Raises StoreFormatError when the folder holds no calibration or a changed one.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self.info, self._checksums, self.id = load_info(self.folder)
        self._lock = threading.Lock()
        self._layer: tuple[int, LayerTensors, Moment] | None = None

    @property
    def layer_sensitivity(self) -> Mapping[int, float]:
        """Nats of KL per unit of relative energy of a layer's MoE output; empty if not known."""
        return {} if self.info.sensitivity is None else self.info.sensitivity.layers

    def check_model(self, model: ModelInfo) -> None:
        """ValueError unless this calibration was taken from that model."""
        found, expected = self.info.model, CalibratedModel.of(model)
        for name in ("name", "model_type", "expert", "top_k", "num_experts"):
            mine, theirs = getattr(found, name), getattr(expected, name)
            if mine != theirs:
                raise ValueError(
                    f"calibration: {self.folder} is of another model: its {name} is {mine}, "
                    f"expected {theirs}; run `moetier calibrate` on this model"
                )

    def expert(self, key: ExpertKey) -> ExpertStatistics:
        """What one expert sees, shrunk to its layer by the tokens it saw.

        KeyError for an unknown expert; CorruptRecordError, StoreFormatError for a damaged file.
        """
        table = self.info.tables[key.layer]
        if not 0 <= key.expert < table.num_experts:
            raise KeyError(str(key))
        tensors, pooled = self._tensors(key.layer)
        expert, tokens = key.expert, table.tokens_E[key.expert]
        use_at_K = table.use_at_EK[expert]
        gate = tensors.gate_weight_EF[expert], tensors.sample_gate_weight_EF[expert]
        up = tensors.up_weight_EF[expert], tensors.sample_up_weight_EF[expert]
        sample = _diagonal(tensors.sample_middle_EF[expert], self.info.forms.middle)
        return ExpertStatistics(
            moment_in=_inputs(Moment(tensors.input_E[expert]), pooled, tokens * INPUT_SHARE),
            moment_mid=Moment(tensors.middle_E[expert]).shrunk(sample, tokens * MIDDLE_SHARE),
            gate_weight_F=_shrunk_rows(*gate, tokens),
            up_weight_F=_shrunk_rows(*up, tokens),
            num_tokens=tokens,
            use=sum(use_at_K),
            use_at_K=use_at_K,
            weight2_at_K=table.weight2_at_EK[expert],
            output_energy=table.expert_energy_E[expert],
        )

    def _tensors(self, layer: int) -> tuple[LayerTensors, Moment]:
        """Compressing goes layer by layer: the last one is kept, for all threads."""
        with self._lock:
            if self._layer is None or self._layer[0] != layer:
                self._layer = None
                info = self.info
                tensors = load_layer(
                    self.folder, layer, info.model, info.forms, self._checksums[layer]
                )
                self._layer = layer, tensors, Moment(tensors.pooled)
            return self._layer[1], self._layer[2]


def is_calibration(folder: Path) -> bool:
    """Whether the folder holds a finished calibration (calibration.json is written last)."""
    return (folder / CALIBRATION_FILE).is_file()


def save_calibration(
    folder: Path,
    info: CalibrationInfo,
    tensors: Mapping[int, LayerTensors],
    disk: Disk | None = None,
) -> Calibration:
    """Write a calibration and open it. Raises StoreWriteError, and ValueError when `tensors` are
    not of the layers of `info`."""
    if tensors.keys() != info.tables.keys():
        raise ValueError(
            f"layers: tables of {sorted(info.tables)}, but tensors of {sorted(tensors)}"
        )
    if is_calibration(folder):
        raise StoreFormatError(f"{folder}: holds a calibration already; choose another folder")
    checksums = {
        layer: save_layer(folder, layer, tensors[layer], info.forms, disk) for layer in tensors
    }
    save_info(folder, info, checksums, disk)
    return Calibration(folder)


def _inputs(own: Moment, pooled: Moment, count: float) -> Moment:
    """An expert's input moment: own and pooled in the same form, or own blocks, pooled full."""
    if own.is_full == pooled.is_full:
        return own.shrunk(pooled, count)
    return recoloured(pooled, own.shrunk(pooled.blocks_only(), count))


def recoloured(pooled: Moment, blocks: Moment) -> Moment:
    """The full `pooled` moment with the diagonal blocks of another one.

    Each group of 64 inputs goes through the linear map that turns the pool's distribution into the
    expert's with the least movement (the optimal transport between Gaussians,
    T = P^(-1/2) (P^(1/2) B P^(1/2))^(1/2) P^(-1/2)); correlations between groups follow. The result
    is positive semi-definite.
    """
    pool_Ggg, own_Ggg = pooled.block_diagonal(), blocks.block_diagonal()
    level_G11 = pool_Ggg.diagonal(dim1=1, dim2=2).mean(dim=1)[:, None, None].clamp(min=1e-30)
    eye = torch.eye(pool_Ggg.shape[-1])
    # Directions that the pool hardly has are left alone: they would be amplified without limit.
    pool_Ggg, own_Ggg = (blocks + _RIDGE * level_G11 * eye for blocks in (pool_Ggg, own_Ggg))
    half, inverse_half = _root(pool_Ggg, 0.5), _root(pool_Ggg, -0.5)
    map_Ggg = inverse_half @ _root(half @ own_Ggg @ half, 0.5) @ inverse_half
    size, width = pooled.cols, pool_Ggg.shape[-1]
    rows = (map_Ggg @ pooled.values.view(-1, width, size)).reshape(size, size)
    both = (map_Ggg @ rows.T.reshape(-1, width, size)).reshape(size, size)
    return Moment((both + both.T) / 2)


def _root(blocks_Ggg: torch.Tensor, power: float) -> torch.Tensor:
    values_Gg, vectors_Ggg = torch.linalg.eigh(blocks_Ggg)
    values_Gg = values_Gg.clamp(min=1e-12 * float(values_Gg.max().clamp(min=1e-30)))
    return (vectors_Ggg * values_Gg.pow(power)[:, None, :]) @ vectors_Ggg.mT


def _diagonal(diagonal_F: torch.Tensor, form: MomentForm) -> Moment:
    if form == "full":
        return Moment(torch.diag(diagonal_F))
    return Moment(torch.diag_embed(diagonal_F.view(-1, 64)))


def _shrunk_rows(own_F: torch.Tensor, sample_F: torch.Tensor, tokens: int) -> torch.Tensor:
    return torch.lerp(own_F, sample_F, SAMPLE_WEIGHT / (SAMPLE_WEIGHT + tokens))
