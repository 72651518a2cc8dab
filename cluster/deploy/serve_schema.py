"""Serve's own schema over a Serve config. The one module of the checks that imports Ray."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import ValidationError
from ray.serve.schema import ServeDeploySchema

from cluster.config import ClusterConfig, config_from_mapping

IMPORT_PATH = "cluster.app:build"


def serve_problems(config: Mapping[str, Any]) -> Iterator[str]:
    """What Ray Serve would refuse, and args that our config parser would."""
    try:
        ServeDeploySchema.model_validate(config)
    except ValidationError as error:
        for found in error.errors():
            place = ".".join(map(str, found["loc"]))
            yield f"serveConfigV2: {place}: {found['msg']}"
    try:
        args_config(config)
    except ValueError as error:
        yield f"serveConfigV2: {error}"


def args_config(config: Mapping[str, Any]) -> ClusterConfig:
    """The cluster config in the args of our application, resolved.

    Raises ValueError when no application is ours, and for args that are wrong.
    """
    for application in config["applications"]:
        if application["import_path"] == IMPORT_PATH:
            args = application.get("args") or {}
            return config_from_mapping(args, source="args").resolve()
    paths = [application["import_path"] for application in config["applications"]]
    raise ValueError(f"import_path: got {', '.join(paths)}, expected {IMPORT_PATH}")
