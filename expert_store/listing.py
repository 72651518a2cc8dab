"""Who holds what, as a noun: one running holder of a segment and how to reach it.

Knows no directory and no transport.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from expert_store.types import ExpertKey

Role = Literal["records", "near_data"]
"""records: hands out bytes. near_data: runs experts where their bytes are."""


@dataclass(frozen=True, slots=True)
class HolderLoad:
    """What a holder has done since its process began: bytes of records that it gave away, and
    seconds that it ran experts for callers.
    """

    served_bytes: int = 0
    busy_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Listing:
    """One holder of a segment. Two copies of a segment are two listings.

    Addresses are gRPC targets, best first: "unix:/path" for callers of the same host, "host:port"
    for all. `keys` are the experts held, None for every expert of the store.
    """

    name: str  # unique among the holders, for instance the actor's id
    role: Role
    version: str  # of the store, from its manifest
    node_id: str
    addresses: tuple[str, ...]
    keys: frozenset[ExpertKey] | None = None

    def __post_init__(self) -> None:
        if self.role not in get_args(Role):
            raise ValueError(f"role: got {self.role!r}, expected one of {get_args(Role)}")
        if not self.name or not self.addresses:
            raise ValueError(
                f"listing: name {self.name!r} and addresses {self.addresses} must not be empty"
            )

    def holds(self, key: ExpertKey) -> bool:
        return self.keys is None or key in self.keys

    def to_json(self) -> str:
        """One line of JSON; keys as pairs of layer and expert."""
        keys = None if self.keys is None else [[k.layer, k.expert] for k in sorted(self.keys)]
        return json.dumps(
            {
                "name": self.name,
                "role": self.role,
                "version": self.version,
                "node_id": self.node_id,
                "addresses": list(self.addresses),
                "keys": keys,
            }
        )

    @classmethod
    def from_json(cls, text: str | bytes) -> Listing:
        """The listing in `to_json`'s text. Raises ValueError for anything else."""
        try:
            fields = json.loads(text)
            keys = fields.pop("keys")
            return cls(
                name=fields["name"],
                role=fields["role"],
                version=fields["version"],
                node_id=fields["node_id"],
                addresses=tuple(str(address) for address in fields["addresses"]),
                keys=None
                if keys is None
                else frozenset(ExpertKey(int(a), int(b)) for a, b in keys),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"listing: {error!r} in {str(text)[:200]}") from error


def is_reachable(address: str) -> bool:
    """False for a unix socket of another host: its path does not exist here."""
    return not address.startswith("unix:") or Path(address.removeprefix("unix:")).exists()
