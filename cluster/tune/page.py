"""What a tuning found, as text, as JSON, as YAML to paste, and as curves.

Knows no file and draws nothing: `cluster/tune/figures.py` does, since matplotlib is optional.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import yaml

from cluster.config import as_mapping
from cluster.table import format_table
from cluster.tune.search import Score
from cluster.tune.simulate import Outcome
from cluster.tune.tuning import Result, Tuning

WINDOW_S = 30.0
"""Latency over time is the worst of what came in so many seconds."""

Lines = dict[str, list[tuple[float, float]]]


def as_yaml(tuning: Tuning) -> str:
    """Ours, for a cluster config: its section `replicas.autoscaling`."""
    values = as_mapping(tuning.settings)
    return yaml.safe_dump({"replicas": {"autoscaling": values}}, sort_keys=False)


def as_serve_yaml(tuning: Tuning) -> str:
    """Ours, as Serve's own `autoscaling_config`."""
    worker = tuning.site.worker
    config = tuning.settings.serve_config(slots=worker.slots, prefill_chunk=worker.prefill_chunk)
    return yaml.safe_dump({"autoscaling_config": config}, sort_keys=False)


def verdict(tuning: Tuning) -> str:
    """In words: whether the promise can be kept, and how ours and Serve's default compare."""
    ours, limit = tuning.ours, tuning.promise.limit
    lines = []
    if not ours.reached:
        lines.append(
            f"No setting kept {1 - limit:.1%} of requests within {tuning.promise.ttft_s:g} s to "
            f"the first token and {tuning.promise.per_token_s:g} s for each further one; the best "
            f"missed {ours.chosen.score.worst:.1%} on its worst trace. Allow more replicas, faster "
            "starts or more seconds; what follows is the best that was found."
        )
    for other in tuning.results[1:]:
        lines.append(_compared(ours.held_out, other))
    if tuning.equal_cost is not None:
        trial, judged = tuning.equal_cost
        lines.append(
            f"Of our settings with no more hours than {tuning.results[-1].name} (when tuned) the "
            f"best had {_words(judged)}, held out."
        )
    return "\n".join(lines)


def named(traces: Sequence[str]) -> str:
    """All of a few traces by name; of many the first and the last."""
    if len(traces) <= 2:
        return " and ".join(traces)
    return f"{len(traces)} traces, {traces[0]} to {traces[-1]}"


def _compared(ours: Score, other: Result) -> str:
    fewer = ours.violations < other.held_out.violations
    cheaper = ours.hours <= other.held_out.hours
    how = {
        (True, True): "is better in both",
        (True, False): "misses less but costs more",
        (False, True): "costs no more but misses no less",
        (False, False): "is better in neither",
    }[fewer, cheaper]
    return f"moetier, {_words(ours)}, {how} against {other.name}, {_words(other.held_out)}."


def _words(score: Score) -> str:
    return f"{score.violations:.2%} missed in {score.hours:.2f} replica-hours"


def cells(tuning: Tuning) -> list[Mapping[str, str | None]]:
    """A row for each contestant's chosen setting."""
    rows: list[Mapping[str, str | None]] = []
    for result in tuning.results:
        rows.append(
            {
                "policy": result.name,
                "missed, tuned on": f"{result.chosen.score.violations:.2%}",
                "worst trace": f"{result.chosen.score.worst:.2%}",
                "hours, tuned on": f"{result.chosen.score.hours:.2f}",
                "missed, held out": f"{result.held_out.violations:.2%}",
                "worst trace, held out": f"{result.held_out.worst:.2%}",
                "hours, held out": f"{result.held_out.hours:.2f}",
                "settings": _settings(result.chosen.values),
            }
        )
    return rows


def _settings(values: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in values.items())


def as_text(tuning: Tuning) -> str:
    """Everything for a terminal."""
    front = [
        {
            "missed": f"{trial.score.violations:.2%}",
            "hours": f"{trial.score.hours:.2f}",
            "settings": _settings(trial.values),
            "": "<- chosen" if trial is tuning.ours.chosen else "",
        }
        for trial in tuning.ours.front
    ]
    return "\n".join(
        [
            f"tuned on {named(tuning.tuned_on)}; judged on {named(tuning.held_out)}",
            "",
            format_table(cells(tuning)),
            "",
            verdict(tuning),
            "",
            "Pareto front of ours, on what it was tuned on:",
            format_table(front),
            "",
            "# for the cluster config (moetier serve --config):",
            as_yaml(tuning),
            "# the same as Serve's own option of the deployment:",
            as_serve_yaml(tuning),
        ]
    )


def as_json(tuning: Tuning) -> dict[str, Any]:
    """All that was found, as plain values."""
    return {
        "promise": asdict(tuning.promise),
        "site": asdict(tuning.site),
        "tuned_on": tuning.tuned_on,
        "held_out": tuning.held_out,
        "results": [
            {
                "policy": result.name,
                "reached": result.reached,
                "chosen": dict(result.chosen.values),
                "score": asdict(result.chosen.score),
                "held_out": asdict(result.held_out),
                "front": [
                    {"values": dict(trial.values), **asdict(trial.score)} for trial in result.front
                ],
            }
            for result in tuning.results
        ],
        "config": as_mapping(tuning.settings),
    }


def over_time(tuning: Tuning) -> dict[str, Lines]:
    """Replicas, what waits and latency on the first held-out trace, for each contestant."""
    panels: dict[str, Lines] = {"workers": {}, "requests here": {}, "worst first token, s": {}}
    for result in tuning.results:
        moments = result.outcome.moments
        panels["workers"][result.name] = [(m.now_s / 60, float(m.ready)) for m in moments]
        panels["requests here"][result.name] = [
            (m.now_s / 60, float(m.ongoing + m.queued)) for m in moments
        ]
        panels["worst first token, s"][result.name] = _worst(result.outcome)
    return panels


def _worst(outcome: Outcome) -> list[tuple[float, float]]:
    """By window of arrival; requests that were lost have no latency and are left out."""
    worst: dict[int, float] = {}
    for served in outcome.served:
        if served.first_s is not None:
            window = int(served.request.arrival_s / WINDOW_S)
            worst[window] = max(worst.get(window, 0.0), served.ttft_s)
    return [(window * WINDOW_S / 60, value) for window, value in sorted(worst.items())]
