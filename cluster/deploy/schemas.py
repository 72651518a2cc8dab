"""Schemas of kinds that are not KubeRay's: Kubernetes' own, and a small one for monitors.

Kubernetes' are those of PyPI's kubernetes-validate, strict. The CRDs of Prometheus' operator are
not at hand: MONITORING names only the fields that we use, which catches typing errors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jsonschema
import kubernetes_validate

from cluster.manifests import title
from cluster.pod_rules import pods

Mapped = Mapping[str, Any]

KUBERNETES = "1.32"
MONITORING_API = "monitoring.coreos.com/v1"
RAY_API = "ray.io/v1"

_SELECTOR = {
    "type": "object",
    "properties": {"matchLabels": {"type": "object", "additionalProperties": {"type": "string"}}},
    "required": ["matchLabels"],
    "additionalProperties": False,
}
_DURATION = {"type": "string", "pattern": r"^(\d+(ms|[smh]))+$"}
_ENDPOINTS = {
    "type": "array",
    "minItems": 1,
    "items": {
        "type": "object",
        "properties": {
            "port": {"type": "string"},
            "path": {"type": "string", "pattern": "^/"},
            "interval": _DURATION,
            "scrapeTimeout": _DURATION,
        },
        "required": ["port"],
        "additionalProperties": False,
    },
}


def _monitor(endpoints: str) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {"selector": _SELECTOR, endpoints: _ENDPOINTS},
        "required": ["selector", endpoints],
        "additionalProperties": False,
    }


MONITORING = {
    "ServiceMonitor": _monitor("endpoints"),
    "PodMonitor": _monitor("podMetricsEndpoints"),
}


def core_problems(documents: Sequence[Mapped]) -> list[str]:
    """Breaches of Kubernetes' own schemas; a kind that it does not know is one."""
    return [
        f"{title(document)}: {problem}"
        for document in documents
        if document["apiVersion"] not in (RAY_API, MONITORING_API)
        for problem in _core(document)
    ]


def template_problems(documents: Sequence[Mapped]) -> list[str]:
    """The same for the pods inside the RayService, which its CRD leaves open in places."""
    found = []
    for document in documents:
        if document["apiVersion"] != RAY_API:
            continue
        for place, pod, _ in pods(document):
            whole = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": pod}
            found += [f"{title(document)}: {place}: {problem}" for problem in _core(whole)]
    return found


def monitoring_problems(documents: Sequence[Mapped]) -> list[str]:
    """Breaches of MONITORING."""
    found = []
    for document in documents:
        if document["apiVersion"] != MONITORING_API:
            continue
        schema = MONITORING.get(document["kind"])
        if schema is None:
            found.append(f"{title(document)}: a kind that this check does not know")
            continue
        errors = jsonschema.Draft202012Validator(schema).iter_errors(document.get("spec"))
        found += [f"{title(document)}: spec{e.json_path[1:]}: {e.message[:300]}" for e in errors]
    return found


def _core(document: Mapped) -> list[str]:
    try:
        kubernetes_validate.validate(document, KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as error:
        return [f"{'.'.join(map(str, error.path))}: {error.message[:300]}"]
    except (kubernetes_validate.SchemaNotFoundError, kubernetes_validate.InvalidSchemaError) as e:
        return [f"{document['apiVersion']} {document['kind']}: no schema of Kubernetes: {e}"]
    return []
