"""Checks before anything starts, and the wait until what started answers. Knows no Ray."""

from __future__ import annotations

import errno
import json
import socket
import time
import urllib.error
import urllib.request
from dataclasses import replace
from pathlib import Path
from typing import Any

from cluster.settings import HttpSettings, StoreSettings
from expert_store.errors import StoreError
from expert_store.format import is_store, load_manifest
from expert_store.types import Manifest
from gpu_worker.config import WorkerConfig
from ndp_worker.config import NdpConfig

POLL_S = 0.1
CONNECT_TIMEOUT_S = 5.0
NEAR_DATA_HEAD_BYTES = 64 << 10
"""Of a near-data message: room for its header and for the numbers of experts."""


class ClusterStartError(StoreError):
    """The application did not come up; the message names the part and its cause."""


def check_port(http: HttpSettings) -> None:
    """Raises ValueError when nobody can listen on the endpoint's address now."""
    try:
        _listen(http.host, http.port)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ValueError(
                f"http.port: {http.port} on {http.host} is in use by another program; choose "
                "another one with --port, or --port 0 for any free one"
            ) from error
        raise ValueError(
            f"http.host: cannot listen on {http.host}:{http.port}: {error}; "
            "choose another --host or --port"
        ) from error


def check_ray_address(address: str) -> None:
    """Raises ValueError for what is no Ray cluster's address, ClusterStartError if nobody is there.

    Ray itself would try for minutes. Only HOST:PORT is tried here, "auto" and ray:// are Ray's.
    """
    if address == "auto" or "://" in address:
        return
    host, _, port = address.rpartition(":")
    if not (host and port.isascii() and port.isdigit() and 0 < int(port) < 65536):
        raise ValueError(
            f"--address: got {address[:200]!r}, expected HOST:PORT of a Ray cluster's head, or auto"
        )
    try:
        with socket.create_connection((host.strip("[]"), int(port)), CONNECT_TIMEOUT_S):
            return
    except (OSError, UnicodeError) as error:
        raise ClusterStartError(
            f"cannot join the Ray cluster at {address}: nobody answers there ({error}); check the "
            "address and that `ray start --head` has run there, or use auto on one of its nodes"
        ) from error


def settle_port(http: HttpSettings) -> HttpSettings:
    """These settings with a port on which one can listen now: their own, or for 0 a free one.

    Raises ValueError as `check_port`.
    """
    if http.port:
        check_port(http)
        return http
    try:
        return replace(http, port=_listen(http.host, 0))
    except OSError as error:
        raise ValueError(f"http.host: cannot listen on {http.host}: {error}") from error


def check_store(store: StoreSettings) -> Manifest:
    """The store's manifest. Raises ValueError without a store, StoreFormatError for a bad one."""
    path = Path(store.path)
    if not is_store(path):
        raise ValueError(
            f"store.path: {path} is not a store (no manifest.json there); make one with "
            f"`moetier compress MODEL {path}`"
        )
    return load_manifest(path)


def check_worker(worker: WorkerConfig, manifest: Manifest, *, is_here: bool) -> None:
    """Raises ValueError when a worker's settings do not fit the store or, if it is to run on this
    machine, the machine.
    """
    try:
        (worker if is_here else replace(worker, device="cpu")).resolve(manifest)
    except ValueError as error:
        raise ValueError(f"worker.{error}") from error
    if worker.near_data != "off":
        _check_near_data(worker, manifest)


def check_worker_if_readable(worker: WorkerConfig, store: StoreSettings) -> None:
    """`check_worker` for whoever composes away from the workers' machines: where this machine has
    no such store, the workers find out themselves.
    """
    if is_store(Path(store.path)):
        check_worker(worker, load_manifest(Path(store.path)), is_here=False)


def _check_near_data(worker: WorkerConfig, manifest: Manifest) -> None:
    """A layer's batch is one message: every pair of a step's tokens, in float32, with its row and
    its flag."""
    limit = NdpConfig().max_message_bytes - NEAR_DATA_HEAD_BYTES
    token_bytes = 4 * manifest.model.top_k * (manifest.model.expert.hidden + 2)
    for name in ("prefill_chunk", "max_sequences"):
        num_tokens = getattr(worker, name)
        if num_tokens * token_bytes > limit:
            raise ValueError(
                f"worker.{name}: got {num_tokens}, whose near-data messages of up to "
                f"{num_tokens * token_bytes} bytes are over the limit of {limit}; use at "
                f"most {limit // token_bytes}, or worker.near_data off"
            )


def last_line(text: str) -> str:
    """Of a traceback this is the error itself."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "no reason given"


def endpoint_url(http: HttpSettings) -> str:
    """Where the endpoint is reached from this machine."""
    everywhere = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}
    return f"http://{everywhere.get(http.host, http.host)}:{http.port}"


def wait_healthy(url: str, deadline_s: float) -> str:
    """Ask /health until it is 200; the name of the model that it tells.

    Raises StoreError with the last answer when the deadline passes.
    """
    end = time.monotonic() + deadline_s
    while True:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=10) as answer:
                body: dict[str, Any] = json.load(answer)
                return str(body["model"])
        except urllib.error.HTTPError as error:
            told = error.read(2000).decode(errors="replace")
        except OSError as error:
            told = str(error)
        if time.monotonic() > end:
            raise StoreError(f"{url}/health was not 200 within {deadline_s:g} s: {told}")
        time.sleep(POLL_S)


def _listen(host: str, port: int) -> int:
    """Listen and let go again; the port that it was."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(1)
        number: int = listener.getsockname()[1]
        return number
