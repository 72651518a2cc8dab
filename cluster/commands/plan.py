"""`moetier plan`: predicts what a cluster that is not there would do, from the cost model."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any, get_args

from cluster.plan.answer import Answer, answer
from cluster.plan.inputs import Hardware, PlanInputs, Recipe
from cluster.plan.shapes import SHAPES, shape_of
from cluster.plan.system import RecordBytes
from cluster.table import format_table
from expert_store.format import is_store, load_manifest
from gpu_worker.config import NearDataPolicy

HELP = f"""Predict tokens/s, time to first token, bytes per link and the bottleneck of a cluster.

MODEL is {", ".join(SHAPES)}, or the folder of a checkpoint
or store; of a checkpoint only config.json is read, and a store's records count as they are, not as
the recipe says. A seeded simulation: GPU workers go through their
layers with the worker's own planner, expert cache and learning of costs; links, GPUs and near-data
workers are queues; the time of each part comes from the cost model that the planner uses. Beside
it the closed form: what each part is busy with a step, and so the most tokens/s it allows.
A prediction, not a measurement: benchmarks/results/plan.md says how far off it was where it could
be checked. Exit code 2 for a question that makes no sense."""

_CLUSTER = {
    "gpus": ("num_gpus", "N", "GPU workers, each with a whole copy of all but the experts"),
    "memory-nodes": ("num_nodes", "M", "nodes that hold the experts, each with a near-data worker"),
    "link": ("link_gbps", "GBPS", "Gbit/s of every machine's network link, each way"),
    "batch": ("batch", "B", "sequences that each GPU worker decodes side by side"),
    "context": ("context", "T", "positions of each sequence"),
    "prompt": (
        "prompt",
        "T",
        "tokens of a prompt whose first token is awaited, nothing else to do",
    ),
    "chunk": ("chunk", "T", "tokens of one prefill step"),
    "top-n": ("top_n", "N", "experts of a token that get their compensator"),
    "cache-share": ("cache_share", "S", "part of all codes that a GPU keeps, if it has room"),
    "skew": ("skew", "S", "Zipf exponent of the experts' popularity; 0 is uniform"),
    "seed": ("seed", "N", "of what is drawn"),
    "steps": ("steps", "N", "decode steps that are measured"),
    "warm-up": ("warm_up", "N", "steps before that"),
    "max-layers": ("max_layers", "N", "MoE layers that are simulated; others count as like them"),
}
_RECIPE = {
    "bits": ("bits", "BITS", "of codes: 2, 3, 4, or 16 for the original"),
    "rank": ("rank", "R", "mean rank of the compensators"),
    "factor-bits": ("factor_bits", "BITS", "of their factors"),
}
_HARDWARE = {
    "gpu-gb-per-s": ("gpu_gb_per_s", "GB/S", "memory bandwidth (A100 80 GB SXM data sheet)"),
    "gpu-tflops": ("gpu_tflops", "TFLOPS", "bfloat16 peak (likewise)"),
    "gpu-gib": ("gpu_gib", "GIB", "memory of a GPU"),
    "gpu-share": ("gpu_share", "S", "what kernels reach of both: a target, not measured"),
    "layer-us": ("layer_us", "US", "a layer's launches, planning and adding up: assumed"),
    "node-gb-per-s": ("node_gb_per_s", "GB/S", "a node's memory bandwidth (8x DDR4-3200)"),
    "node-cores": ("node_cores", "N", "cores of its near-data worker"),
    "core-gb-per-s": ("core_gb_per_s", "GB/S", "packed codes a core reads, 1 token: measured"),
    "core-gops": ("core_gops", "GOPS", "operations of a core at 16 tokens: measured"),
    "call-us": ("call_us", "US", "a request and its answer without their bytes: measured"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, metavar="MODEL", help="a shape, or a folder")
    _add(parser.add_argument_group("cluster and load"), _CLUSTER, PlanInputs())
    parser.add_argument(
        "--near-data",
        choices=get_args(NearDataPolicy),
        default=PlanInputs().near_data,
        help=f"which pairs run near their bytes (default: {PlanInputs().near_data})",
    )
    _add(parser.add_argument_group("recipe"), _RECIPE, Recipe())
    _add(parser.add_argument_group("hardware"), _HARDWARE, Hardware())
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _add(group: Any, options: dict[str, tuple[str, str, str]], defaults: Any) -> None:
    for option, (name, metavar, text) in options.items():
        default = getattr(defaults, name)
        group.add_argument(
            f"--{option}",
            dest=name,
            type=type(default),
            default=default,
            metavar=metavar,
            help=f"{text} (default: {default})",
        )


def run(args: argparse.Namespace) -> int:
    """Predict and print. Raises ValueError naming the option that does not fit, StoreFormatError
    for a folder that is a store and cannot be read."""

    def of(kind: type, **others: Any) -> Any:
        names = {field.name for field in dataclasses.fields(kind)} - set(others)
        return kind(**{name: getattr(args, name) for name in names}, **others)

    shape, stored = shape_of(args.model), None
    if args.model.lower() not in map(str.lower, SHAPES) and is_store(Path(args.model)):
        stored = RecordBytes.of_store(load_manifest(Path(args.model)))
    try:
        inputs = of(PlanInputs, recipe=of(Recipe), hardware=of(Hardware))
        found = answer(shape, inputs, stored)
    except ValueError as error:
        raise ValueError(_as_option(str(error))) from error
    print(json.dumps(as_json(found), indent=2) if args.json else as_text(found))
    return 0


def _as_option(message: str) -> str:
    """A message that begins with a field's name, with its option's instead."""
    name, colon, rest = message.partition(":")
    options = {
        field: option
        for group in (_CLUSTER, _RECIPE, _HARDWARE)
        for option, (field, _, _) in group.items()
    }
    return f"--{options[name]}{colon}{rest}" if name in options else message


def as_json(found: Answer) -> dict[str, Any]:
    """What was asked and what is predicted, as plain values: seconds and bytes."""
    decode, expected = dataclasses.asdict(found.decode), found.estimate
    return {
        "kind": "prediction",
        "model": dataclasses.asdict(found.shape),
        "inputs": dataclasses.asdict(found.inputs),
        # Bytes of a store's mean expert, which then count instead of the inputs' recipe.
        "stored": None if found.stored is None else dataclasses.asdict(found.stored),
        "tokens_per_s": decode.pop("tokens_per_s"),
        "time_to_first_token_s": found.first_token_s,
        **decode,
        "cache_bytes": int(found.system.cache_bytes * found.system.layer_scale),
        "bottleneck": expected.bottleneck,
        "bound_tokens_per_s": found.bound_tokens_per_s,
        "part_s": dict(expected.part_s),
        "closed_form_step_s": expected.step_s,
    }


def as_text(found: Answer) -> str:
    inputs, decode, busy = found.inputs, found.decode, found.decode.busy
    cache_gib = found.system.cache_bytes * found.system.layer_scale / 2**30
    head = [
        {"prediction, not measured": name, "": value}
        for name, value in (
            ("model", f"{found.shape.name} ({found.shape.num_parameters / 1e9:.1f} B weights)"),
            ("sizes from", found.shape.source),
            ("cluster", f"{inputs.num_gpus} GPU, {inputs.num_nodes} memory nodes"),
            ("links", f"{inputs.link_gbps:g} Gbit/s"),
            ("experts", _experts(found)),
            ("tokens/s", f"{decode.tokens_per_s:.1f} at batch {inputs.batch} per GPU"),
            ("a step", f"{decode.step_s * 1e3:.1f} ms"),
            ("time to first token", f"{found.first_token_s:.2f} s for {inputs.prompt} tokens"),
            ("into a GPU", f"{decode.gpu_in_bytes / 1e6:.2f} MB/token"),
            ("out of a GPU", f"{decode.gpu_out_bytes / 1e6:.2f} MB/token"),
            ("out of a node", f"{found.node_out_bytes_mean / 1e6:.3f} MB/token, on average"),
            ("expert cache", f"{cache_gib:.1f} GiB a GPU, {decode.hit_rate:.0%} of records there"),
            ("pairs near data", f"{decode.near_share:.0%}"),
            ("bottleneck", f"{found.estimate.bottleneck}: {found.bound_tokens_per_s:.0f} tokens/s"),
        )
    ]
    simulated = {
        "GPU": f"{busy.gpu:.0%}",
        "GPU links": f"{busy.gpu_link:.0%}",
        "node links": f"{busy.mean_node_link:.0%}, the busiest {busy.node_link:.0%}",
        "node workers": f"{busy.mean_node_worker:.0%}, the busiest {busy.node_worker:.0%}",
    }
    parts = [
        {
            "part": part,
            "ms of a step, closed form": round(seconds * 1e3, 3),
            "busy, simulated": simulated.get(part),
        }
        for part, seconds in found.estimate.part_s.items()
    ]
    return f"{format_table(head)}\n\n{format_table(parts)}"


def _experts(found: Answer) -> str:
    recipe, inputs = found.inputs.recipe, found.inputs
    if found.stored is not None:
        text = f"as stored, {found.stored.codes:,} bytes of codes and {found.stored.factors:,} of"
        return f"{text} factors; Top-{inputs.top_n}, {inputs.near_data}"
    if recipe.bits == 16:
        return f"original bfloat16, {inputs.near_data}"
    return f"{recipe.bits} bits, rank {recipe.rank} for Top-{inputs.top_n}; {inputs.near_data}"
