"""Tier actors as nouns: who starts and asks them, one that answers, one that is lost.

Knows no Ray.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from cluster.placement import Node, Placed
from cluster.snapshot import Role
from expert_store.errors import StoreError
from expert_store.holder import HolderStatus


class TierStartError(StoreError):
    """A tier actor did not come up; the message names it, its node and the cause."""


class TierLost(Exception):
    """An actor did not answer. `is_final` says that it never will again."""

    def __init__(self, message: str, *, is_final: bool) -> None:
        super().__init__(message)
        self.is_final = is_final


@dataclass(frozen=True, slots=True)
class Found:
    """A living actor that a tier manager before this one started: of which need, its handle, and
    what it says of itself.
    """

    name: str
    handle: Any
    status: HolderStatus


class Launcher(Protocol):
    """Whoever can start actors. `start` returns a handle that only the launcher reads."""

    async def nodes(self) -> Sequence[Node]: ...

    async def find(self) -> Sequence[Found]:
        """Those that were started for the same store with the same settings, and answer."""
        ...

    async def start(self, placed: Placed) -> Any: ...

    async def ask(self, handle: Any) -> HolderStatus:
        """How the actor is. Raises TierLost; may wait for one that is starting."""
        ...

    async def stop(self, handle: Any) -> None: ...


@dataclass(frozen=True, slots=True)
class Running:
    """An actor that answers: its handle, and what it last said of itself."""

    role: Role
    handle: Any
    status: HolderStatus
