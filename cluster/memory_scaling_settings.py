"""What scaling of the memory tier can be told, without torch.

The docstring is the section's documentation in `deploy/cluster.example.yaml`, field by field.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from cluster.autoscaling_decision import Delays
from cluster.autoscaling_memory import MemoryTargets
from cluster.strict import within


@dataclass(frozen=True, slots=True)
class MemoryScalingSettings:
    """How many store actors and near-data workers run, decided from links and waiting.

    Only where every store actor holds the whole store (placement full); a spread store takes every
    node that joins, and gives hot experts more copies by itself.

    - min_replicas, max_replicas: bounds of the number of store actors, each a copy of the store.
      Never more than nodes that carry store.label: a second copy on a node has the same link.
    - min_ndp, max_ndp: bounds of the number of near-data workers, where ndp.enabled.
    - link_bytes_per_s: what a memory node's link can carry; 1.25e9 is 10 Gbit/s.
    - interval_s: seconds over which use is measured, and between two decisions.
    - upscale_delay_s: seconds that more must be needed before they are started.
    - downscale_delay_s: seconds in which fewer must have been enough all the time.
    - request_nodes: ask Ray's autoscaler for as many nodes with the label as copies are wanted, up
      to max_replicas; without it only the nodes that are there are used.
    - targets: when the tier is as busy as it should be.
    """

    min_replicas: int = 1
    max_replicas: int = 4
    min_ndp: int = 1
    max_ndp: int = 4
    link_bytes_per_s: float = 1.25e9
    interval_s: float = 5.0
    upscale_delay_s: float = 15.0
    downscale_delay_s: float = 600.0
    request_nodes: bool = False
    targets: MemoryTargets = field(default_factory=MemoryTargets)

    def __post_init__(self) -> None:
        within("min_replicas", self.min_replicas, 1, 1000)
        within("max_replicas", self.max_replicas, self.min_replicas, 1000)
        within("min_ndp", self.min_ndp, 1, 1000)
        within("max_ndp", self.max_ndp, self.min_ndp, 1000)
        within("link_bytes_per_s", self.link_bytes_per_s, 1.0, 1e13)
        within("interval_s", self.interval_s, 1, 3600)
        within("upscale_delay_s", self.upscale_delay_s, 0, 86400)
        within("downscale_delay_s", self.downscale_delay_s, 0, 86400)

    @property
    def delays(self) -> Delays:
        return Delays(self.upscale_delay_s, self.downscale_delay_s, self.downscale_delay_s)
