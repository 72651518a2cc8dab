"""The `moetier` command: finds the subcommand, turns errors into exit codes.

Exit codes: 0 done, 1 the world failed (a damaged store, no network), 2 the caller's mistake,
130 interrupted. A traceback means a mistake of ours.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import logging
import os
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

from expert_store.errors import StoreError

COMMANDS = {
    "fetch": "put smol-moe, a model of real pretrained weights, into the cache",
    "calibrate": "collect what the experts see while the model reads text, for compress",
    "compress": "turn a checkpoint into a store of low-bit experts with compensators",
    "recalibrate": "fit a store's routers again to the original's, after quantising",
    "inspect": "print what a store holds: sizes, bits, ranks, bytes per token",
    "verify": "check every checksum of a store and name what is damaged",
    "eval": "perplexity with expert bytes moved per token, against the original model",
    "report": "one page about stores, Markdown and HTML: fronts, domains, ranks, router",
    "trace": "run a store's model and record where every token goes",
    "replay": "what expert caches find on a recorded trace, against Belady's optimum",
    "study": "what error-bounded experts cost, by depth of layer and heat of expert",
    "plan": "predict speed and bottleneck of a cluster for a model, from the cost model",
    "tune": "find autoscaling settings for a trace, in a simulated cluster",
    "generate": "continue a prompt in this process, without Ray",
    "serve": "start the cluster with its OpenAI-style HTTP endpoint",
    "rollout": "another store for a running cluster, worker after worker, and back",
    "deploy": "manifests for Kubernetes: render them, check them without a cluster",
    "demo": "the whole path once: compress, serve, ask, measure, shut down",
    "doctor": "what this machine has and what moetier would do with it",
}

EXTRAS = {"openai": "demo", "matplotlib": "report", "kubernetes_validate": "deploy"}
"""Packages that only some commands import -> the extra that installs them."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand and return its exit code. argv defaults to the process' own."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(overview())
        return 0
    if arguments[0] in ("-V", "--version"):
        print(f"moetier {installed_version()}")
        return 0
    name = arguments[0]
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        return complain(f"unknown command {name!r}{hint} (moetier --help lists them)", 2)
    try:
        return run_command(name, arguments[1:])
    except BrokenPipeError:
        # The reader (head, less) has left: point stdout away so that the exit flush cannot fail.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except ValueError as error:
        return complain(str(error), 2)
    except (StoreError, OSError) as error:
        return complain(str(error), 1)
    except KeyboardInterrupt:
        return complain("interrupted", 130)


def run_command(name: str, arguments: Sequence[str]) -> int:
    """Parse and run one known subcommand.

    Its module is imported here: `moetier --help` must not wait for torch. Raises ValueError when a
    package of an extra is not installed.
    """
    try:
        module = importlib.import_module(f"cluster.commands.{name}")
    except ModuleNotFoundError as error:
        if error.name not in EXTRAS:
            raise
        raise ValueError(
            f"moetier {name} needs the package {error.name}, which is not installed; "
            f"run pip install 'moetier[{EXTRAS[error.name]}]'"
        ) from error
    parser = argparse.ArgumentParser(
        prog=f"moetier {name}",
        description=module.HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.add_arguments(parser)
    code: int = module.run(parser.parse_args(arguments))
    return code


def overview() -> str:
    """The text of `moetier --help`."""
    width = max(map(len, COMMANDS))
    lines = [
        "usage: moetier COMMAND [options]",
        "",
        "Serve Mixture-of-Experts models whose experts live in a memory tier as low-bit codes",
        "plus low-rank compensators.",
        "",
        "commands:",
        *(f"  {name:<{width}}  {text}" for name, text in COMMANDS.items()),
        "",
        "`moetier COMMAND --help` explains one. Where no model or store is given, a command takes",
        "the bundled mixtral-mini.",
    ]
    return "\n".join(lines)


def installed_version() -> str:
    """The distribution's version, or "unknown" when run from a bare checkout."""
    try:
        return version("moetier")
    except PackageNotFoundError:
        return "unknown"


def complain(message: str, code: int) -> int:
    print(f"moetier: error: {message}", file=sys.stderr)
    return code
