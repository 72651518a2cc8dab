"""One overlay run on hosts of this machine: its pods up, its Serve config put, requests answered.

Owns the hosts and the order of things, which is the operator's: the head, the config, the workers.
What each host runs is `benchmarks/deploy_parts/pods.py`.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx2

from benchmarks.deploy_parts.asking import PROMPTS, Asked, answer_of
from benchmarks.deploy_parts.pods import (
    HEAD,
    Pod,
    Volumes,
    environment,
    fit_this_machine,
    overlay_pods,
    ray_command,
    script,
    service_names,
)
from benchmarks.faults.hosts import SUBNET, Network
from benchmarks.offload_parts.hosts import ROOT
from cluster.deploy.whole_rules import needed_secrets
from cluster.manifests import serve_config

logger = logging.getLogger(__name__)

CLIENT = "client"
DASHBOARD_PORT, HTTP_PORT = 8265, 8000
APPLICATION = "moetier"
CLAIM, MODEL_FOLDER = "moetier-store", "model"
START_S = 400.0
NO_NODE_S = 10.0
"""How long the worker pods stay away once the config is put: a node may come up late."""
CALL_S = 120.0
CLIENTS = 4


@dataclass(frozen=True, slots=True)
class Report:
    """What was started, and what came of the requests."""

    overlay: str
    pods: tuple[Pod, ...]
    changes: tuple[str, ...]  # of the Serve config
    started_s: float  # from the worker pods' start until Serve said RUNNING
    replicas: Mapping[str, tuple[str, ...]]  # deployment -> names of the pods it runs on
    asked: tuple[Asked, ...]

    @property
    def problems(self) -> tuple[str, ...]:
        """What is not as the manifest promises; empty when all is."""
        found = [each.problem for each in self.asked if each.problem]
        if any(HEAD in names for names in self.replicas.values()):
            found.append(f"a workload on the head: {dict(self.replicas)}")
        for prompt in PROMPTS:
            texts = {each.text for each in self.asked if each.prompt == prompt}
            if len(texts) > 1:
                found.append(f"{prompt!r} was answered in {len(texts)} ways")
        return tuple(found)


class Trial:
    """The overlay's pods, from `with` to its end. `store` is what its volume holds."""

    def __init__(
        self, overlay: str, documents: Sequence[Mapping[str, Any]], store: Path, folder: Path
    ) -> None:
        (self._service,) = [d for d in documents if d["kind"] == "RayService"]
        self._overlay, self._documents = overlay, documents
        self._cluster = self._service["spec"]["rayClusterConfig"]
        self.pods = overlay_pods(documents, self._service)
        self._workers = [p for p in self.pods if p.group is not None and p.name != HEAD]
        self.config = serve_config(self._service)
        self._changes = tuple(fit_this_machine(self.config))
        self._addresses = {
            pod.name: f"{SUBNET}.{number}" for number, pod in enumerate(self.pods, start=1)
        }
        self._token = secrets.token_hex(16)
        keys: dict[str, dict[str, str]] = {}
        for name, key in needed_secrets(documents):
            keys.setdefault(name, {})[key] = secrets.token_hex(16)
        self._volumes = Volumes(folder, {CLAIM: folder / "claim"}, keys)
        self._store = store
        self.network = Network([*self._addresses, CLIENT], folder / "hosts-of")

    def __enter__(self) -> Trial:
        folder = self._volumes.folder
        shutil.copytree(self._store, folder / "claim" / MODEL_FOLDER)
        names = service_names(self._documents, self.pods, self._addresses)
        lines = ["127.0.0.1 localhost", *(f"{there} {name}" for name, there in names.items())]
        (folder / "hosts").write_text("\n".join(lines) + "\n")
        for name, values in self._volumes.secrets.items():
            for key, value in values.items():
                path = folder / "secrets" / name / key
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(value)
        self.network.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.network.close()

    def run(self, requests: int) -> Report:
        """Start all, ask, and tell. Raises RuntimeError when it does not come up."""
        started_s = self.start()
        asked = tuple(self.ask(requests))
        return Report(self._overlay, self.pods, self._changes, started_s, self._replicas(), asked)

    def start(self) -> float:
        """Seconds from the worker pods' start until Serve said RUNNING. Raises as `run`."""
        for pod in self.pods:
            if pod not in self._workers:
                self._boot(pod)
        self._until(lambda: self._applications() is not None, "the dashboard")
        self.put(self.config)
        time.sleep(NO_NODE_S)
        self._check_waiting()
        begun_s = time.monotonic()
        for pod in self._workers:
            self._boot(pod)
        self._until(self._runs, "the application")
        return time.monotonic() - begun_s

    def put(self, config: Mapping[str, Any]) -> None:
        """Have Serve apply a config, as the operator does when serveConfigV2 changes."""
        self._call("PUT", config)

    def ask(self, requests: int) -> list[Asked]:
        """So many, a few at once, of the pods that are ready; returns when all have ended."""
        doors: list[str] = self._until(self._doors, "a ready pod")
        model = self.model()["id"]

        def one(number: int) -> Asked:
            asked = Asked(PROMPTS[number % len(PROMPTS)], bool(number % 2))
            try:
                with self._client() as http:
                    return answer_of(http, doors[number % len(doors)], model, asked)
            except (httpx2.HTTPError, ValueError, KeyError) as error:
                return Asked(asked.prompt, asked.is_stream, problem=repr(error))

        with ThreadPoolExecutor(CLIENTS) as pool:
            return list(pool.map(one, range(requests)))

    def model(self) -> dict[str, Any]:
        """What a pod that is ready tells of the model that is served."""
        doors: list[str] = self._until(self._doors, "a ready pod")
        with self._client() as http:
            (told,) = http.get(f"{doors[0]}/v1/models").raise_for_status().json()["data"]
        found: dict[str, Any] = told
        return found

    def execute(self, name: str, *words: str) -> str:
        """What a command prints on a Ray pod, as by `kubectl exec`. Raises RuntimeError."""
        (pod,) = [each for each in self.pods if each.name == name]
        pid = min(process.pid for process in self.network[name].processes("raylet/raylet"))
        done = subprocess.run(
            ["nsenter", "-t", str(pid), "-m", "-n", "-p", "-i", "-u", "--", *words],
            env={**os.environ, **self._variables(pod)},
            capture_output=True,
            text=True,
            timeout=CALL_S,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"{shlex.join(words)} on {name}: {done.stderr[-2000:]}")
        return done.stdout

    def _boot(self, pod: Pod) -> None:
        if pod.group is None:
            command = shlex.join(pod.container["command"])
        else:
            command = ray_command(pod, self._cluster, self._addresses[pod.name])
        path = self._volumes.folder / f"{pod.name}.sh"
        path.write_text(script(pod, self._volumes, command))
        self.network[pod.name].start(["bash", str(path)], self._variables(pod))
        logger.info("%s: %s is up", self._overlay, pod.name)

    def _variables(self, pod: Pod) -> dict[str, str]:
        return {
            # What the image brings along.
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "RAY_USAGE_STATS_ENABLED": "0",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",  # hosts share the cores
            **environment(pod, self._cluster, self._volumes, self._token),
        }

    def _check_waiting(self) -> None:
        """Before there is a worker node, nothing may have failed: Serve tries only three times."""
        told = (self._applications() or {}).get(APPLICATION, {})
        if told.get("status") != "DEPLOYING":
            raise RuntimeError(f"without a worker node it is {told.get('status')}: {told}")

    def _runs(self) -> bool:
        told = (self._applications() or {}).get(APPLICATION, {})
        if told.get("status") == "DEPLOY_FAILED":
            raise RuntimeError(f"Serve gave up: {json.dumps(told)[:3000]}")
        return told.get("status") == "RUNNING"

    def _doors(self) -> list[str]:
        """URLs of the pods that their readiness probe calls ready."""
        return [
            f"http://{self._addresses[pod.name]}:{HTTP_PORT}"
            for pod in self._workers
            if self._is_ready(pod)
        ]

    def _is_ready(self, pod: Pod) -> bool:
        probe = pod.container["readinessProbe"]["httpGet"]
        url = f"http://{self._addresses[pod.name]}:{probe['port']}{probe['path']}"
        with self._client() as http, contextlib.suppress(httpx2.HTTPError):
            return http.get(url).status_code == 200
        return False

    def _replicas(self) -> dict[str, tuple[str, ...]]:
        pods = {address: name for name, address in self._addresses.items()}
        told = (self._applications() or {})[APPLICATION]["deployments"]
        return {
            name: tuple(sorted(pods[each["node_ip"]] for each in deployment["replicas"]))
            for name, deployment in sorted(told.items())
        }

    def _applications(self) -> dict[str, Any] | None:
        """Serve's word of all applications; None while the dashboard does not answer."""
        try:
            answer = self._call("GET")
        except httpx2.HTTPError as error:
            logger.debug("no word of Serve: %s", error)
            return None
        found: dict[str, Any] = answer["applications"]
        return found

    def _call(self, method: str, body: object = None) -> Any:
        url = f"http://{self._addresses[HEAD]}:{DASHBOARD_PORT}/api/serve/applications/"
        headers = {"Authorization": f"Bearer {self._token}"}
        with self._client() as http:
            answer = http.request(method, url, json=body, headers=headers)
        answer.raise_for_status()
        return answer.json() if answer.content else None

    @contextlib.contextmanager
    def _client(self) -> Iterator[httpx2.Client]:
        """On the client's network; close it in the same thread."""
        with self.network[CLIENT].inside(), httpx2.Client(timeout=CALL_S) as http:
            yield http

    def _until(self, condition: Callable[[], Any], what: str) -> Any:
        """The first true value of condition()."""
        end = time.monotonic() + START_S
        while time.monotonic() < end:
            for pod in self.pods:
                host = self.network[pod.name]
                if host.log.exists() and not host.is_running:
                    raise RuntimeError(f"{pod.name} has ended: {host.log.read_text()[-3000:]}")
            if value := condition():
                return value
            time.sleep(1)
        raise RuntimeError(f"{what}: not there within {START_S:g} s; logs: {self._volumes.folder}")
