"""Goal: on real Ray no request fails while a GPU worker is killed, or a store rolls in and out.

Method: `moetier serve` with two GPU workers as a child process, under steady load from threads of
an independent client; a worker is killed by id, `moetier rollout` runs as a command.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import pytest
from local_endpoint import wait_until
from test_serve_ray import Command, command_line, environment, moetier_path, moetier_serve

from cluster.processes import descendants
from cluster.stores import bundled_store, compressed_store
from expert_store.config import CompressionConfig
from expert_store.format import load_manifest
from models import MIXTRAL_MINI

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]

CONFIG = """
worker: {max_sequences: 4, max_context: 256}
replicas: {num_replicas: 2, num_cpus: 0.5, max_waiting: 4}
http: {port: 0, max_queued: 64}
"""
BODY: dict[str, Any] = {"prompt": "The return statement", "max_tokens": 16, "temperature": 0}
ROLLOUT_S = 200


@dataclass(slots=True)
class Load:
    """Requests one after another from some threads: half of them streams. Counts how they end."""

    url: str
    model: str
    ended: Counter[str] = field(default_factory=Counter)
    texts: dict[str, set[str]] = field(default_factory=dict)  # by the version that answered
    problems: list[str] = field(default_factory=list)
    longest_s: float = 0.0
    _stop: threading.Event = field(default_factory=threading.Event)
    _threads: list[threading.Thread] = field(default_factory=list)

    def __enter__(self) -> Load:
        for number in range(4):
            thread = threading.Thread(target=self._run, args=(bool(number % 2),))
            thread.start()
            self._threads.append(thread)
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(120)

    def _run(self, stream: bool) -> None:
        with httpx2.Client(base_url=self.url, timeout=120) as http:
            while not self._stop.is_set():
                begun_s = time.monotonic()
                try:
                    self._ask(http, stream)
                except httpx2.HTTPError as error:
                    self._end("broken", repr(error))
                self.longest_s = max(self.longest_s, time.monotonic() - begun_s)

    def _ask(self, http: httpx2.Client, stream: bool) -> None:
        answer = http.post("/v1/completions", json={**BODY, "model": self.model, "stream": stream})
        if answer.status_code != 200:
            self._end(f"status {answer.status_code}", answer.text)
            return
        if stream:
            chunks = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
            if chunks[-1] != "[DONE]":
                assert "error" in json.loads(chunks[-1]), "every stream that breaks says so"
                self._end("error event", chunks[-1])
                return
            text = "".join(json.loads(chunk)["choices"][0]["text"] for chunk in chunks[:-1])
        else:
            text = answer.json()["choices"][0]["text"]
        self.texts.setdefault(answer.headers["x-moetier-version"], set()).add(text)
        self._end("stream" if stream else "whole", None)

    def _end(self, how: str, problem: str | None) -> None:
        self.ended[how] += 1
        if problem is not None:
            self.problems.append(f"{how}: {problem[:300]}")


@pytest.fixture(scope="module")
def stores(mini_cache: Path) -> tuple[Path, Path]:
    """Two versions of one model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOETIER_CACHE", str(mini_cache))
        return bundled_store(), compressed_store(MIXTRAL_MINI, CompressionConfig("fast"))


@pytest.fixture(scope="module")
def command(
    tmp_path_factory: pytest.TempPathFactory, mini_cache: Path, stores: tuple[Path, Path]
) -> Iterator[Command]:
    folder = tmp_path_factory.mktemp("rollout") / "main"
    with moetier_serve(folder, mini_cache, config=CONFIG) as running:
        yield running


def model_of(command: Command) -> tuple[str, str]:
    """Name and version that /v1/models tells."""
    (model,) = httpx2.get(f"{command.url}/v1/models", timeout=30).json()["data"]
    return model["id"], model["version"]


def workers(command: Command) -> list[int]:
    return [p.pid for p in descendants(command.process.pid) if "GpuWorker" in command_line(p)]


def rollout(command: Command, cache: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    told = [str(argument) for argument in arguments]
    return subprocess.run(
        [moetier_path(), "rollout", "--address", command.ray_address, *told],
        env=environment(cache),
        capture_output=True,
        text=True,
        timeout=ROLLOUT_S,
        check=False,
    )


def test_a_killed_worker_fails_no_request_that_showed_nothing(command: Command) -> None:
    name, _ = model_of(command)
    with Load(command.url, name) as load:
        wait_until(lambda: load.ended.total() > 8, "load", 60)
        os.kill(workers(command)[0], signal.SIGKILL)
        killed = load.ended.total()
        wait_until(lambda: load.ended.total() > killed + 30, "answers after it", 90)
    failed = load.ended.total() - load.ended["whole"] - load.ended["stream"]
    assert failed == load.ended["error event"], load.problems
    assert failed <= 2, "streams that had begun on it, and only those"
    assert load.longest_s < 20
    (texts,) = load.texts.values()
    assert len(texts) == 1, "greedy answers are the same on every worker"
    wait_until(lambda: len(workers(command)) == 2, "two workers again", 90)


def test_a_store_rolls_in_and_back_and_no_request_fails(
    command: Command, mini_cache: Path, stores: tuple[Path, Path]
) -> None:
    old, new = (load_manifest(store).version for store in stores)
    assert old != new
    name, served = model_of(command)
    assert served == old
    with Load(command.url, name) as load:
        wait_until(lambda: load.ended.total() > 4, "load", 60)
        out = rollout(command, mini_cache, stores[1])
        assert out.returncode == 0, out.stderr
        assert f"version {new[:12]}, on 2 workers" in out.stdout
        wait_until(lambda: model_of(command)[1] == new, "/v1/models", 20)
        back = rollout(command, mini_cache, "--back")
        assert back.returncode == 0, back.stderr
        assert f"version {old[:12]}, on 2 workers" in back.stdout
    assert load.problems == []
    assert set(load.texts) == {old, new}, "both have answered"
    assert all(len(texts) == 1 for texts in load.texts.values()), "and never half of each"


def test_a_store_that_is_lost_meanwhile_is_left_again(
    command: Command, mini_cache: Path, stores: tuple[Path, Path], tmp_path: Path
) -> None:
    """Its checksums were right; then its volume is gone, before a worker has opened it."""
    name, served = model_of(command)
    lost = tmp_path / "lost"
    shutil.copytree(stores[1], lost)
    with (
        Load(command.url, name) as load,
        subprocess.Popen(
            [moetier_path(), "rollout", "--address", command.ray_address, str(lost)],
            env=environment(mini_cache),
            stderr=subprocess.PIPE,
            text=True,
        ) as rolling,
    ):
        watchdog = threading.Timer(ROLLOUT_S, rolling.kill)
        watchdog.start()
        told = []
        assert rolling.stderr is not None
        for line in rolling.stderr:
            told.append(line)
            if line.startswith("from "):
                lost.rename(tmp_path / "elsewhere")
        watchdog.cancel()
        assert rolling.wait(30) == 1, told
    assert f"{served_store(stores, served)} is served again" in told[-1], told
    assert load.problems == []
    assert model_of(command) == (name, served)
    wait_until(lambda: len(workers(command)) == 2, "two workers again", 90)


def served_store(stores: tuple[Path, Path], version: str) -> Path:
    (found,) = [store for store in stores if load_manifest(store).version == version]
    return found
