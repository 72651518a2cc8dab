"""Guesses of the second of two layers' routing that are told what to say, right or not."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch

from gpu_worker.router_guess import Guess, RouterGuess
from tests.gpu_worker.steps import NUM_EXPERTS, TOP_K, Step

LAST_LAYER = 1
Routing = Callable[[Step], torch.Tensor]


def right(step: Step) -> torch.Tensor:
    return step.ids


def wrong(step: Step) -> torch.Tensor:
    """The experts that no row of a one-row step is sent to."""
    others = [e for e in range(NUM_EXPERTS) if e not in step.ids[0].tolist()]
    return torch.tensor([others[:TOP_K]] * len(step.ids))


def half_right(step: Step) -> torch.Tensor:
    ids = wrong(step)
    ids[:, 0] = step.ids[:, 0]
    return ids


class Oracle:
    """A guess that is told what the next layer will do."""

    def __init__(self, second: Step, say: Routing) -> None:
        self._second, self._say = second, say
        self.num_guesses = 0

    def guess(self, layer: int, hidden: torch.Tensor) -> Guess | None:
        self.num_guesses += 1
        return Guess(layer + 1, self._say(self._second), self._second.weights)

    def next_layer(self, layer: int) -> int | None:
        return None if layer == LAST_LAYER else layer + 1


def told(second: Step, say: Routing) -> RouterGuess:
    return cast(RouterGuess, Oracle(second, say))
