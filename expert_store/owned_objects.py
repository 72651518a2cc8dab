"""Records of a segment as objects of a store of objects (Ray's), put there once.

Knows no Ray: what puts an object is passed in.
"""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from typing import Any

from expert_store.segment import Segment, locate
from expert_store.types import ExpertKey, RecordRequest


class OwnedObjects:
    """Records put into the object store once each, by whoever makes this: their owner.

    `put` stores an array and gives the reference that keeps it there: `ray.put`.
    """

    def __init__(self, segment: Segment, put: Callable[[Any], Any], *, max_put_bytes: int) -> None:
        if max_put_bytes < 1:
            raise ValueError(f"max_put_bytes: got {max_put_bytes}, expected at least 1")
        self._segment, self._put_object = segment, put
        self._max_put_bytes = max_put_bytes
        self._put: OrderedDict[RecordRequest, Any] = OrderedDict()
        self._put_bytes = 0
        self._stale: deque[ExpertKey] = deque()  # told while the lock may be held
        self._lock = threading.Lock()
        segment.watch(self._stale.append)

    def refs(self, requests: Sequence[RecordRequest]) -> list[Any]:
        with self._lock:
            self._drop_stale()
            return [self._ref(request) for request in requests]

    def _drop_stale(self) -> None:
        """Let go of objects of experts with a record newly quarantined or repaired."""
        stale = {self._stale.popleft() for _ in range(len(self._stale))}
        for request in [each for each in self._put if each.key in stale] if stale else []:
            del self._put[request]
            self._put_bytes -= locate(self._segment.manifest, request).num_bytes

    def _ref(self, request: RecordRequest) -> Any:
        if request in self._put:
            self._put.move_to_end(request)
            return self._put[request]
        (data,) = self._segment.fetch([request])
        self._put[request] = self._put_object(data.numpy())
        self._put_bytes += data.numel()
        while self._put_bytes > self._max_put_bytes and len(self._put) > 1:
            # Who still holds the reference keeps the object; only our own claim goes.
            oldest, _ = self._put.popitem(last=False)
            self._put_bytes -= locate(self._segment.manifest, oldest).num_bytes
        return self._put[request]
