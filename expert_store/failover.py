"""Which copy of a record to ask next: one fetch over several copies, with retries and a deadline.

Knows no transport: what asks the copies, the clock and the pause are passed in.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from expert_store.errors import (
    CorruptRecordError,
    DirectoryError,
    ExpertUnavailableError,
    StoreError,
)
from expert_store.health import CopyHealth
from expert_store.listing import Listing, is_reachable
from expert_store.types import ExpertKey, RecordRequest


@dataclass(frozen=True, slots=True)
class Copy:
    """One reachable copy of a segment. `keys` None means every expert of the store."""

    address: str
    keys: frozenset[ExpertKey] | None
    is_local: bool  # cheaper to reach than a copy that is not
    holder: str = ""  # who answers there; two addresses of one holder hang together

    def holds(self, key: ExpertKey) -> bool:
        return self.keys is None or key in self.keys


@dataclass(frozen=True, slots=True)
class Batch:
    """Requests, by their number in the fetch, that go to one copy in one call."""

    address: str
    indices: tuple[int, ...]
    num_bytes: int
    is_only_hope: bool  # no request of it has another copy left


class Attempts:
    """The state of one fetch. A record refused by one copy is asked of the next; a copy that does
    not answer is left alone until `forgive()`. A batch refused for one of its records is asked
    again record by record, so that two copies with different damage still serve everything.
    """

    def __init__(
        self,
        requests: Sequence[RecordRequest],
        *,
        sizes: Sequence[int],
        health: CopyHealth,
        max_batch: int,
    ) -> None:
        assert max_batch > 0, max_batch
        self._requests = requests
        self._sizes = sizes  # bytes
        self._health = health
        self._max_batch = max_batch
        self._asked: Counter[int] = Counter()  # requests that are under way, at how many copies
        self._results: list[torch.Tensor | None] = [None] * len(requests)
        self._refused: dict[int, dict[str, StoreError]] = {}
        self._down: set[str] = set()
        self._lost: dict[str, StoreError] = {}
        self._alone: set[int] = set()

    @property
    def results(self) -> list[torch.Tensor] | None:
        """The records in request order once all are there, else None."""
        found = [data for data in self._results if data is not None]
        return found if len(found) == len(self._results) else None

    def plan(self, copies: Sequence[Copy]) -> list[Batch]:
        """Batches for what is missing and not under way; what has no copy left now is left out.

        Raises CorruptRecordError when every copy of a record is damaged.
        """
        missing = [i for i, data in enumerate(self._results) if data is None and not self._asked[i]]
        return self._grouped(missing, copies)

    def plan_besides(self, late: Batch, copies: Sequence[Copy]) -> list[Batch]:
        """Batches for what a late one still owes, to be asked of other holders; empty when one of
        its records has no other."""
        holders = {copy.holder for copy in copies if copy.address == late.address}
        others = [c for c in copies if c.address != late.address and c.holder not in holders]
        owed = [index for index in late.indices if self._results[index] is None]
        if any(self._asked[index] > 1 for index in owed):
            return []
        batches = self._grouped(owed, others)
        return batches if sum(len(batch.indices) for batch in batches) == len(owed) else []

    def is_needed(self, batch: Batch) -> bool:
        """Whether something of a batch is still missing."""
        return any(self._results[index] is None for index in batch.indices)

    def began(self, batch: Batch) -> None:
        self._asked.update(batch.indices)

    def ended(self, batch: Batch) -> None:
        self._asked.subtract(batch.indices)

    def _grouped(self, indices: Sequence[int], copies: Sequence[Copy]) -> list[Batch]:
        groups: dict[tuple[str, int], list[int]] = {}
        shared: set[tuple[str, int]] = set()
        for index in indices:
            request = self._requests[index]
            holders = [copy for copy in copies if copy.holds(request.key)]
            usable = self._usable(index, holders)
            if not usable:
                self._raise_if_damaged(index, holders)
                continue
            # Copies of this host first, unless they are slow; load spreads over them by expert,
            # and by client, or else every client read a hot expert of the same copy.
            good = set(self._health.best([copy.address for copy in usable], self._sizes[index]))
            candidates = [copy for copy in usable if copy.address in good]
            nearest = [copy for copy in candidates if copy.is_local] or candidates
            turn = request.key.layer + request.key.expert + self._health.client
            chosen = nearest[turn % len(nearest)]
            part = -1 - len(groups) if index in self._alone else 0
            while len(groups.get((chosen.address, part), ())) >= self._max_batch:
                part += 1
            groups.setdefault((chosen.address, part), []).append(index)
            if len({copy.holder for copy in usable}) > 1:
                shared.add((chosen.address, part))
        return [
            Batch(
                name[0],
                tuple(found),
                num_bytes=sum(self._sizes[index] for index in found),
                is_only_hope=name not in shared,
            )
            for name, found in groups.items()
        ]

    def answered(self, batch: Batch, records: Sequence[torch.Tensor]) -> None:
        """The copy gave every record of the batch."""
        for index, data in zip(batch.indices, records, strict=True):
            if self._results[index] is None:  # else another copy was quicker
                self._results[index] = data

    def refused(self, batch: Batch, error: StoreError) -> None:
        """The copy is alive but cannot give some record of the batch."""
        if len(batch.indices) > 1:
            self._alone.update(batch.indices)
        else:
            self._refused.setdefault(batch.indices[0], {})[batch.address] = error

    def lost(self, batch: Batch, error: StoreError) -> None:
        """The copy did not answer."""
        self._down.add(batch.address)
        self._lost[batch.address] = error

    def forgive(self) -> None:
        """Ask copies that did not answer again."""
        self._down.clear()

    def failure(self, deadline_s: float) -> ExpertUnavailableError:
        """What to raise when the deadline has come: the first missing record, and why."""
        index = next(i for i, data in enumerate(self._results) if data is None)
        request = self._requests[index]
        reasons = {**self._lost, **self._refused.get(index, {})}
        told = "; ".join(f"{address}: {error}" for address, error in reasons.items())
        return ExpertUnavailableError(
            f"no live copy gave the {request.kind} record of {request.key} within {deadline_s:g} s "
            f"({told or 'no copy is listed'}); check that a store actor holding it runs"
        )

    def _usable(self, index: int, holders: Sequence[Copy]) -> list[Copy]:
        refused = self._refused.get(index, {})
        return [c for c in holders if c.address not in self._down and c.address not in refused]

    def _raise_if_damaged(self, index: int, holders: Sequence[Copy]) -> None:
        refused = self._refused.get(index, {})
        errors = [refused.get(copy.address) for copy in holders]
        damaged = [error for error in errors if isinstance(error, CorruptRecordError)]
        if damaged and len(damaged) == len(errors):
            raise damaged[0]


class ListedCopies:
    """The copies that a directory lists for one store version, asked for anew every `refresh_s`.

    A unix socket is a copy only where its path exists: on the holder's own host.
    """

    def __init__(
        self,
        find: Callable[[], Sequence[Listing]],
        version: str,
        *,
        clock: Callable[[], float],
        refresh_s: float = 5.0,
    ) -> None:
        self._find = find
        self._version = version
        self._clock = clock
        self._refresh_s = refresh_s
        self._refresh_at = clock()
        self._copies: tuple[Copy, ...] = ()

    def __call__(self, refresh: bool) -> Sequence[Copy]:
        """The copies now. Raises ExpertUnavailableError when the directory is lost."""
        if refresh or self._clock() >= self._refresh_at:
            try:
                listings = self._find()
            except DirectoryError as error:
                raise ExpertUnavailableError(f"no copy can be looked up: {error}") from error
            self._copies = tuple(
                Copy(address, listing.keys, address.startswith("unix:"), listing.name)
                for listing in listings
                if listing.role == "records" and listing.version == self._version
                for address in listing.addresses
                if is_reachable(address)
            )
            self._refresh_at = self._clock() + self._refresh_s
        return self._copies


def check_deadline(deadline_s: float) -> None:
    """Raise ValueError unless there is some time for a fetch."""
    if deadline_s <= 0:
        raise ValueError(f"deadline_s: got {deadline_s}, expected a positive number")
