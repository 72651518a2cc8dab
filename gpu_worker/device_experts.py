"""What computing experts on the device needs, the same for every layer."""

from __future__ import annotations

from dataclasses import dataclass

from expert_store.warnings_told import WarningsTold
from gpu_worker.expert_cache import ExpertCache
from gpu_worker.expert_math import ExpertMath
from gpu_worker.late_factors import LateFactors
from gpu_worker.streamer import Streamer


@dataclass(frozen=True, slots=True)
class DeviceExperts:
    """The cache, who fills it, who computes, the factors that did not come in time, and what was
    warned of.
    """

    cache: ExpertCache
    streamer: Streamer
    math: ExpertMath
    late: LateFactors
    told: WarningsTold
