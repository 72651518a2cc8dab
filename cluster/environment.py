"""Every environment variable that moetier reads or sets, in one place.

- MOETIER_CACHE: folder for what can be made again; else XDG_CACHE_HOME/moetier, ~/.cache/moetier.
- MOETIER_CONFIG: the cluster config of `cluster.app:app`, where no argument can be given.
"""

from __future__ import annotations

import os
from pathlib import Path

RAY_DEFAULTS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_SERVE_LOG_TO_STDERR": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DEDUP_LOGS": "1",
}
"""Set before Ray is imported unless the user set them: no telemetry, no chatter on the terminal."""


def cache_folder() -> Path:
    """Where moetier keeps what it can make again. Not created here."""
    if chosen := os.environ.get("MOETIER_CACHE"):
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "moetier"


def default_store() -> Path:
    """The store of the bundled model, made by `moetier demo`."""
    return cache_folder() / "stores" / "mixtral-mini"


def config_path() -> Path | None:
    """The cluster config that MOETIER_CONFIG names, if it does."""
    chosen = os.environ.get("MOETIER_CONFIG")
    return Path(chosen).expanduser() if chosen else None


def prepare_for_ray() -> None:
    """Put `RAY_DEFAULTS` in place where the user said nothing. Call it before `import ray`."""
    for name, value in RAY_DEFAULTS.items():
        os.environ.setdefault(name, value)
