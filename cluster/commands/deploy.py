"""`moetier deploy render|validate`: manifests for kubectl, filled in; and every check over them."""

from __future__ import annotations

import argparse
import datetime
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from cluster.deploy.checks import Check, Crds, all_checks, read_crds
from cluster.deploy.credentials import GENERATED, secret_documents, write_secrets
from cluster.deploy.kustomize import BASE, DEFAULT_FOLDER, overlays, render
from cluster.deploy.page import validation_page
from cluster.deploy.sizes import node_memory
from cluster.deploy.values import KEYS, parse_settings, shm_bytes, with_settings
from cluster.deploy.whole_rules import needed_secrets
from cluster.manifests import parse_documents
from cluster.plan.inputs import Recipe
from cluster.table import format_table

DEFAULT_CRDS = DEFAULT_FOLDER.parent.parent / "shared" / "kuberay"
MAX_FILE_BYTES = 16 << 20

HELP = """Manifests for a Kubernetes cluster with the KubeRay operator.

  moetier deploy render --overlay gpu-small --set image=REGISTRY/moetier --secrets my.secrets.yaml
  moetier deploy validate --overlay gpu-small
  moetier deploy validate rendered.yaml

render prints the documents, for kubectl apply -f -. validate checks them without a cluster. What
the overlays are, and how to run them: deploy/README.md and deploy/OPERATING.md.

Exit codes: 0 when nothing was found, 1 when a check found something, 2 for an option that is wrong
or a file that cannot be read."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="render|validate")
    keys = "\n".join(f"  {key:<14} {text}" for key, (text, _) in KEYS.items())
    filling = actions.add_parser(
        "render",
        help="print an overlay's documents, filled in",
        description=f"Print an overlay's documents, filled in.\n\nkeys of --set:\n{keys}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_common(filling)
    filling.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="settings")
    filling.add_argument(
        "--size-for",
        metavar="MODEL",
        help="compute the memory of memory pods for this store's folder, or for a model by the "
        "name that moetier plan knows",
    )
    filling.add_argument("--bits", type=int, default=Recipe().bits, help="of a model's codes")
    filling.add_argument("--rank", type=int, default=Recipe().rank, help="of its compensators")
    filling.add_argument("--secrets", type=Path, metavar="FILE", help="write new Secrets there")
    filling.add_argument("--output", type=Path, metavar="FILE", help="instead of printing")
    checking = actions.add_parser("validate", help="check documents without a cluster")
    _add_common(checking)
    checking.add_argument("file", nargs="?", type=Path, help="rendered documents, or - for stdin")
    checking.add_argument("--all", action="store_true", help="base and every overlay")
    checking.add_argument(
        "--crds", type=Path, default=DEFAULT_CRDS, help="folder with KubeRay's CRDs"
    )
    checking.add_argument("--output", type=Path, metavar="FILE", help="also write a page there")


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--overlay", metavar="NAME", help=f"default: {BASE}")
    parser.add_argument(
        "--folder", type=Path, default=DEFAULT_FOLDER, help="moetier's deploy folder"
    )


def run(args: argparse.Namespace) -> int:
    """Raises ValueError for options that are wrong and documents that cannot be read."""
    return run_render(args) if args.action == "render" else run_validate(args)


def run_render(args: argparse.Namespace) -> int:
    """Print or write the documents, and on stderr what is still to do."""
    settings = parse_settings(args.settings)
    documents = render(args.folder, args.overlay or BASE)
    if args.size_for:
        if "memory" in settings:
            raise ValueError("--size-for: memory is already given by --set")
        recipe = Recipe(bits=args.bits, rank=args.rank)
        memory = node_memory(args.size_for, recipe, shm_bytes=shm_bytes(documents))
        settings["memory"] = memory.quantity
        _tell(
            f"memory {memory.quantity}: experts {memory.store_bytes} bytes ({memory.source}), "
            f"/dev/shm {memory.shm_bytes}, headroom {memory.headroom_bytes}"
        )
    documents = with_settings(documents, settings)
    needed = needed_secrets(documents)
    # A Redis of one's own has its password already.
    ours = [each for each in GENERATED if not (each == "moetier-redis" and "redis" in settings)]
    if args.secrets is not None:
        made = secret_documents(
            [pair for pair in needed if pair[0] in ours], namespace=settings.get("namespace")
        )
        if not made:
            raise ValueError("--secrets: this overlay asks for none that could be made up")
        write_secrets(args.secrets, made)
        _tell(f"{args.secrets}: new Secrets; apply them first, and keep the file out of git")
    for name in sorted({name for name, _ in needed}):
        if args.secrets is None or name not in ours:
            keys = ", ".join(key for other, key in needed if other == name)
            _tell(f"needs Secret {name} ({keys})")
    text = yaml.dump_all(documents, Dumper=_Dumper, sort_keys=False, width=100)
    if args.output is None:
        sys.stdout.write(text)
    else:
        args.output.write_text(text, encoding="utf-8")
    return 0


def run_validate(args: argparse.Namespace) -> int:
    """Print a table of checks with what they found."""
    if sum((args.file is not None, args.overlay is not None, args.all)) > 1:
        raise ValueError("validate: give one of FILE, --overlay and --all")
    crds = read_crds(args.crds)
    found: dict[str, list[Check]] = {}
    if args.file is not None:
        found[str(args.file)] = _checked(parse_documents(read_text(args.file)), crds)
    else:
        names = overlays(args.folder) if args.all else (args.overlay or BASE,)
        for name in names:
            found[name] = _checked(render(args.folder, name), crds)
    for name, checks in found.items():
        print(f"{name}\n{format_table([{'check': c.name, '': c.outcome} for c in checks])}")
        for problem in (problem for check in checks for problem in check.problems):
            print(f"  {problem}")
        print()
    if args.output is not None:
        today = datetime.datetime.now(datetime.UTC).date().isoformat()
        page = validation_page(found, crds.source if crds else None, date=today)
        args.output.write_text(page, encoding="utf-8")
    count = sum(len(check.problems) for checks in found.values() for check in checks)
    skipped = sum(bool(check.not_run) for checks in found.values() for check in checks)
    print(f"{count} problems" + (f"; {skipped} checks were not run" if skipped else ""))
    return 1 if count else 0


def _checked(documents: Sequence[dict[str, Any]], crds: Crds | None) -> list[Check]:
    if not documents:
        raise ValueError("no documents: nothing to check")
    return all_checks(documents, crds)


def read_text(path: Path) -> str:
    """The text of a file, or of stdin for "-". Raises ValueError for what is none, or too large."""
    try:
        if str(path) == "-":
            return sys.stdin.read(MAX_FILE_BYTES)
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ValueError(f"{path}: over {MAX_FILE_BYTES} bytes; not manifests")
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot read it: {error}") from error


def _tell(message: str) -> None:
    print(message, file=sys.stderr)


class _Dumper(yaml.SafeDumper):
    """Texts of several lines as blocks, and no aliases."""

    def ignore_aliases(self, data: object) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)
