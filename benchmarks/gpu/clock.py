"""Times of device work: CUDA events, contestants in turns, graphs where launches would be timed.

On the CPU (a tiny run) the same code runs with the host's clock, to be exercised, not believed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping
from typing import TypeVar

import torch

Work = Callable[[], object]
Name = TypeVar("Name", bound=Hashable)


def in_turns(
    contestants: Mapping[Name, Work], *, device: str, rounds: int
) -> dict[Name, list[float]]:
    """Seconds of each contestant, round by round, so that a slow moment falls on all alike.

    Two rounds more come first and are not kept; a single round (tiny) needs none.
    """
    warm_up = 0 if rounds == 1 else 2
    times: dict[Name, list[float]] = {name: [] for name in contestants}
    for number in range(warm_up + rounds):
        for name, work in contestants.items():
            seconds = once(work, device)
            if number >= warm_up:
                times[name].append(seconds)
    return times


def once(work: Work, device: str) -> float:
    """Seconds that the device spends from the start of `work` to its end."""
    if device == "cpu":
        start_s = time.perf_counter()
        work()
        return time.perf_counter() - start_s
    begin = torch.cuda.Event(enable_timing=True)
    end = torch.cuda.Event(enable_timing=True)
    begin.record()
    work()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def wall(work: Work, device: str) -> float:
    """Seconds on the host from idle device to idle device: what a caller waits."""
    synchronize(device)
    start_s = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start_s


def host(work: Work, device: str) -> float:
    """Seconds on the host until `work` has given the device all it has to do."""
    synchronize(device)
    start_s = time.perf_counter()
    work()
    seconds = time.perf_counter() - start_s
    synchronize(device)
    return seconds


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def as_graph(work: Work, device: str) -> tuple[Work, str]:
    """`work` as one CUDA graph, so that gaps between launches are not timed; and what it became.

    The first call runs it as it is: kernels compile and memory is taken there.
    """
    work()
    synchronize(device)
    if device == "cpu":
        return work, "calls"
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            work()
    except RuntimeError as error:
        synchronize(device)
        return work, f"calls, because the graph could not be captured: {str(error)[:120]}"

    def replay() -> None:
        # Named so that it lives: the graph holds the addresses of its tensors, not the tensors.
        _ = work
        graph.replay()

    return replay, "graph"
