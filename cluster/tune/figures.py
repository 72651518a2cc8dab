"""The page of a tuning: tables, the front, curves over time. Needs matplotlib (extra "report")."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cluster.report.page import Picture, Section, Table, write_page
from cluster.report.plots import Dot, scatter, timelines
from cluster.tune.page import as_serve_yaml, as_yaml, cells, named, over_time, verdict
from cluster.tune.tuning import Tuning


def sections(tuning: Tuning, name: str) -> list[Section]:
    """A tuning's part of a page; `name` begins its pictures' names and its headings."""
    promise, site = tuning.promise, tuning.site
    told = (
        f"Promise: the first token within {promise.ttft_s:g} s, each further one in "
        f"{promise.per_token_s:g} s on average, missed by {promise.limit:.1%} at most. "
        f"{site.min_replicas} to {site.max_replicas} workers of {site.worker.slots} slots, each "
        f"{site.start_s:g} s from order to service. Tuned on {named(tuning.tuned_on)}; judged "
        f"on {named(tuning.held_out)}. Hours are of workers, for one trace; requests of its "
        f"first {promise.settle_s:g} s do not count."
    )
    return [
        Section(f"{name}: what was found", (told, Table.of(cells(tuning)), verdict(tuning))),
        Section(
            f"{name}: cost against misses",
            (Picture(f"{name}-front", _front(tuning), "All settings tried, on what was tuned on"),),
        ),
        Section(
            f"{name}: over time",
            (
                Picture(
                    f"{name}-time",
                    timelines(over_time(tuning), x_label="minutes"),
                    "The chosen settings on the first held-out trace",
                ),
            ),
        ),
    ]


def _front(tuning: Tuning) -> str:
    groups = {
        result.name: [
            Dot(t.score.hours, 100 * t.score.violations, hollow=t is not result.chosen)
            for t in result.trials
        ]
        for result in tuning.results
    }
    return scatter(
        groups, x_label="replica-hours", y_label="missed, % (filled: chosen)", log_y=False
    )


def write(tuning: Tuning, folder: Path) -> Sequence[Path]:
    """tune.md, tune.html, the pictures, and the two YAML files beside them."""
    pages = write_page(folder, "tune", "moetier tune", sections(tuning, "trace"))
    (folder / "tune.yaml").write_text(as_yaml(tuning), encoding="utf-8")
    (folder / "tune-serve.yaml").write_text(as_serve_yaml(tuning), encoding="utf-8")
    return pages
