"""The one configuration of a cluster: a YAML file with a section per room, read strictly.

Composes the rooms' own dataclasses and what is true only of them together. Starts nothing.
"""

from __future__ import annotations

import dataclasses
import textwrap
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml

from cluster.autoscaling_settings import AutoscalingSettings
from cluster.environment import default_store
from cluster.settings import (
    DirectorySettings,
    HttpSettings,
    NdpSettings,
    ReplicaSettings,
    StoreSettings,
)
from cluster.strict import build, field_texts, parse_yaml
from gpu_worker.config import WorkerConfig

MAX_CONFIG_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class ClusterConfig:
    """A whole cluster.

    - model: name of the model that clients see and must ask for; "auto" is the store's own name.
    - store: the expert store and the actors that hold it.
    - ndp: near-data workers: they run low-bit experts beside the store.
    - worker: what one GPU worker does with its device.
    - replicas: the GPU workers as a Serve deployment.
    - http: the HTTP endpoint.
    - directory: who knows which endpoint serves which part of the store.
    """

    model: str = "auto"
    store: StoreSettings = field(default_factory=StoreSettings)
    ndp: NdpSettings = field(default_factory=NdpSettings)
    worker: WorkerConfig = field(default_factory=WorkerConfig)
    replicas: ReplicaSettings = field(default_factory=ReplicaSettings)
    http: HttpSettings = field(default_factory=HttpSettings)
    directory: DirectorySettings = field(default_factory=DirectorySettings)

    def __post_init__(self) -> None:
        if not self.model.strip():
            raise ValueError("model: got an empty text, expected a name or auto")
        if self.worker.near_data != "off" and not self.ndp.enabled:
            raise ValueError(
                f"worker.near_data: got {self.worker.near_data}, but ndp.enabled is false; "
                "set ndp.enabled to true or worker.near_data to off"
            )

    def resolve(self) -> ClusterConfig:
        """This config with what can be known before anything starts put in place of "auto".

        What depends on a worker's own machine (device, dtype) is resolved there, and logged.
        """
        path = default_store() if self.store.path == "auto" else Path(self.store.path).expanduser()
        worker = self.worker
        if self.ndp.enabled and worker.near_data == "off":
            worker = replace(worker, near_data="low_bit")
        return replace(self, store=replace(self.store, path=str(path.absolute())), worker=worker)


def load_config(path: Path) -> ClusterConfig:
    """The config in a YAML file, not yet resolved.

    Raises ValueError naming file, field, what was given and what is allowed.
    """
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise ValueError(f"{path}: larger than {MAX_CONFIG_BYTES} bytes; not a cluster config")
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot read the config: {error}") from error
    return build(ClusterConfig, parse_yaml(text, str(path)), file=str(path))


def config_from_mapping(data: object, *, source: str) -> ClusterConfig:
    """The config given as plain values, for example by Serve; `source` names it in errors."""
    return build(ClusterConfig, data, file=source)


def as_mapping(config: object) -> dict[str, Any]:
    """The plain values of a config, nested; `config_from_mapping` reads them back."""
    assert dataclasses.is_dataclass(config)
    return {f.name: _plain(getattr(config, f.name)) for f in dataclasses.fields(config)}


def render_example() -> str:
    """`deploy/cluster.example.yaml`: every field with its text and its default value."""
    lines = [
        "# The whole configuration of a moetier cluster, with every field at its default.",
        "# Use it with `moetier serve --config FILE`; leave out what you do not change.",
        "# Written by cluster/config.py: `python -m cluster.config > deploy/cluster.example.yaml`.",
    ]
    return "\n".join(lines + _documented(ClusterConfig(), indent=0)) + "\n"


def _plain(value: object) -> Any:
    if dataclasses.is_dataclass(value):
        return as_mapping(value)
    return value


def _documented(config: Any, *, indent: int) -> list[str]:
    margin = "  " * indent
    texts = field_texts(type(config))
    hints = get_type_hints(type(config))
    lines = []
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        nested = dataclasses.is_dataclass(value)
        if indent == 0:
            lines.append("")
        lines += textwrap.wrap(
            texts[item.name].replace("None", "null") + _choices(hints[item.name]),
            98,
            initial_indent=f"{margin}# ",
            subsequent_indent=f"{margin}#   ",
        )
        if nested:
            lines += [f"{margin}{item.name}:", *_documented(value, indent=indent + 1)]
            continue
        lines.append(f"{margin}{item.name}: {_scalar(value)}")
        if item.name == "autoscaling":
            inner = _documented(AutoscalingSettings(), indent=indent + 1)
            lines.append(f"{margin}# autoscaling:")
            lines += [f"{margin}#{line.removeprefix(margin)}" for line in inner]
    return lines


def _choices(hint: Any) -> str:
    allowed = get_args(hint) if get_origin(hint) is Literal else ()
    return f" One of {', '.join(allowed)}." if allowed else ""


def _scalar(value: object) -> str:
    return yaml.safe_dump(_plain(value), default_flow_style=True).removesuffix("\n...\n").strip()


if __name__ == "__main__":
    import sys

    sys.stdout.write(render_example())
