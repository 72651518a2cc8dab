"""How far `moetier plan` is off where it can be checked, and what it says where it cannot.

`python -m benchmarks.plan` runs the bundled model over a bounded link at several widths and batch
sizes, simulates the same steps from costs measured in the same run, and then tabulates clusters
nobody here has. `--keep FOLDER --part NAME` measures one part and keeps it there; a run without
--part takes what is kept and measures the rest.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.plan_link import UNBOUNDED, tier_over
from benchmarks.plan_runs import (
    EVERYTHING,
    Case,
    config_of,
    dense_cost,
    learned,
    measured_costs,
    predict_run,
    run_together,
    system_of_run,
)
from benchmarks.record import RESULTS, provenance, table
from cluster.plan.answer import answer
from cluster.plan.inputs import PlanInputs
from cluster.plan.shapes import SHAPES
from cluster.stores import compressed_store
from expert_store.config import CompressionConfig
from expert_store.segment import Segment
from expert_store.types import RecordRequest
from gpu_worker.config import NearDataPolicy
from models import MIXTRAL_MINI

REPORT = RESULTS / "plan.md"
LINKS = {2: 25e6, 3: 50e6, 4: 100e6}
"""Bytes per second of the bounded link, by bits of the store that is read over it."""
BATCHES = (1, 8)
WAYS: tuple[tuple[NearDataPolicy, float], ...] = (
    ("off", 0.0), ("off", 0.25), ("low_bit", 0.0), ("all", 0.0), ("cost", 0.25)
)  # fmt: skip
DECODE_STEPS = 12
CLUSTERS = ((1, 1), (1, 16), (8, 1), (8, 16), (64, 16), (64, 256))
"""GPU workers and memory nodes."""
SIMULATED = PlanInputs(max_layers=2, chunk=512)
Rows = list[dict[str, Any]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keep", type=Path, help="folder of parts that are not measured again")
    parser.add_argument("--part", choices=PARTS, help="measure only this part; needs --keep")
    args = parser.parse_args()
    if args.part and args.keep is None:
        parser.error("--part: needs --keep FOLDER")
    torch.set_num_threads(1)
    found = {name: _kept(name, args.keep) for name in ([args.part] if args.part else PARTS)}
    if not args.part:
        REPORT.write_text(page(found))
        print(f"wrote {REPORT}")
    return 0


def _kept(name: str, folder: Path | None) -> dict[str, Any]:
    """A part's rows and when they were made; measured unless they are there."""
    path = None if folder is None else folder / f"{name}.json"
    if path is not None and path.is_file():
        kept: dict[str, Any] = json.loads(path.read_text())
        return kept
    part = {"rows": PARTS[name](), "made": provenance()}
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(part))
    return part


def validation() -> Rows:
    """Every case beside its prediction."""
    rows: Rows = []
    for bits, bytes_per_s in LINKS.items():
        store = compressed_store(MIXTRAL_MINI, CompressionConfig(recipe="paper", bits=bits))
        segment = Segment(store)
        for key, info in segment.manifest.experts.items():  # hashes every record once
            segment.fetch([RecordRequest(key, "codes")])
            if info.factors is not None:
                segment.fetch([RecordRequest(key, "factors")])
        for batch in BATCHES:
            rows += _validate(segment, bits, batch, bytes_per_s)
        segment.close()
    return rows


def _validate(segment: Segment, bits: int, batch: int, bytes_per_s: float) -> Rows:
    manifest = segment.manifest
    resident = Case(batch, "off", EVERYTHING, UNBOUNDED, DECODE_STEPS)
    cases = [Case(batch, way, share, bytes_per_s, DECODE_STEPS) for way, share in WAYS]
    with tier_over(segment, UNBOUNDED) as free, tier_over(segment, bytes_per_s) as tier:
        run_together(segment, [(resident, free)])
        costs = measured_costs(segment, tier, config_of(manifest, cases[-1]))
        without, around, near, *runs = run_together(
            segment,
            [
                (replace(resident, has_experts=False), free),
                (resident, free),
                (replace(resident, near_data="all"), free),
                *((case, tier) for case in cases),
            ],
        )
    dense = dense_cost(manifest, batch, without)
    rows = []
    for case, found in zip(cases, runs, strict=True):
        system = system_of_run(manifest, case, costs, dense)
        predicted = predict_run(found, learned(system, batch, around, near))
        seconds, guess = found.decode_s(batch), statistics.median(predicted[batch:])
        rows.append(
            {
                "bits": bits,
                "batch": batch,
                "near_data": case.near_data,
                "cache": case.cache_share,
                "link": bytes_per_s,
                "measured_s": seconds,
                "predicted_s": guess,
                "first_s": found.step_s[0],
                "first_predicted_s": predicted[0],
            }
        )
        print(f"{rows[-1]}", flush=True)
    return rows


def policies() -> Rows:
    """Who runs near data, on a middling cluster."""
    ways: tuple[NearDataPolicy, ...] = ("off", "low_bit", "all", "cost")
    return [_planned(name, 8, 16, near_data=way) for name in SHAPES for way in ways]


def clusters() -> Rows:
    """The default policy, from one machine of each kind to many."""
    return [_planned(name, gpus, nodes) for name in SHAPES for gpus, nodes in CLUSTERS]


def _planned(name: str, gpus: int, nodes: int, **more: Any) -> dict[str, Any]:
    found = answer(SHAPES[name], replace(SIMULATED, num_gpus=gpus, num_nodes=nodes, **more))
    row = {
        "model": name,
        "gpus": gpus,
        "nodes": nodes,
        "near_data": found.inputs.near_data,
        "tokens_per_s": found.decode.tokens_per_s,
        "first_token_s": found.first_token_s,
        "gpu_in_bytes": found.decode.gpu_in_bytes,
        "node_out_bytes": found.node_out_bytes_mean,
        "near_share": found.decode.near_share,
        "node_link": found.decode.busy.node_link,
        "node_worker": found.decode.busy.node_worker,
        "bottleneck": found.estimate.bottleneck,
        "bound": found.bound_tokens_per_s,
    }
    print(row, flush=True)
    return row


PARTS: dict[str, Callable[[], Rows]] = {
    "validation": validation,
    "policies": policies,
    "clusters": clusters,
}


def page(found: dict[str, dict[str, Any]]) -> str:
    """The whole report."""
    defaults = PlanInputs()
    hardware = defaults.hardware
    return f"""# `moetier plan`: predictions, and how far off they were

## Checked against the real system

{found["validation"]["made"]}

The bundled mixtral-mini, paper's recipe, Top-1 restored, in one process: engine, a source behind a
link that lets so many bytes per second through (0.5 ms a request), a near-data worker over a unix
socket behind the same link. Costs of link, device and near data are those that a worker measures at
its start, in the same run. Three things are measured by runs that go beside the cases, step by step
in turn with them: what a layer takes besides its experts (a run without any), and how far the probe
was off for the device (a run whose experts are all there) and for near data (a run that leaves all
to it, without a link): a worker learns these two while it runs. What is predicted is the link, who
runs what, and how they overlap. The routing is replayed; planner and cache are the real ones;
prefetching is off. A step is the median of {DECODE_STEPS} decode steps; "first" is the first prompt
of 32 tokens, with nothing cached: one sample. The machine was shared with other work.

{_validation_table(found["validation"]["rows"])}

{_errors(found["validation"]["rows"])}

## Predictions: which pairs run near data

{found["policies"]["made"]} **Nothing below was measured.** 8 GPU workers, 16 memory nodes. Where
near data has no factors (`low_bit`) every restored expert still crosses the link.

{_table(found["policies"]["rows"], policy=True)}

## Predictions: clusters

Policy `{defaults.near_data}`. MB/token: expert bytes and answers into a GPU, for a token of its
own; out of a node: for a token of all GPUs together. Shares are of the busiest node. The bottleneck
is the closed form's: the part that a step keeps busy longest, and the tokens/s if only that took
time.

{_table(found["clusters"]["rows"], policy=False)}

Assumed throughout (`moetier plan --help` says where each is from): links of
{defaults.link_gbps:g} Gbit/s each way, batch {defaults.batch} per GPU at context
{defaults.context}, first token of a {defaults.prompt}-token prompt on an idle cluster;
{defaults.recipe.bits}-bit codes, mean rank {defaults.recipe.rank} at
{defaults.recipe.factor_bits} bits for Top-{defaults.top_n}, {defaults.cache_share:.0%} of the codes
cached; experts' popularity Zipf with exponent {defaults.skew:g}, tokens independent; GPU
{hardware.gpu_gb_per_s:g} GB/s and {hardware.gpu_tflops:g} TFLOP/s of which kernels reach
{hardware.gpu_share:.0%}; node {hardware.node_gb_per_s:g} GB/s, {hardware.node_cores:g} cores of
{hardware.core_gb_per_s:g} GB/s and {hardware.core_gops:g} GOP/s each; {hardware.call_us:g} us a
call, {hardware.layer_us:g} us a layer; activations go past records on a link.
{SIMULATED.max_layers} MoE layers, or as many as give every node an expert, are simulated for
{SIMULATED.steps} steps after {SIMULATED.warm_up}, and stand for all.
"""


def _validation_table(rows: Rows) -> str:
    head = ("bits", "link MB/s", "batch", "near data", "cache", "step, ms", "predicted", "error",
            "first, ms", "predicted", "error")  # fmt: skip
    return table(
        head,
        [
            (
                str(row["bits"]),
                f"{row['link'] / 1e6:.0f}",
                str(row["batch"]),
                row["near_data"],
                f"{row['cache']:.0%}",
                f"{row['measured_s'] * 1e3:.1f}",
                f"{row['predicted_s'] * 1e3:.1f}",
                f"{_error(row, ''):+.0%}",
                f"{row['first_s'] * 1e3:.0f}",
                f"{row['first_predicted_s'] * 1e3:.0f}",
                f"{_error(row, 'first_'):+.0%}",
            )
            for row in rows
        ],
    )


def _error(row: dict[str, Any], prefix: str) -> float:
    measured = row["first_s"] if prefix else row["measured_s"]
    return float(row[f"{prefix}predicted_s"]) / measured - 1


def _errors(rows: Rows) -> str:
    lines = []
    for name, prefix in (("A decode step", ""), ("The first token", "first_")):
        for what, some in (
            ("all cases", rows),
            ("copies only", [row for row in rows if row["near_data"] == "off"]),
            ("near data", [row for row in rows if row["near_data"] != "off"]),
        ):
            errors = [abs(_error(row, prefix)) for row in some]
            lines.append(
                (name, what, str(len(some)), f"{statistics.median(errors):.0%}",
                 f"{max(errors):.0%}")
            )  # fmt: skip
    return table(("error of", "over", "cases", "median", "worst"), lines)


def _table(rows: Rows, *, policy: bool) -> str:
    where = ("near data",) if policy else ("GPUs", "nodes")
    head = ("model", *where, "tokens/s", "first token, s", "MB/token into a GPU",
            "out of a node", "pairs near", "node link", "node worker", "bottleneck")  # fmt: skip
    return table(
        head,
        [
            (
                row["model"],
                *([row["near_data"]] if policy else [str(row["gpus"]), str(row["nodes"])]),
                f"{row['tokens_per_s']:,.0f}",
                f"{row['first_token_s']:.2f}",
                f"{row['gpu_in_bytes'] / 1e6:.2f}",
                f"{row['node_out_bytes'] / 1e6:.3f}",
                f"{row['near_share']:.0%}",
                f"{row['node_link']:.0%}",
                f"{row['node_worker']:.0%}",
                f"{row['bottleneck']}, {row['bound']:,.0f}",
            )
            for row in rows
        ],
    )


if __name__ == "__main__":
    raise SystemExit(main())
