"""A cluster's snapshot in Prometheus' text format: a pure function.

Counters are per replica and since its start, as Prometheus wants them; sums are its job.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from cluster.snapshot import ClusterSnapshot
from gpu_worker.messages import WorkerStats

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

Sample = tuple[Mapping[str, object], float]


def render(snapshot: ClusterSnapshot) -> str:
    """All metrics, each with its HELP and TYPE, in a fixed order."""
    workers = snapshot.workers
    lines: list[str] = []
    for name, kind, text, samples in (
        *_load(workers),
        *_work(workers),
        *_bytes_and_pairs(workers),
        *_tier_calls(workers),
        *_costs(workers),
        *_requests(snapshot),
        *_tiers(snapshot),
    ):
        lines += [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]
        lines += [f"{name}{_labels(labels)} {_number(value)}" for labels, value in samples]
    return "\n".join(lines) + "\n"


Metric = tuple[str, str, str, list[Sample]]


def _load(workers: Iterable[WorkerStats]) -> Iterator[Metric]:
    versions: list[Sample] = [
        ({"replica": w.replica, "version": w.version or "unknown"}, 1) for w in workers
    ]
    yield "moetier_worker_info", "gauge", "1 for each GPU worker and its store's version.", versions
    gauges = {
        "running_sequences": "Sequences that hold a slot.",
        "waiting_sequences": "Sequences that were accepted and hold no slot yet.",
        "waiting_tokens": "Prompt tokens not yet computed.",
    }
    for field, text in gauges.items():
        samples: list[Sample] = [({"replica": w.replica}, getattr(w, field)) for w in workers]
        yield f"moetier_{field}", "gauge", text, samples


def _work(workers: Iterable[WorkerStats]) -> Iterator[Metric]:
    counters = {
        "steps": "Steps of the engine.",
        "computed_tokens": "Token positions computed, of prompts and answers.",
        "output_tokens": "Tokens of answers.",
    }
    for field, text in counters.items():
        samples: list[Sample] = [({"replica": w.replica}, getattr(w, field)) for w in workers]
        yield f"moetier_{field}_total", "counter", text, samples
    wait: list[Sample] = [({"replica": w.replica}, w.counters.get("wait_s", 0)) for w in workers]
    yield "moetier_wait_seconds_total", "counter", "Time steps waited for expert bytes.", wait
    near: list[Sample] = [
        ({"replica": w.replica}, w.counters.get("near_wait_s", 0)) for w in workers
    ]
    help_text = "Of that, time they waited for near-data answers."
    yield "moetier_near_data_wait_seconds_total", "counter", help_text, near
    busy: list[Sample] = [({"replica": w.replica}, w.busy_s) for w in workers]
    yield "moetier_busy_seconds_total", "counter", "Time spent in steps.", busy
    ended: list[Sample] = [
        ({"replica": w.replica, "how": how}, count)
        for w in workers
        for how, count in sorted(w.finished.items())
    ]
    yield "moetier_sequences_total", "counter", "Sequences that ended, by how.", ended
    degraded: list[Sample] = [({"replica": w.replica}, w.degraded_requests) for w in workers]
    help_text = "Requests answered with some compensator missing; their pairs: moetier_pairs_total."
    yield "moetier_degraded_requests_total", "counter", help_text, degraded


def _bytes_and_pairs(workers: Sequence[WorkerStats]) -> Iterator[Metric]:
    def by_kind(field: str) -> list[Sample]:
        return [
            ({"replica": w.replica, "kind": kind}, count)
            for w in workers
            for kind, count in _mapping(w.counters, field).items()
        ]

    moved: list[Sample] = []
    for w in workers:
        for place, count in _mapping(w.counters, "moved_bytes").items():
            tier, _, kind = place.partition("/")
            moved.append(({"replica": w.replica, "tier": tier, "kind": kind}, count))
    yield "moetier_moved_bytes_total", "counter", "Expert bytes moved, by tier and kind.", moved
    help_text = "Expert bytes that crossed to the device; more than moved where hosts decode them."
    yield "moetier_device_bytes_total", "counter", help_text, by_kind("device_bytes")
    records: list[Sample] = [
        ({"replica": w.replica}, w.counters.get("wire_bytes", 0)) for w in workers
    ]
    help_text = "Expert bytes received over gRPC; fewer than moved where they travel compressed."
    yield "moetier_wire_bytes_total", "counter", help_text, records
    yield (
        "moetier_planned_bytes_total",
        "counter",
        "Expert bytes the plans asked for, by kind.",
        by_kind("planned_bytes"),
    )
    for field, text in (("cache_hits", "were"), ("cache_misses", "were not")):
        help_text = f"Records a plan needed that {text} on the device, by kind."
        yield f"moetier_{field}_total", "counter", help_text, by_kind(field)
    pairs: list[Sample] = [
        ({"replica": w.replica, "how": how}, w.counters.get(f"{how}_pairs", 0))
        for w in workers
        for how in ("restored", "low_bit", "degraded", "near_data")
    ]
    help_text = "(token, expert) pairs: restored, low_bit and degraded are all; near_data of these."
    yield "moetier_pairs_total", "counter", help_text, pairs
    wire: list[Sample] = [
        ({"replica": w.replica, "direction": way}, w.counters.get(f"{way}_bytes", 0))
        for w in workers
        for way in ("sent", "received")
    ]
    yield "moetier_near_data_bytes_total", "counter", "Activations to and from near data.", wire
    yield from _ahead(workers)


def _ahead(workers: Sequence[WorkerStats]) -> Iterator[Metric]:
    """What was fetched by a guess of the next layer's routing."""
    fetched: list[Sample] = []
    guessed: list[Sample] = []
    for w in workers:
        used, right = w.counters.get("ahead_used_bytes", 0), w.counters.get("right_pairs", 0)
        in_vain = w.counters.get("ahead_bytes", 0) - used
        wrong = w.counters.get("guessed_pairs", 0) - right
        fetched += [({"replica": w.replica, "use": "used"}, used)]
        fetched += [({"replica": w.replica, "use": "in_vain"}, in_vain)]
        guessed += [({"replica": w.replica, "guess": "right"}, right)]
        guessed += [({"replica": w.replica, "guess": "wrong"}, wrong)]
    help_text = "Of the moved bytes those fetched ahead by a guess; moved is planned and in vain."
    yield "moetier_ahead_bytes_total", "counter", help_text, fetched
    help_text = "Pairs whose expert was guessed a layer ahead, right or wrong."
    yield "moetier_guessed_pairs_total", "counter", help_text, guessed


def _tier_calls(workers: Sequence[WorkerStats]) -> Iterator[Metric]:
    """How calls to copies of records and to near-data workers went; without copies zeros."""
    for field, name, text in (
        ("calls", "fetch_calls", "Calls to copies of records; one fetch may need several."),
        ("hedged", "hedged_fetches", "Of these, second calls because the first one was late."),
        ("hedges_won", "won_hedges", "Of those, the ones that answered before the first."),
        (
            "failed_over",
            "failed_over_fetches",
            "Calls whose copy was lost or refused: others took over.",
        ),
        ("corrupt", "corrupt_fetches", "Calls refused because the copy is damaged."),
        ("hung", "hung_fetches", "Calls that hung until another copy was asked."),
    ):
        fetches: list[Sample] = [
            ({"replica": w.replica}, w.tier_calls.fetches.get(field, 0)) for w in workers
        ]
        yield f"moetier_{name}_total", "counter", text, fetches
    for field, name, text in (
        ("calls", "near_data_calls", "Calls to near-data workers."),
        ("hedged", "hedged_near_data_calls", "Second calls because the first worker was late."),
        ("failed_over", "failed_over_near_data_calls", "Calls another worker had to take over."),
        ("hung", "hung_near_data_calls", "Calls given up because the worker hung."),
        ("degraded", "near_data_degraded_experts", "Experts run from codes, asked for restored."),
    ):
        near: list[Sample] = [
            ({"replica": w.replica}, w.tier_calls.near_data.get(field, 0)) for w in workers
        ]
        yield f"moetier_{name}_total", "counter", text, near


def _costs(workers: Iterable[WorkerStats]) -> Iterator[Metric]:
    """What layers were predicted to take, and the governor; workers without costs give zeros."""
    for field, text in (
        ("predicted_s", "Time MoE layers were predicted to take, where costs are measured."),
        ("layer_s", "Time the same layers took."),
    ):
        name = f"moetier_{field.removesuffix('_s')}_seconds_total"
        samples: list[Sample] = [
            ({"replica": w.replica}, w.counters.get(field, 0)) for w in workers
        ]
        yield name, "counter", text, samples
    governed: list[Sample] = [({"replica": w.replica}, w.governed_tokens) for w in workers]
    help_text = "Token positions computed with less than full quality, for the latency target."
    yield "moetier_governed_tokens_total", "counter", help_text, governed
    knobs: list[Sample] = [
        ({"replica": w.replica, "knob": knob}, value)
        for w in workers
        for knob, value in sorted(w.knobs.items())
    ]
    yield "moetier_governor_knob", "gauge", "What the bandwidth governor has set now.", knobs


def _requests(snapshot: ClusterSnapshot) -> Iterator[Metric]:
    samples: list[Sample] = [
        ({"replica": ingress.replica, "route": route, "status": status}, count)
        for ingress in snapshot.ingresses
        for (route, status), count in sorted(ingress.requests.items())
    ]
    yield "moetier_http_requests_total", "counter", "HTTP requests, by route and status.", samples
    retries: list[Sample] = [({"replica": i.replica}, i.retries) for i in snapshot.ingresses]
    help_text = "Times a request was sent to another worker because the first was lost."
    yield "moetier_request_retries_total", "counter", help_text, retries


def _tiers(snapshot: ClusterSnapshot) -> Iterator[Metric]:
    def samples(value: Any) -> list[Sample]:
        return [
            ({"actor": tier.name, "role": tier.role, "node": tier.node}, value(tier))
            for tier in snapshot.tiers
        ]

    up = samples(lambda tier: tier.problem is None)
    yield "moetier_tier_up", "gauge", "1 while a store or NDP actor answers.", up
    restarts = samples(lambda tier: tier.restarts)
    yield "moetier_tier_restarts_total", "counter", "Times a tier actor was replaced.", restarts
    damaged = samples(lambda tier: tier.quarantined)
    help_text = "Records found damaged and refused; readers take another copy's."
    yield "moetier_quarantined_records", "gauge", help_text, damaged
    repaired = samples(lambda tier: tier.repaired)
    help_text = "Records served from memory with another copy's bytes: restore the file."
    yield "moetier_repaired_records", "gauge", help_text, repaired


def _mapping(counters: Mapping[str, Any], field: str) -> Mapping[str, float]:
    found: Mapping[str, float] = counters.get(field, {})
    return found


def _labels(labels: Mapping[str, object]) -> str:
    return "{" + ",".join(f'{name}="{_escaped(value)}"' for name, value in labels.items()) + "}"


def _escaped(value: object) -> str:
    return str(value).replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) else repr(float(value))
