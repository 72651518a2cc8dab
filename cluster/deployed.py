"""What is deployed, as the running cluster remembers it: config, by whom, and the store before.

Travels as plain values in the ingress' user_config, which Serve keeps and updates in place.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from cluster.config import ClusterConfig, as_mapping, config_from_mapping

DeployedBy = Literal["moetier", "serve"]
"""moetier: by `moetier serve`, whose deployments have a version each. serve: from a Serve config
file (`serve deploy`, KubeRay), whose deployments share one."""


@dataclass(frozen=True, slots=True)
class Deployed:
    """One deployment of the application. `previous_store` is what a roll back goes to."""

    config: ClusterConfig  # resolved
    by: DeployedBy
    release: str  # of moetier, on the machine that deployed it
    previous_store: str | None = None

    def as_mapping(self) -> dict[str, Any]:
        """Plain values for JSON; `of_mapping` reads them back."""
        return {
            "config": as_mapping(self.config),
            "by": self.by,
            "release": self.release,
            "previous_store": self.previous_store,
        }

    @classmethod
    def of_mapping(cls, data: Mapping[str, Any]) -> Deployed:
        """Raises ValueError for what `as_mapping` did not give."""
        config = config_from_mapping(data.get("config"), source="user_config of Ingress")
        by: Any = data.get("by")
        previous = data.get("previous_store")
        release = str(data.get("release"))
        if by not in get_args(DeployedBy) or not isinstance(previous, str | None):
            raise ValueError(
                f"user_config of Ingress: got by {by!r} and previous_store {previous!r}, expected "
                f"one of {', '.join(get_args(DeployedBy))} and a folder or null"
            )
        return cls(config, by, release, previous)
