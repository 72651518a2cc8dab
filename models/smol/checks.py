"""Measures smol-moe against its dense base on held-out text: `python -m models.smol.checks --help`.

Perplexity and use of experts per domain, router weights, and what each chosen expert is worth.

Legend: D domains, L layers, E experts.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.smol.base import load_base
from models.smol.corpus import Domain, even_windows, read_domains
from models.smol.deltas import LayerDeltas, read_deltas
from models.smol.forward import Adjust, Routing, TrainingModel
from models.smol.recipe import file_sha256

WINDOW = 256  # tokens


@dataclasses.dataclass(frozen=True, slots=True)
class Measured:
    """One model on one domain."""

    nats: float  # per token
    nats_error: float  # standard error over windows
    use_LE: Tensor  # share of the choices that went to each expert
    weights_LK: Tensor  # mean normalised router weights


def main(arguments: Sequence[str] | None = None) -> None:
    args = _parser().parse_args(arguments)
    torch.set_num_threads(args.threads)
    base = load_base(args.base)
    end_id = base.tokenizer.convert_tokens_to_ids("<|endoftext|>")
    domains = read_domains(args.held_out, base.tokenizer, end_id, 10**9, seed=1)
    layers = [rounded(layer) for layer in read_deltas(args.run / "deltas.safetensors")]
    report = measure(TrainingModel(base), layers, domains, args.windows)
    state = torch.load(args.run / "state.pt")
    told = {
        "deltas_sha256": file_sha256(args.run / "deltas.safetensors"),
        "model_sha256": file_sha256(args.model / "model.safetensors"),
        "training": {
            "steps": state["step"],
            "tokens": state["tokens"],
            "minutes": round(state["seconds"] / 60, 1),
            "log": state["log"],
        },
        "checks": report,
    }
    args.report.write_text(as_text(told))


def as_text(report: dict[str, Any]) -> str:
    """JSON with one value a line, but lists of numbers on one line."""
    rows = re.compile(r"\[\s+([^][{}]*?)\s+\]")
    return rows.sub(
        lambda row: "[" + " ".join(row[1].split()) + "]", json.dumps(report, indent=1) + "\n"
    )


def measure(
    model: TrainingModel, layers: Sequence[LayerDeltas], domains: Sequence[Domain], windows: int
) -> dict[str, Any]:
    """The whole report, as JSON values."""
    batches = {domain.name: even_windows(domain, windows, WINDOW) for domain in domains}
    dense, ours = (
        {name: run(model, deltas, batch) for name, batch in batches.items()}
        for deltas in (None, layers)
    )
    few = {name: batch[: max(1, windows // 4)] for name, batch in batches.items()}
    whole = {name: run(model, layers, batch).nats for name, batch in few.items()}

    def costs(adjust: Adjust) -> float:
        """Mean over domains of the nats lost under changed router weights."""
        lost = [run(model, layers, few[name], adjust).nats - whole[name] for name in few]
        return round(sum(lost) / len(lost), 4)

    uses_DLE = torch.stack([each.use_LE for each in ours.values()])
    return {
        "held_out": {"windows": windows, "window_tokens": WINDOW},
        "domains": {name: _row(dense[name], ours[name]) for name in batches},
        "mean_nats": {
            "dense": round(_mean([each.nats for each in dense.values()]), 4),
            "smol_moe": round(_mean([each.nats for each in ours.values()]), 4),
        },
        "router_weights": [
            round(float(value), 3)
            for value in torch.stack([each.weights_LK for each in ours.values()]).mean((0, 1))
        ],
        "use_variation_by_layer": [round(float(v), 3) for v in variation(uses_DLE)],
        "least_and_most_used": [
            round(float(value), 3) for value in torch.aminmax(uses_DLE.mean(0))
        ],
        "nats_lost": {
            "without_second": costs(keep(0)),
            "without_second_rescaled": costs(keep(0, rescale=True)),
            "without_first": costs(keep(1)),
            "without_first_rescaled": costs(keep(1, rescale=True)),
        },
    }


def run(
    model: TrainingModel,
    layers: Sequence[LayerDeltas] | None,
    windows: Tensor,
    adjust: Adjust | None = None,
) -> Measured:
    """`windows` [B, S + 1] through the model, a few at a time; `layers` None is the dense base."""
    losses, uses, weights = [], [], []
    for few in windows.split(4):
        with torch.no_grad():
            hidden, routings = model.hidden(few[:, :-1], layers, adjust=adjust)
            nats = model.losses(hidden, few[:, 1:].reshape(-1))
        losses += nats.view(len(few), -1).mean(1).tolist()
        if routings:
            uses.append(torch.stack([_use(each) for each in routings]))
            weights.append(torch.stack([each.weights.mean(0) for each in routings]))
    values = torch.tensor(losses)
    error = float(values.std() / math.sqrt(len(losses))) if len(losses) > 1 else math.nan
    use, weight = (
        torch.stack(each).mean(0) if each else torch.zeros(0) for each in (uses, weights)
    )
    return Measured(float(values.mean()), error, use, weight)


def keep(slot: int, *, rescale: bool = False) -> Adjust:
    """Only the chosen expert of one slot stays; `rescale` gives it the other's weight as well."""

    def adjust(routing: Routing) -> Routing:
        weights = torch.zeros_like(routing.weights)
        weights[:, slot] = 1.0 if rescale else routing.weights[:, slot]
        return routing._replace(weights=weights)

    return adjust


def variation(uses_DLE: Tensor) -> Tensor:
    """Total variation between two domains' use of the experts: [L], mean over pairs of domains."""
    first, second = torch.triu_indices(len(uses_DLE), len(uses_DLE), offset=1)
    return (uses_DLE[first] - uses_DLE[second]).abs().sum(-1).mean(0) / 2


def rounded(layer: LayerDeltas) -> LayerDeltas:
    """Stored values as float32, which the router computes in."""
    return LayerDeltas(
        layer.router.float(),
        {name: value.float() for name, value in layer.right.items()},
        {name: value.float() for name, value in layer.left_t.items()},
    )


def _use(routing: Routing) -> Tensor:
    num_experts = routing.probabilities.shape[-1]
    chosen = routing.chosen.reshape(-1)
    return torch.bincount(chosen, minlength=num_experts) / len(chosen)


def _row(dense: Measured, ours: Measured) -> dict[str, Any]:
    return {
        "perplexity_dense": round(math.exp(dense.nats), 3),
        "perplexity_smol_moe": round(math.exp(ours.nats), 3),
        "more_nats": round(ours.nats - dense.nats, 4),
        "nats_error": round(ours.nats_error, 4),
        "router_weights": [round(float(value), 3) for value in ours.weights_LK.mean(0)],
        "use_by_layer": [[round(float(v), 3) for v in layer] for layer in ours.use_LE],
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", type=Path, required=True, help="the GGUF file of the dense model")
    parser.add_argument("--run", type=Path, required=True, help="what the training wrote")
    parser.add_argument("--model", type=Path, required=True, help="folder assembled from it")
    parser.add_argument("--held-out", type=Path, required=True, help="folder of <domain>.txt")
    parser.add_argument("--report", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--windows", type=int, default=32, help="of each domain")
    parser.add_argument("--threads", type=int, default=1)
    return parser


if __name__ == "__main__":
    main()
