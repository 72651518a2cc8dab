"""What can go wrong with a store, as types. The caller's own mistakes are ValueErrors, not these.

Every message says what, where (store, layer, expert), expected, got, and what to do next.
"""

from __future__ import annotations

from typing import TypeVar

Kind = TypeVar("Kind", bound=BaseException)


class StoreError(Exception):
    """The world's fault: a store that cannot be read, reached or trusted."""


class StoreFormatError(StoreError):
    """The store's files do not follow the format: missing, malformed, or of a newer version."""


class CorruptRecordError(StoreError):
    """The bytes of a record, or of a dense or side file, do not match their checksum."""


class ExpertUnavailableError(StoreError):
    """No live copy of a record could be read before the deadline."""


class CheckpointError(StoreError):
    """The source checkpoint is unusable: unknown family, missing expert, NaN, unreachable hub."""


class StoreWriteError(StoreError):
    """A store could not be written: the disk is full, or the folder is not ours to write."""


class DirectoryError(StoreError):
    """The directory of who holds what cannot be reached or read."""


def without_frames(error: Kind) -> Kind:
    """The error and all that caused it, without their tracebacks, whose frames keep alive what they
    worked on: for an error that is kept, not raised on.
    """
    link: BaseException | None = error
    while link is not None:
        link.__traceback__ = None
        link = link.__cause__ or link.__context__
    return error
