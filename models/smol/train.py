"""Trains the deltas and routers of smol-moe on the CPU: `python -m models.smol.train --help`.

The base stays as it is. A run ends by the clock, saves as it goes and goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from models.smol import NUM_EXPERTS, RANK
from models.smol.base import load_base
from models.smol.corpus import Domain, even_windows, random_windows, read_domains
from models.smol.deltas import LayerDeltas, layers_of, named_tensors, new_layer, write_deltas
from models.smol.forward import Routing, TrainingModel, balance_loss
from models.smol.routers import first_router

logger = logging.getLogger(__name__)

WINDOW = 192  # tokens
WARM_UP_STEPS = 20
LAST_RATE = 0.05  # of the peak, at the end of the cosine
RIGHT_RATE = 0.5  # of left_t's rate
ROUTER_RATE = 0.1
BALANCE = 0.01  # weight of the balance loss
SAMPLE_WINDOWS = 12  # of each domain, to make the first routers from
CHARS_PER_DOMAIN = 1_600_000


@dataclass(slots=True)
class Run:
    """Where a run is: what is saved and gone on from."""

    layers: list[LayerDeltas]
    optimizer: torch.optim.Optimizer
    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    log: list[dict[str, Any]] = field(default_factory=list)


def main(arguments: Sequence[str] | None = None) -> None:
    args = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(args.threads)
    base = load_base(args.base)
    end_id = base.tokenizer.convert_tokens_to_ids("<|endoftext|>")
    training = read_domains(args.corpus, base.tokenizer, end_id, CHARS_PER_DOMAIN, args.seed)
    held_out = read_domains(args.held_out, base.tokenizer, end_id, 100_000, args.seed)
    for domain in training:
        logger.info("%s: %d tokens to train on", domain.name, len(domain.tokens))
    model = TrainingModel(base)
    run = start(model, training, base.config.intermediate_size, args)
    train(model, run, training, held_out, args)


def train(
    model: TrainingModel,
    run: Run,
    training: list[Domain],
    held_out: list[Domain],
    args: argparse.Namespace,
) -> None:
    """Steps until `args.minutes` of them are done or `args.steps`, saving every few minutes."""
    parameters = [value for layer in run.layers for _, value in layer.tensors()]
    saved_s, mean_loss = run.seconds, float("nan")
    while (progress := _progress(run, args)) < 1.0:
        start_s = time.perf_counter()
        _set_rates(run.optimizer, run.step, progress, args.rate)
        rng = np.random.default_rng([args.seed, run.step])
        windows = random_windows(training, args.per_domain, WINDOW, rng)
        hidden, routings = model.hidden(windows[:, :-1], run.layers)
        loss = model.losses(hidden, windows[:, 1:].reshape(-1)).mean()
        balance = balance_loss(routings)
        (loss + BALANCE * balance).backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        run.optimizer.step()
        run.optimizer.zero_grad(set_to_none=True)
        run.step += 1
        run.tokens += windows[:, 1:].numel()
        run.seconds += time.perf_counter() - start_s
        value = float(loss.detach())
        mean_loss = value if math.isnan(mean_loss) else 0.95 * mean_loss + 0.05 * value
        if run.step % 5 == 0:
            logger.info(
                "step %d, %.1f min, loss %.3f (mean %.3f), balance %.3f, first weight %.3f, "
                "gradient %.2f, %.0f tokens/s",
                run.step,
                run.seconds / 60,
                value,
                mean_loss,
                float(balance.detach()),
                first_weight(routings),
                float(norm),
                windows.shape[0] * WINDOW / (time.perf_counter() - start_s),
            )
        if run.seconds - saved_s > args.save_minutes * 60:
            saved_s = run.seconds
            save(model, run, held_out, args)
    save(model, run, held_out, args)


def save(model: TrainingModel, run: Run, held_out: list[Domain], args: argparse.Namespace) -> None:
    """Write state and deltas, each whole or not at all, then measure them."""
    state = {
        "deltas": named_tensors(run.layers),
        "optimizer": run.optimizer.state_dict(),
        "step": run.step,
        "tokens": run.tokens,
        "seconds": run.seconds,
        "log": run.log,
    }
    torch.save(state, args.out / "state.tmp")
    os.replace(args.out / "state.tmp", args.out / "state.pt")
    note = {"steps": str(run.step), "minutes": f"{run.seconds / 60:.1f}"}
    write_deltas(args.out / "deltas.tmp", run.layers, note)
    os.replace(args.out / "deltas.tmp", args.out / "deltas.safetensors")
    nats = {
        domain.name: round(mean_nats(model, run.layers, even_windows(domain, 6, WINDOW)), 4)
        for domain in held_out
    }
    run.log.append({"step": run.step, "minutes": round(run.seconds / 60, 1), "nats": nats})
    logger.info("saved at step %d; held-out nats per token: %s", run.step, nats)


def mean_nats(
    model: TrainingModel, layers: Sequence[LayerDeltas] | None, windows: torch.Tensor
) -> float:
    """Nats per token of `windows` [B, S + 1]; `layers` None is the dense base."""
    with torch.no_grad():
        hidden, _ = model.hidden(windows[:, :-1], layers)
        return float(model.losses(hidden, windows[:, 1:].reshape(-1)).mean())


def first_weight(routings: Sequence[Routing]) -> float:
    """Mean normalised router weight of the first expert, over tokens and layers."""
    return float(torch.stack([each.weights[:, 0].detach().mean() for each in routings]).mean())


def first_layers(
    model: TrainingModel, domains: list[Domain], ffn: int, seed: int
) -> list[LayerDeltas]:
    """Layers that compute what the base does, with routers made from a balanced sample."""
    rng = np.random.default_rng([seed, SAMPLE_WINDOWS])
    windows = random_windows(domains, SAMPLE_WINDOWS, WINDOW, rng)
    domain_T = torch.arange(len(domains)).repeat_interleave(SAMPLE_WINDOWS * WINDOW)
    layers: list[LayerDeltas] = []

    def make(number: int, inputs_TH: torch.Tensor) -> None:
        router = first_router(inputs_TH, domain_T, NUM_EXPERTS, seed + number)
        layers.append(new_layer(router, ffn, RANK, seed + number))

    with torch.no_grad():
        model.hidden(windows[:, :-1], None, make)
    return layers


def start(model: TrainingModel, domains: list[Domain], ffn: int, args: argparse.Namespace) -> Run:
    """A new run with deltas that change nothing, or the one that `args.out` holds the state of."""
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "state.pt"
    if not file.exists():
        run = _new_run(first_layers(model, domains, ffn, args.seed), args.rate)
        write_deltas(args.out / "deltas.safetensors", run.layers, {"steps": "0"})
        logger.info("made the first routers")
        return run
    state = torch.load(file)
    run = _new_run(layers_of(state["deltas"], str(file)), args.rate)
    run.optimizer.load_state_dict(state["optimizer"])
    run.step, run.tokens = state["step"], state["tokens"]
    run.seconds, run.log = state["seconds"], state["log"]
    logger.info("going on at step %d, %.1f minutes", run.step, run.seconds / 60)
    return run


def _new_run(layers: list[LayerDeltas], rate: float) -> Run:
    groups = [
        {"params": [v for each in layers for v in each.left_t.values()], "scale": 1.0},
        {"params": [v for each in layers for v in each.right.values()], "scale": RIGHT_RATE},
        {"params": [each.router for each in layers], "scale": ROUTER_RATE},
    ]
    for group in groups:
        for value in group["params"]:  # type: ignore[attr-defined]
            value.requires_grad_()
    return Run(layers, torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.97), weight_decay=0.0))


def _progress(run: Run, args: argparse.Namespace) -> float:
    return run.step / args.steps if args.steps else run.seconds / (args.minutes * 60)


def _set_rates(optimizer: torch.optim.Optimizer, step: int, progress: float, peak: float) -> None:
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    rate = peak * min(1.0, (step + 1) / WARM_UP_STEPS) * (LAST_RATE + (1 - LAST_RATE) * cosine)
    for group in optimizer.param_groups:
        group["lr"] = rate * group["scale"]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", type=Path, required=True, help="the GGUF file of the dense model")
    parser.add_argument("--corpus", type=Path, required=True, help="folder of <domain>.txt.xz")
    parser.add_argument("--held-out", type=Path, required=True, help="folder of <domain>.txt")
    parser.add_argument("--out", type=Path, required=True, help="folder for state and deltas")
    parser.add_argument("--minutes", type=float, default=55.0, help="of stepping")
    parser.add_argument("--steps", type=int, default=0, help="instead of minutes")
    parser.add_argument("--per-domain", type=int, default=1, help="windows of each domain a step")
    parser.add_argument("--rate", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--save-minutes", type=float, default=5.0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=1)
    return parser


if __name__ == "__main__":
    main()
