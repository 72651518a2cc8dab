"""One tier actor that should run: where it is, how it last was, when to try again what failed.

Knows no Ray; what it takes to keep it running is `cluster/keeper.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cluster.backoff import Backoff
from cluster.placement import Need, Node
from cluster.snapshot import Role, TierStatus
from cluster.tier_actors import Running
from expert_store.holder import HolderStatus


@dataclass(slots=True)
class KeptActor:
    """`silent_since` is when it stopped answering, or began to start; `problem` is None while it
    answers; `successor` is that of one that leaves its node.
    """

    need: Need
    retries: Backoff
    node: Node | None = None
    handle: Any = None
    status: HolderStatus | None = None
    problem: str | None = "not started"
    restarts: int = 0
    silent_since: float | None = None
    is_to_move: bool = False  # off a node that it shares
    successor: KeptActor | None = None

    @property
    def role(self) -> Role:
        return "store" if self.need.section == "store" else "ndp"

    @property
    def running(self) -> Running | None:
        """None unless it has answered and was not given up."""
        if self.handle is None or self.status is None:
            return None
        return Running(self.role, self.handle, self.status)

    @property
    def told(self) -> TierStatus:
        """How it was in the last round."""
        return TierStatus(
            name=self.need.name,
            role=self.role,
            node=self.node.address if self.node else "",
            restarts=self.restarts,
            problem=self.problem,
            quarantined=self.status.num_quarantined if self.status else 0,
            repaired=self.status.num_repaired if self.status else 0,
        )
