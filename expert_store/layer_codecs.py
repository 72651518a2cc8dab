"""Which layers an error-bounded codec stores: parsed from text such as "0-3:cuszp:row:0.2".

Pure. Knows no model; `expert_store/planning.py` holds it to one.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import get_args

from expert_store.codecs.bound import ErrorBound
from expert_store.types import Codec

MAX_LAYER = 4095
_TEXT = re.compile(r"(\d{1,4})(?:-(\d{1,4}))?:(\w+):(.+)")


@dataclass(frozen=True, slots=True)
class LayerCodec:
    """A codec and its bound for some decoder layers. Raises ValueError for what makes no sense."""

    layers: tuple[int, ...]
    codec: Codec
    bound: str  # as ErrorBound reads it

    def __post_init__(self) -> None:
        if self.codec not in get_args(Codec) or self.codec == "tiles":
            raise ValueError(f"layer codec: got {self.codec!r}, expected sz3 or cuszp")
        if not self.layers or min(self.layers) < 0 or max(self.layers) > MAX_LAYER:
            raise ValueError(f"layer codec: got layers {self.layers}, expected 0 to {MAX_LAYER}")
        ErrorBound.parse(self.bound)

    @classmethod
    def parse(cls, text: str) -> LayerCodec:
        """From FIRST-LAST:CODEC:MODE:VALUE or LAYER:CODEC:MODE:VALUE."""
        if (found := _TEXT.fullmatch(text)) is None:
            raise ValueError(
                f"layer codec: got {text!r}, expected LAYERS:CODEC:MODE:VALUE, for example "
                "0-3:cuszp:row:0.2"
            )
        first = int(found[1])
        last = int(found[2]) if found[2] else first
        if last < first or last > MAX_LAYER:
            raise ValueError(f"layer codec: got layers {first} to {last} in {text!r}")
        codec = next((name for name in get_args(Codec) if name == found[3]), None)
        if codec is None:
            raise ValueError(f"layer codec: got codec {found[3]!r}, expected sz3 or cuszp")
        return cls(tuple(range(first, last + 1)), codec, found[4])
