"""What one near-data worker is told: how many threads, which kernels, where to listen, its limits.

Knows no store and no cluster; nothing here is read from the environment.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Literal, get_args

from kernels.ops import Backend


@dataclass(frozen=True, slots=True)
class NdpConfig:
    """Settings of one near-data worker. `resolve()` turns every "auto" into a value.

    Raises ValueError naming the field, the value and what is allowed.
    """

    num_threads: int | Literal["auto"] = "auto"  # "auto": the cores this process may use
    pin_threads: bool = False  # each compute thread stays on one core; only where none are shared
    backend: Backend = "cpu_int8"
    tcp_address: str | None = None  # host:port; None is a free port on the node's own address
    ports: str | None = None  # "first-last" to take that port from; None is any free one
    max_connections: int = 32  # streams served at once, one thread each
    max_message_bytes: int = 64 * 2**20  # one call or one answer

    def __post_init__(self) -> None:
        if self.num_threads != "auto" and self.num_threads < 1:
            raise ValueError(f'num_threads: got {self.num_threads}, expected "auto" or at least 1')
        if self.backend not in get_args(Backend):
            raise ValueError(f"backend: got {self.backend!r}, expected one of {get_args(Backend)}")
        for name in ("max_connections", "max_message_bytes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected at least 1")

    def resolve(self) -> NdpConfig:
        """The same settings with the number of threads known."""
        if self.num_threads == "auto":
            return replace(self, num_threads=len(os.sched_getaffinity(0)))
        return self
