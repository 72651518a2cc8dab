"""Every check of a deployment, run over its documents: what was checked, and what was found."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.config import ClusterConfig
from cluster.deploy.cel_rules import can_evaluate, cel_problems, rules
from cluster.deploy.network_rules import network_problems
from cluster.deploy.schemas import core_problems, monitoring_problems, template_problems
from cluster.deploy.serve_schema import args_config, serve_problems
from cluster.deploy.whole_rules import whole_problems
from cluster.manifests import Kind, raw_crds, schema_problems, serve_config, strict_schema, title
from cluster.metrics import render
from cluster.operator_rules import rayservice_problems
from cluster.pod_rules import pod_problems
from cluster.snapshot import ClusterSnapshot

Mapped = Mapping[str, Any]
Schema = dict[str, Any]
Rule = Callable[[Mapped], Iterable[str]]


@dataclass(frozen=True, slots=True)
class Check:
    """One check's outcome. `not_run` says why it could not be made; then it found nothing."""

    name: str
    problems: tuple[str, ...] = ()
    not_run: str = ""
    note: str = ""

    @property
    def outcome(self) -> str:
        if self.not_run:
            return f"not run: {self.not_run}"
        found = f"{len(self.problems)} problems" if self.problems else "passed"
        return f"{found} ({self.note})" if self.note else found


@dataclass(frozen=True, slots=True)
class Crds:
    """The schemas of KubeRay's CRDs: as they are, for CEL, and made strict."""

    source: str
    raw: Mapping[Kind, Schema]
    strict: Mapping[Kind, Schema]


def read_crds(folder: Path) -> Crds | None:
    """None where there is no such folder. Raises ValueError for one without CRDs."""
    if not folder.is_dir():
        return None
    raw = raw_crds(folder)
    return Crds(str(folder), raw, {kind: strict_schema(schema) for kind, schema in raw.items()})


def all_checks(documents: Sequence[Mapped], crds: Crds | None) -> list[Check]:
    """All checks of one overlay's documents, in a fixed order."""
    services = [each for each in documents if each["kind"] == "RayService"]
    count = f"{len(documents)} documents"
    return [
        *crd_checks(documents, crds),
        Check("Kubernetes' schemas, strict", tuple(core_problems(documents)), note=count),
        _checked("pods inside the RayService, strict", lambda: template_problems(documents)),
        Check("Prometheus' kinds, small schema of ours", tuple(monitoring_problems(documents))),
        _each("rules of KubeRay's operator", rayservice_problems, services),
        _each("pods: security, images, limits, /dev/shm", pod_problems, documents),
        *service_checks(documents, services),
    ]


def crd_checks(documents: Sequence[Mapped], crds: Crds | None) -> list[Check]:
    name, rules_name = "KubeRay's CRDs, strict, defaults applied", "rules of the CRDs in CEL"
    if crds is None:
        reason = "no folder with KubeRay's CRDs; give it with --crds"
        return [Check(name, not_run=reason), Check(rules_name, not_run=reason)]
    found, changes, count = [], 0, 0
    broken = [problem for each in documents for problem in schema_problems(each, crds.strict)]
    for document in documents:
        schema = crds.raw.get((document["apiVersion"], document["kind"]))
        if schema is None:
            if document["apiVersion"].startswith("ray.io/"):
                broken.append(
                    f"{title(document)}: no CRD of {document['apiVersion']} has this kind"
                )
            continue
        applying = list(rules(document, schema))
        changes += sum(rule.is_of_changes for rule in applying)
        count += len(applying)
        if can_evaluate():
            found += [f"{title(document)}: {problem}" for problem in cel_problems(document, schema)]
    note = f"{count} apply, {changes} of them only to changes"
    if can_evaluate():
        return [Check(name, tuple(broken)), Check(rules_name, tuple(found), note=note)]
    reason = f"cel-python is not installed (pip install 'moetier[deploy]'); {note}"
    return [Check(name, tuple(broken)), Check(rules_name, not_run=reason)]


def service_checks(documents: Sequence[Mapped], services: Sequence[Mapped]) -> list[Check]:
    """What needs the config that is in a RayService's text."""
    names = ("serveConfigV2: Serve's schema, our args", "network policies and ports")
    whole = "budgets, drain, placement, secrets, dashboards"
    if len(services) != 1:
        problem = f"got {len(services)} RayServices, expected one"
        return [Check(names[0], (problem,)), *_unreadable(names[1], whole)]
    (service,) = services
    problems: tuple[str, ...] = ()
    try:
        config = serve_config(service)
        problems = tuple(serve_problems(config))
        args: ClusterConfig = args_config(config)
    except ValueError as error:
        return [Check(names[0], problems or (str(error),)), *_unreadable(names[1], whole)]
    metrics = metric_names()
    return [
        Check(names[0], problems),
        _checked(names[1], lambda: network_problems(documents, service, args)),
        _checked(whole, lambda: whole_problems(documents, service, args, metrics=metrics)),
    ]


def metric_names() -> frozenset[str]:
    """The names of the metrics that a server tells."""
    lines = render(ClusterSnapshot((), (), ())).splitlines()
    return frozenset(line.split()[2] for line in lines if line.startswith("# TYPE "))


def _unreadable(*names: str) -> list[Check]:
    return [Check(name, not_run="the config in serveConfigV2 cannot be read") for name in names]


def _each(name: str, rule: Rule, documents: Sequence[Mapped]) -> Check:
    return _checked(name, lambda: [f"{title(d)}: {p}" for d in documents for p in rule(d)])


def _checked(name: str, problems: Callable[[], Iterable[str]]) -> Check:
    """The check, also of documents whose shape it does not expect: that is then its finding."""
    try:
        return Check(name, tuple(problems()))
    except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
        problem = (
            f"a part has another shape than Kubernetes expects ({error}); fix the schema first"
        )
        return Check(name, (problem,))
