"""A moetier cluster on hosts of its own: Redis, a head, memory nodes, GPU nodes, one application.

Owns what is started where, what is restarted when it ends (as a kubelet would), and whether all of
it stands. Talks to Ray over HTTP alone, as an operator does.
"""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from benchmarks.faults.hosts import Host, Network, command_line
from benchmarks.faults.services import (
    APPLICATION,
    DASHBOARD_PORT,
    GPU,
    HTTP_PORT,
    MEMORY,
    NAMES,
    NICENESS,
    SPARE,
    TITLES,
    WANTED,
    Gcs,
    environment,
    serve_config,
    service,
)
from cluster.processes import uninterrupted

logger = logging.getLogger(__name__)

START_S = 400.0
CALL_S = 8.0
RESTART_S = 2.0
"""From the end of a host's service to its next start, as after a kubelet's first back-off."""


@dataclass(frozen=True, slots=True)
class State:
    """What stands at one moment. `problems` is empty when everything does."""

    problems: tuple[str, ...]
    processes: Mapping[str, int] = field(default_factory=dict)


class Deployment:
    """The cluster, from `with` to its end. `store` is copied to every host that needs it."""

    def __init__(self, store: Path, folder: Path, *, gcs: Gcs = "redis") -> None:
        self._store, self._gcs = store, gcs
        self.folder = folder
        self.network = Network(NAMES, folder)
        self._supervised: set[str] = set()
        self.repaired: dict[str, int] = {}  # records, by tier actor, at the last look
        self._ended = threading.Event()
        self._kubelet = threading.Thread(target=self._supervise, daemon=True)

    def __enter__(self) -> Deployment:
        self.network.__enter__()
        try:
            self._kubelet.start()
            self._start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @uninterrupted()
    def close(self) -> None:
        """Everything off; nothing is left but the folder, which is the caller's."""
        self._ended.set()
        if self._kubelet.ident is not None:
            self._kubelet.join()
        self.network.close()

    def host(self, name: str) -> Host:
        return self.network[name]

    @property
    def doors(self) -> tuple[str, ...]:
        """URLs of the proxies in front of the ingress replicas."""
        return tuple(f"http://{self.host(name).address}:{HTTP_PORT}" for name in GPU)

    @property
    def dashboard(self) -> str:
        return f"http://{self.host('head').address}:{DASHBOARD_PORT}"

    def boot(self, name: str) -> None:
        """Start a host's service, and again whenever it ends."""
        self.host(name).start(*self._start_of(name))
        self._supervised.add(name)

    def _start_of(self, name: str) -> tuple[list[str], dict[str, str], int]:
        addresses = {each.name: each.address for each in self.network.hosts.values()}
        variables = environment(name, addresses, self._gcs)
        return service(name, addresses), variables, NICENESS.get(name, 0)

    def shut(self, name: str) -> None:
        """Off, and not started again until `boot`."""
        self._supervised.discard(name)
        self.host(name).power_off()

    def kill_somewhere(self, part: str, names: Sequence[str] = NAMES) -> str:
        """SIGKILL a part on the first of the hosts that has it; that host's name."""
        for name in names:
            if self.host(name).processes(TITLES[part]):
                self.host(name).kill(TITLES[part])
                return name
        raise LookupError(f"no {part} on {', '.join(names)}")

    def where(self, part: str) -> str:
        """The first host that has such a process. Raises LookupError."""
        for name in NAMES:
            if self.host(name).processes(TITLES[part]):
                return name
        raise LookupError(f"no {part} on any host")

    def state(self) -> State:
        """Asked of the processes, of Serve and of the application; never raises."""
        told = [command_line(p) for host in self.network.hosts.values() for p in host.processes()]
        counts = {part: sum(title in each for each in told) for part, title in TITLES.items()}
        problems = [
            f"{counts[part]} of {wanted} processes of {part}"
            for part, wanted in WANTED.items()
            if counts[part] < wanted  # a node that joined may hold one more
        ]
        if not problems:
            problems += [*self._serve_problems(), *self._health_problems()]
        return State(tuple(problems), counts)

    def until_full(self, deadline_s: float, *, times: int = 3) -> float | None:
        """When all stood for the first of `times` looks in a row; None if not in time."""
        end = time.monotonic() + deadline_s
        since, seen, told = 0.0, 0, ""
        while time.monotonic() < end:
            now, problems = time.monotonic(), self.state().problems
            if problems:
                seen = 0
                if told != problems[0]:
                    logger.info("not whole: %s", told := problems[0])
            else:
                since = since if seen else now
                seen += 1
                if seen == times:
                    if self.repaired:
                        logger.info("repaired records: %s", self.repaired)
                    return since
            time.sleep(0.3)
        return None

    def get(self, url: str, body: object = None, *, method: str | None = None) -> Any:
        """The JSON answer over the client's network. Raises OSError, or ValueError for no JSON."""
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(url, data, headers, method=method)
        with (
            self.host("client").inside(),
            urllib.request.urlopen(request, timeout=CALL_S) as answer,
        ):
            text = answer.read()
        return json.loads(text) if text else None

    def _start(self) -> None:
        for name in (*MEMORY, *GPU, SPARE):
            shutil.copytree(self._store, self.host(name).folder / "tmp/store")
        # Serve builds the application, and so reads the store, on whichever node it likes.
        shutil.copytree(self._store, self.host("head").folder / "tmp/store")
        self.boot("redis")
        time.sleep(0.5)
        self.boot("head")
        self._until(lambda: self._serve() is not None, "the dashboard")
        for name in (*MEMORY, *GPU):
            self.boot(name)
        self._until(lambda: len(self._alive_nodes()) == 1 + len(MEMORY) + len(GPU), "the nodes")
        url = f"{self.dashboard}/api/serve/applications/"
        self.get(url, serve_config(self.host("redis").address), method="PUT")
        if self.until_full(START_S) is None:
            raise RuntimeError(f"not whole within {START_S:g} s: {self.state().problems}")

    def _until(self, condition: Any, what: str) -> None:
        end = time.monotonic() + START_S
        while time.monotonic() < end:
            with contextlib.suppress(OSError, ValueError):
                if condition():
                    return
            time.sleep(0.5)
        raise RuntimeError(f"{what}: not there within {START_S:g} s; logs are in {self.folder}")

    def _serve(self) -> Any:
        return self.get(f"{self.dashboard}/api/serve/applications/")

    def _alive_nodes(self) -> list[Any]:
        nodes = self.get(f"{self.dashboard}/api/v0/nodes")["data"]["result"]["result"]
        return [node for node in nodes if node["state"] == "ALIVE"]

    def node_id(self, name: str) -> str:
        """Ray's id of the live node on that host. Raises OSError, LookupError."""
        for node in self._alive_nodes():
            if node["node_ip"] == self.host(name).address:
                return str(node["node_id"])
        raise LookupError(f"Ray has no live node on {name}")

    def _serve_problems(self) -> Iterator[str]:
        try:
            application = self._serve()["applications"].get(APPLICATION, {})
        except (OSError, ValueError) as error:
            yield f"Serve's REST API: {error}"
            return
        if application.get("status") != "RUNNING":
            yield f"the application is {application.get('status')}"
        for name, each in application.get("deployments", {}).items():
            running = [r for r in each["replicas"] if r["state"] == "RUNNING"]
            wanted = each["target_num_replicas"]
            if len(each["replicas"]) != wanted or len(running) != wanted:
                yield f"{name}: {len(running)} of {wanted} replicas run"

    def _health_problems(self) -> Iterator[str]:
        for door in self.doors:
            try:
                health = self.get(f"{door}/health")
            except (OSError, ValueError) as error:
                told = error.read().decode() if isinstance(error, urllib.error.HTTPError) else ""
                yield f"{door}: {error} {told}"
                continue
            yield from (f"{door}: {problem}" for problem in health["problems"])
            if len(health["workers"]) != WANTED["GPU worker"]:
                yield f"{door}: {len(health['workers'])} GPU workers report"
            damaged = {t["name"]: t["quarantined"] for t in health["tiers"] if t["quarantined"]}
            if damaged:
                yield f"damaged records: {damaged}"
            self.repaired = {t["name"]: t["repaired"] for t in health["tiers"] if t["repaired"]}

    def _supervise(self) -> None:
        ended_at: dict[str, float] = {}
        while not self._ended.wait(0.2):
            for name in tuple(self._supervised):
                if self.host(name).is_running:
                    ended_at.pop(name, None)
                elif time.monotonic() - ended_at.setdefault(name, time.monotonic()) >= RESTART_S:
                    logger.info("%s has ended: started again", name)
                    with contextlib.suppress(AssertionError):
                        self.host(name).start(*self._start_of(name))
