"""From a model's name to a local checkpoint folder: bundled, on disk, or from the Hugging Face Hub.

Knows no tensor.
"""

from __future__ import annotations

import re
from pathlib import Path

import httpx2
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

from expert_store.errors import CheckpointError

DEFAULT_MODEL = "mixtral-mini"
_BUNDLED = Path(__file__).resolve().parents[1] / "models"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_WANTED = ("*.safetensors", "*.json", "*.model", "*.txt", "*.jinja")
_UNWANTED = ("*/*", "consolidated*")  # other copies of the same weights
_METADATA_TIMEOUT_S = 10.0


def resolve_model(name_or_path: str | Path) -> Path:
    """The local folder of a model: "mixtral-mini" (bundled), a folder, or a Hub id (downloaded).

    A download shows huggingface_hub's progress bar and lands in its cache.
    Raises ValueError for an empty name, CheckpointError when there is no such model or the Hub
    cannot be reached.
    """
    name = str(name_or_path)
    if not name:
        raise ValueError(
            f"model: got an empty name, expected a folder, a Hub id or {DEFAULT_MODEL}"
        )
    if name == DEFAULT_MODEL:
        return _BUNDLED / DEFAULT_MODEL
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointError(
            f"model {name!r}: expected a folder with config.json and *.safetensors, got a file"
        )
    if _HUB_ID.fullmatch(name) is None or name.startswith((".", "~")):
        raise CheckpointError(
            f"model {name!r}: no such folder; give a checkpoint folder, a Hub id such as "
            f"mistralai/Mixtral-8x7B-v0.1, or {DEFAULT_MODEL!r}, the bundled model"
        )
    return _download(name)


def model_name(folder: Path) -> str:
    """What to call the model in a folder: its Hub id in the Hub's cache, else the folder's name."""
    *_, repository, kind, name = ("", "", *folder.resolve().parts)
    if kind == "snapshots" and repository.startswith("models--"):
        return repository.removeprefix("models--").replace("--", "/")
    return name


def _download(hub_id: str) -> Path:
    try:
        folder = snapshot_download(
            hub_id,
            allow_patterns=list(_WANTED),
            ignore_patterns=list(_UNWANTED),
            etag_timeout=_METADATA_TIMEOUT_S,
        )
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"model {hub_id!r}: neither a local folder nor a model on the Hub that this login may "
            "read; check the name, or log in with `hf auth login`"
        ) from error
    except (LocalEntryNotFoundError, httpx2.TransportError) as error:
        raise CheckpointError(
            f"model {hub_id!r}: no such local folder, not in the local cache, and the Hugging Face "
            "Hub cannot be reached; check the network, or give a folder that holds the checkpoint"
        ) from error
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise CheckpointError(f"model {hub_id!r}: the download failed: {error}") from error
    return Path(folder)
