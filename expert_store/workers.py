"""Threads that compress: one torch thread each, as many as there are cores."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch


@contextmanager
def workers(num_jobs: int) -> Iterator[ThreadPoolExecutor]:
    """Threads of one torch thread each; after an error what has not begun is dropped."""
    before = torch.get_num_threads()
    pool = ThreadPoolExecutor(
        num_jobs, thread_name_prefix="compress", initializer=torch.set_num_threads, initargs=(1,)
    )
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(before)


def usable_cores() -> int:
    """Cores that this process may use; all of the machine's where the system does not say."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
