"""What is compared: every way to hold and to fetch the experts, as plain values.

Knows no network and no measurement. Stores are named here and made in `stores.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from gpu_worker.config import NearDataPolicy

StoreName = Literal["original", "static 4", "static 3", "static 2", "paper", "best", "best 2.25"]
QUARTER = 25.0


@dataclass(frozen=True, slots=True)
class Contestant:
    """One way to run the model.

    - key: the letters of issue 4, by which `--only` chooses; its first letter is its row.
    - cache_percent: device memory for experts, of all experts' codes in this very store; with
      `cache_of` of those in that store.
    - top_n: None is what the store says.
    - settings: any other fields of the worker's config.
    """

    key: str
    label: str
    store: StoreName
    cache_percent: float = 0.0
    cache_of: StoreName | None = None
    near_data: NearDataPolicy = "off"
    top_n: int | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    def as_plain(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def quality(self) -> tuple[StoreName, int | None, bool]:
        """What its perplexity depends on: store, Top-n and whether int8 near data has a part.

        A governed one may come down to no compensator at all, and is judged as if it always did.
        """
        top_n = 0 if "target_step_s" in self.settings else self.top_n
        return self.store, top_n, self.near_data != "off"


CONTESTANTS = (
    Contestant("a", "(a) bf16, on demand", "original"),
    Contestant("b", "(b) bf16, a quarter cached", "original", QUARTER),
    Contestant("c4", "(c) static 4-bit", "static 4"),
    Contestant("c3", "(c) static 3-bit", "static 3"),
    Contestant("c2", "(c) static 2-bit", "static 2"),
    Contestant("d", "(d) paper: 2-bit + Top-1", "paper"),
    Contestant("dq", "(d) a quarter cached", "paper", QUARTER),
    Contestant("e", "(e) best at (d)'s bits", "best"),
    Contestant("eq", "(e) a quarter cached", "best", QUARTER),
    Contestant("s", "(e) best 2.25", "best 2.25"),
    Contestant("sq", "(e) best 2.25, a quarter cached", "best 2.25", QUARTER),
    Contestant("sb", "(e) best 2.25, in (b)'s cache", "best 2.25", QUARTER, "original"),
    Contestant("fdl", "(f) d, near data low_bit", "paper", near_data="low_bit"),
    Contestant("fdc", "(f) d, near data cost", "paper", near_data="cost"),
    Contestant("fel", "(f) e cached, near data low_bit", "best", QUARTER, near_data="low_bit"),
    Contestant("fec", "(f) e cached, near data cost", "best", QUARTER, near_data="cost"),
    Contestant("fsc", "(f) best 2.25 cached, cost", "best 2.25", QUARTER, near_data="cost"),
    Contestant(
        "g",
        "(g) e cached, cost, governed to 20 ms",
        "best",
        QUARTER,
        near_data="cost",
        settings={"target_step_s": 0.02},
    ),
    Contestant("fe0", "(f) e, Top-0, near data low_bit", "best", near_data="low_bit", top_n=0),
    Contestant("fs0", "(f) best 2.25, Top-0, low_bit", "best 2.25", near_data="low_bit", top_n=0),
)

RESIDENT = (
    Contestant("ra", "moetier, bf16, all resident", "original", 200.0),
    Contestant("rs", "moetier, best 2.25, all resident", "best 2.25", 200.0),
)
"""Our engine without a link, to be held against what a user would run on one machine."""


def chosen(prefixes: Sequence[str]) -> list[Contestant]:
    """Those whose keys begin so, all without any. Raises ValueError for a prefix that is none."""
    keys = [item.key for item in CONTESTANTS]
    for prefix in prefixes:
        if not any(key.startswith(prefix) for key in keys):
            raise ValueError(f"--only: got {prefix!r}, expected beginnings of {', '.join(keys)}")
    return [item for item in CONTESTANTS if not prefixes or item.key.startswith(tuple(prefixes))]
