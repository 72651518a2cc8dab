"""A step's guesses: when one is made, what is fetched for it, and whether that goes on.

Owns the switch and the prefetcher of one worker; the guess itself is `router_guess.py`. Knows no
plan and no routing policy: who asks tells the copies that a guess would take.

Legend: S token rows, K top-k, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from gpu_worker.config import WorkerConfig
from gpu_worker.counters import Tally
from gpu_worker.expert_math import ExpertMath
from gpu_worker.prefetch import AheadRecords, Prefetcher
from gpu_worker.prefetch_switch import PrefetchSwitch
from gpu_worker.protocols import ExpertSource
from gpu_worker.record_sizes import PlannedCopy, largest_expert_bytes
from gpu_worker.router_guess import Guess, RouterGuess
from gpu_worker.streamer import Streamer


class LookAhead:
    """Does nothing until it is given a guess, and nothing at all where the config is against it."""

    def __init__(
        self,
        source: ExpertSource,
        config: WorkerConfig,
        math: ExpertMath,
        clock: Callable[[], float],
    ) -> None:
        self._prefetcher = _prefetcher(source, config, math, clock)
        self._switch = PrefetchSwitch(config.prefetch)
        self._guess: RouterGuess | None = None
        self._clock = clock
        self.begin(Tally())

    def predict_with(self, guess: RouterGuess | None) -> None:
        """Use these guesses from now on."""
        self._guess = guess if self._prefetcher is not None else None

    def begin(self, tally: Tally) -> None:
        """A step begins; what one that failed half-way has left is dropped."""
        self._num_rows = 0
        self._is_on = False
        self._began_s = self._clock()
        if self._prefetcher is not None:
            self._prefetcher.abandon(tally)

    def settle(self, layer: int, topk_ids_SK: torch.Tensor, tally: Tally) -> AheadRecords:
        """What was fetched ahead for this layer; the first layer decides for its step."""
        if self._guess is None or self._prefetcher is None:
            return AheadRecords(None, tally)
        if not self._num_rows:
            self._num_rows = topk_ids_SK.shape[0]
            self._is_on = self._switch.is_on(self._num_rows)
        return self._prefetcher.settle(layer, topk_ids_SK, tally)

    def start(
        self,
        layer: int,
        hidden_SH: torch.Tensor,
        copies_for: Callable[[Guess], Sequence[PlannedCopy]],
        *,
        is_resident: Callable[[int], bool],
    ) -> None:
        """This layer's copies are here: the link is free for what the next one may need.

        `is_resident` says of a layer that all its records are on the device: no guess is made then.
        """
        if not self._is_on or self._guess is None or self._prefetcher is None:
            return
        following = self._guess.next_layer(layer)
        if following is None or is_resident(following):
            return
        guess = self._guess.guess(layer, hidden_SH)
        if guess is not None:
            self._prefetcher.start(guess, copies_for(guess))

    def finish(self, ahead: AheadRecords) -> None:
        """The layer is done with its records."""
        if self._prefetcher is not None:
            self._prefetcher.finish(ahead)

    def end(self, tally: Tally) -> None:
        """The step came through."""
        if self._prefetcher is None:
            return
        self._prefetcher.abandon(tally)
        if self._num_rows:
            seconds = self._clock() - self._began_s
            self._switch.observe(self._num_rows, seconds, was_on=self._is_on)

    def check_integrity(self) -> None:
        """AssertionError when the bytes under way do not add up."""
        if self._prefetcher is not None:
            self._prefetcher.check_integrity()

    def close(self) -> None:
        if self._prefetcher is not None:
            self._prefetcher.close()


def _prefetcher(
    source: ExpertSource, config: WorkerConfig, math: ExpertMath, clock: Callable[[], float]
) -> Prefetcher | None:
    """None where the config does not want one, or no expert fits into its share of the bytes."""
    max_bytes = int(config.max_in_flight_bytes * config.prefetch_share)
    if config.prefetch == "never" or not config.fetch_threads:
        return None
    if max_bytes < largest_expert_bytes(source.manifest):
        return None
    streamer = Streamer(
        source,
        decode=math.decode_on_host,
        device=config.device,
        max_in_flight_bytes=max_bytes,
        fetch_bytes=1,  # an expert a fetch: what a wrong guess has begun is soon over
        num_threads=config.fetch_threads,
        clock=clock,
    )
    return Prefetcher(streamer, max_bytes)
