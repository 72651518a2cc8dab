"""The GPU worker's configuration: one frozen dataclass, checked at the door, resolved first.

Knows no file and no environment variable; `resolve` needs only the store's manifest.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch

from expert_store.types import Manifest
from gpu_worker.eviction import CachePolicy
from gpu_worker.prefetch_switch import Prefetch
from gpu_worker.restoring import PairPolicy, Restore, repaired_errors

NearDataPolicy = Literal["off", "low_bit", "all", "cost"]
"""Which (token, expert) pairs run near their bytes.

- off: none; every expert a step needs is copied to the device.
- low_bit: every pair that is not restored, whatever lies on the device, so that who runs a pair
  depends on the router alone and never on the state of a cache.
- all: every pair; restored ones get their compensators there.
- cost: those experts with which a layer is predicted to end soonest (`gpu_worker/assignment.py`).
  The prediction is from costs measured while running, so who runs a pair depends on timing, and
  near data's other rounding with it: answers are not the same bit for bit from run to run.
"""
Device = Literal["auto", "cpu", "cuda"]
DType = Literal["auto", "float32", "bfloat16", "float16"]

MEBIBYTE = 1 << 20


@dataclass(frozen=True, slots=True)
class WorkerConfig:
    """How one worker runs one model.

    - top_n: how many of a token's experts get their compensator; None means what the store says.
    - restore: which ones: the top_n of largest router weight, all, top_n at random, those that hold
      restore_mass of the weight, or those whose benefit is over restore_benefit.
    - restore_mass: share of a token's router weight, 0 to 1, that restore "mass" covers.
    - restore_benefit: share of the router weight times the relative error that the compensator
      repairs, over which restore "benefit" fetches it.
    - restore_seed: another seed gives restore "random" other pairs.
    - skip_below: pairs with less than this share of their token's router weight are not run; a
      token's first expert always is. 0 skips none; the others' weights stay as they are.
    - factor_share: how much of each compensator is fetched: the first blocks that have this share
      of its bytes, 0 to 1, or less. A pair whose share holds no block runs from codes alone.
    - near_data: which (token, expert) pairs run near their bytes: off is none, low_bit all that are
      not restored, all every pair, cost those with which the layer is predicted to end soonest; by
      measured times, so that equal requests may get answers that differ by rounding.
    - cache_bytes: device memory for experts kept between steps; 0 keeps none.
    - cache_policy: which records stay there: those most used lately (lfu), the same with uses
      counted by router weight (score), or those used last, by layer or over all (layer_lru, lru).
    - factor_cache_share: part of cache_bytes that compensators have for themselves, 0 to 1, codes
      having the rest; None lets both compete for all of it.
    - max_in_flight_bytes: bytes of records on their way or not yet used; holds any one expert.
    - fetch_threads: fetches that may run at the same time; 0 fetches on the step's own thread, so
      that nothing overlaps and the order is fixed.
    - fetch_bytes: bytes asked for in one fetch, if more is missing; smaller lets computing start
      sooner, larger saves calls. None means half of max_in_flight_bytes.
    - factor_deadline_s: seconds without any record landing, and as long as the bytes under way take
      at 0.2 Gbit/s, after which a layer that still waits for factors goes on from codes; its pairs
      count as degraded. None waits as long as the source does. Codes are always waited for. Needs
      fetch_threads.
    - prefetch: fetch what the next layer will probably need once this layer's copies are here:
      always, never, or adaptive, which tries it on real steps and keeps it where they were faster.
      Needs fetch_threads.
    - prefetch_share: bytes fetched ahead at most, besides max_in_flight_bytes and as a part of it,
      0 to 1; where no expert fits into that, nothing is fetched ahead.
    - max_sequences: sequences that run at the same time (slots of the KV cache).
    - max_context: tokens of prompt and answer of one sequence; None means what the model allows.
    - prefill_chunk: prompt tokens of one sequence handled in one step.
    - device, dtype: "auto" is cuda and bfloat16 where there is a GPU, else cpu and float32.
    - link_bytes_per_s, near_data_token_s: costs that near_data "cost" and target_step_s begin with:
      the speed of copies, and the seconds one token costs one expert near data. None means measured
      at start-up. Real copies and calls correct both while the worker runs.
    - target_step_s: seconds that a decode step may take. Where waiting for bytes makes it longer,
      fewer bytes of compensators are fetched, down to the limits below; metrics and answers say so.
      None means never. Answers then depend on the speed of the link.
    - min_top_n, min_factor_share: the least top_n and factor_share that target_step_s may come to.
    - max_skip_below: the largest skip_below that it may come to once no factors are left to save;
      at 0 no pair is left out for it.

    Raises ValueError naming the field, what was given and what is allowed.
    """

    top_n: int | None = None
    restore: Restore = "top_n"
    restore_mass: float | None = None
    restore_benefit: float | None = None
    restore_seed: int = 0
    skip_below: float = 0.0
    factor_share: float = 1.0
    near_data: NearDataPolicy = "off"
    cache_bytes: int = 512 * MEBIBYTE
    cache_policy: CachePolicy = "lfu"
    factor_cache_share: float | None = None
    max_in_flight_bytes: int = 256 * MEBIBYTE
    fetch_threads: int = 2
    fetch_bytes: int | None = None
    factor_deadline_s: float | None = 1.0
    prefetch: Prefetch = "adaptive"
    prefetch_share: float = 0.25
    max_sequences: int = 8
    max_context: int | None = None
    prefill_chunk: int = 256
    device: Device = "auto"
    dtype: DType = "auto"
    link_bytes_per_s: float | None = None
    near_data_token_s: float | None = None
    target_step_s: float | None = None
    min_top_n: int = 0
    min_factor_share: float = 0.0
    max_skip_below: float = 0.0

    def __post_init__(self) -> None:
        _one_of("restore", self.restore, get_args(Restore))
        _one_of("near_data", self.near_data, get_args(NearDataPolicy))
        _one_of("prefetch", self.prefetch, get_args(Prefetch))
        _within("prefetch_share", self.prefetch_share, most=1)
        if self.prefetch == "always" and not self.fetch_threads:
            raise ValueError(
                "prefetch: got 'always' with fetch_threads 0, but without threads nothing can be "
                "fetched ahead; give fetch_threads or choose prefetch 'never'"
            )
        _one_of("device", self.device, get_args(Device))
        _one_of("dtype", self.dtype, get_args(DType))
        _at_least("top_n", self.top_n, 0)
        _at_least("restore_seed", self.restore_seed, 0)
        _within("restore_mass", self.restore_mass, most=1)
        _within("restore_benefit", self.restore_benefit)
        _within("skip_below", self.skip_below, most=1)
        _within("factor_share", self.factor_share, most=1)
        for rule in ("mass", "benefit"):
            if self.restore == rule and getattr(self, f"restore_{rule}") is None:
                raise ValueError(
                    f"restore_{rule}: got None, restore {rule!r} needs a threshold; give one or "
                    "choose restore 'top_n'"
                )
        _at_least("cache_bytes", self.cache_bytes, 0)
        _one_of("cache_policy", self.cache_policy, get_args(CachePolicy))
        _within("factor_cache_share", self.factor_cache_share, most=1)
        _at_least("max_in_flight_bytes", self.max_in_flight_bytes, 1)
        _at_least("fetch_threads", self.fetch_threads, 0)
        _at_least("fetch_bytes", self.fetch_bytes, 1)
        _at_least("max_sequences", self.max_sequences, 1)
        _at_least("max_context", self.max_context, 1)
        _at_least("prefill_chunk", self.prefill_chunk, 1)
        for name in ("factor_deadline_s", "link_bytes_per_s", "near_data_token_s", "target_step_s"):
            _positive(name, getattr(self, name))
        _at_least("min_top_n", self.min_top_n, 0)
        _within("min_factor_share", self.min_factor_share, most=self.factor_share)
        _within("max_skip_below", self.max_skip_below, most=1)
        if 0 < self.max_skip_below < self.skip_below:
            raise ValueError(
                f"max_skip_below: got {self.max_skip_below}, but skip_below is {self.skip_below} "
                f"already; use 0 or {self.skip_below:g} to 1"
            )

    def resolve(self, manifest: Manifest) -> WorkerConfig:
        """This config with every None and "auto" replaced by what this store and this machine give.

        Raises ValueError when the config does not fit the store or the machine.
        """
        model = manifest.model
        has_cuda = torch.cuda.is_available()
        if self.device == "cuda" and not has_cuda:
            raise ValueError("device: got 'cuda', but this machine has no usable GPU; use 'auto'")
        device: Device = self.device if self.device != "auto" else ("cuda" if has_cuda else "cpu")
        dtype: DType = self.dtype
        if dtype == "auto":
            dtype = "bfloat16" if device == "cuda" else "float32"
        top_n = manifest.recipe.top_n if self.top_n is None else self.top_n
        if top_n > model.top_k:
            raise ValueError(
                f"top_n: got {top_n}, but {model.name} routes a token to {model.top_k} experts; "
                f"use 0 to {model.top_k}"
            )
        if self.min_top_n > top_n:
            raise ValueError(
                f"min_top_n: got {self.min_top_n}, but top_n is {top_n}; use 0 to {top_n}"
            )
        max_context = self.max_context or model.max_positions
        if max_context > model.max_positions:
            raise ValueError(
                f"max_context: got {max_context}, but {model.name} has only "
                f"{model.max_positions} positions"
            )
        return replace(
            self,
            top_n=top_n,
            fetch_bytes=self.fetch_bytes or max(1, self.max_in_flight_bytes // 2),
            max_context=max_context,
            device=device,
            dtype=dtype,
        )

    def pair_policy(self, manifest: Manifest) -> PairPolicy:
        """What to do with a token's pairs; of a resolved config only."""
        assert self.top_n is not None, "resolve the config first"
        return PairPolicy(
            restore=self.restore,
            top_n=self.top_n,
            restore_mass=self.restore_mass or 0.0,
            restore_benefit=self.restore_benefit or 0.0,
            restore_seed=self.restore_seed,
            skip_below=self.skip_below,
            repaired=(
                repaired_errors(manifest, self.factor_share) if self.restore == "benefit" else {}
            ),
        )

    @property
    def torch_dtype(self) -> torch.dtype:
        """dtype of the dense part; of a resolved config only."""
        assert self.dtype != "auto", "resolve the config first"
        return {
            "float32": torch.float32,
            "bfloat16": torch.bfloat16,
            "float16": torch.float16,
        }[self.dtype]


def _one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}: got {value!r}, expected one of {', '.join(allowed)}")


def _at_least(name: str, value: int | None, least: int) -> None:
    if value is not None and (isinstance(value, bool) or value != int(value) or value < least):
        raise ValueError(f"{name}: got {value!r}, expected a whole number of at least {least}")


def _positive(name: str, value: float | None) -> None:
    if value is not None and not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name}: got {value!r}, expected a positive number")


def _within(name: str, value: float | None, *, most: float = math.inf) -> None:
    if value is not None and not (math.isfinite(value) and 0 <= value <= most):
        allowed = "0 or more" if most == math.inf else f"0 to {most:g}"
        raise ValueError(f"{name}: got {value!r}, expected {allowed}")
