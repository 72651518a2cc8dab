"""What computing experts on the device needs, the same for every layer."""

from __future__ import annotations

from dataclasses import dataclass

from gpu_worker.expert_cache import ExpertCache
from gpu_worker.expert_math import ExpertMath
from gpu_worker.late_factors import LateFactors
from gpu_worker.streamer import Streamer


@dataclass(frozen=True, slots=True)
class DeviceExperts:
    """The cache, who fills it, who computes, and the factors that did not come in time."""

    cache: ExpertCache
    streamer: Streamer
    math: ExpertMath
    late: LateFactors
