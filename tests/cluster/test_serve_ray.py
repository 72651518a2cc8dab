"""Goal: the real command serves the real app over HTTP, heals, refuses what it cannot do, and ends.

Method: `moetier serve` as a child process on the mini model's store, with near-data workers; the
official client and raw HTTP from outside; processes are killed by id. Tests run in file order: the
GPU worker is killed, then the transport changed, then the cluster ended.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from local_endpoint import wait_until

from cluster.processes import Process, descendants, end, named

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]

START_DEADLINE_S = 180
CONFIG = """
model: mini
worker: {max_sequences: 2, max_context: 1024}
replicas: {max_waiting: 2, drain_s: 60}
ndp: {enabled: true, num_threads: 1}
http: {port: 0, max_body_bytes: 100000, max_queued: 2}
"""
BODY = {"model": "mini", "prompt": "The return statement", "max_tokens": 12, "temperature": 0}
LONG = {**BODY, "max_tokens": 900, "ignore_eos": True}


@dataclass(frozen=True, slots=True)
class Command:
    """A running `moetier serve`."""

    process: subprocess.Popen[str]
    url: str
    log: Path

    def tier_pid(self, title: str) -> int:
        """The id of the one process below it with this title."""
        found = [p.pid for p in descendants(self.process.pid) if title in command_line(p)]
        assert len(found) == 1, (title, found)
        return found[0]

    @property
    def ray_address(self) -> str:
        for process in descendants(self.process.pid):
            if match := re.search(r"--gcs-address=(\S+)", command_line(process)):
                return match[1]
        raise AssertionError("no raylet below the command")

    def metrics(self) -> dict[str, float]:
        """Sums over replicas: "name" and "name{labels without replica}" -> value."""
        text = httpx2.get(f"{self.url}/metrics", timeout=30).text
        sums: dict[str, float] = {}
        for line in text.splitlines():
            if line.startswith("#"):
                continue
            name, value = line.rsplit(" ", 1)
            name = re.sub(r'replica="[^"]*",?', "", name).replace("{}", "")
            sums[name] = sums.get(name, 0) + float(value)
        return sums


def command_line(process: Process) -> str:
    try:
        return Path(f"/proc/{process.pid}/cmdline").read_text().replace("\0", " ")
    except OSError:
        return ""


@contextmanager
def moetier_serve(
    folder: Path, cache: Path, *arguments: str, config: str = CONFIG
) -> Iterator[Command]:
    """The command, up; ended by id if a test did not."""
    folder.mkdir(parents=True)
    (folder / "cluster.yaml").write_text(config)
    log = folder / "stderr"
    with log.open("w") as stderr:
        process = subprocess.Popen(
            [moetier_path(), *serve_arguments(folder, *arguments)],
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            env=environment(cache),
        )
    watchdog = threading.Timer(START_DEADLINE_S, process.kill)
    watchdog.start()
    try:
        assert process.stdout is not None
        greeting = process.stdout.readline()
        watchdog.cancel()
        match = re.search(r"at (http://\S+)/v1", greeting)
        assert match, f"{greeting!r}\n{log.read_text()}"
        yield Command(process, match[1], log)
    finally:
        watchdog.cancel()
        left = descendants(process.pid)
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
        process.communicate()
        end(left, patience_s=5)


def environment(cache: Path) -> dict[str, str]:
    """With a token for Ray, so that a second command can join the first one's cluster."""
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "a-token-of-this-test-0123456789"}
    return {**os.environ, **token, "MOETIER_CACHE": str(cache), "OMP_NUM_THREADS": "1"}


def moetier_path() -> str:
    return str(Path(sys.executable).parent / "moetier")


def serve_arguments(folder: Path, *more: str) -> list[str]:
    return ["serve", "--config", str(folder / "cluster.yaml"), *more]


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory, mini_cache: Path) -> Iterator[Command]:
    with moetier_serve(tmp_path_factory.mktemp("serve") / "main", mini_cache) as running:
        yield running


@pytest.fixture
def client(command: Command) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{command.url}/v1", api_key="x", max_retries=0, timeout=60)


@pytest.fixture
def http(command: Command) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=command.url, timeout=60) as http:
        yield http


def check_error(response: httpx2.Response, status: int, **expected: Any) -> dict[str, Any]:
    assert response.status_code == status, response.text
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert {name: error[name] for name in expected} == expected
    return error


def test_completions_whole_and_streamed(client: openai.OpenAI) -> None:
    whole = client.completions.create(**BODY)
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 12
    chunks = list(client.completions.create(**BODY, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert chunks[-1].choices[0].finish_reason == "length"


def test_chat_and_models(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="mini", messages=[{"role": "user", "content": "What is a list?"}], max_tokens=4
    )
    assert answer.choices[0].message.role == "assistant"
    assert answer.usage is not None
    assert answer.usage.completion_tokens <= 4
    assert [model.id for model in client.models.list()] == ["mini"]
    assert client.models.retrieve("mini").id == "mini"


def test_health_tells_all_parts(http: httpx2.Client) -> None:
    health = http.get("/health").json()
    assert health["status"] == "ok"
    assert [tier["name"] for tier in health["tiers"]] == ["store-0", "ndp-0"]
    assert len(health["workers"]) == 1


def test_bytes_come_over_the_object_store_and_low_bit_pairs_run_near_data(
    command: Command, http: httpx2.Client
) -> None:
    assert http.post("/v1/completions", json=BODY).status_code == 200

    def counted() -> bool:
        found = command.metrics()
        return (
            found.get('moetier_moved_bytes_total{tier="object_store",kind="codes"}', 0) > 0
            and found['moetier_pairs_total{how="near_data"}'] > 0
            and found['moetier_near_data_bytes_total{direction="received"}'] > 0
            and found["moetier_running_sequences"] == 0
        )

    wait_until(counted, "the worker's report")
    found = command.metrics()
    assert found['moetier_pairs_total{how="degraded"}'] == 0
    moved, planned = (
        sum(count for name, count in found.items() if name.startswith(f"moetier_{which}_bytes_"))
        for which in ("moved", "planned")
    )
    assert moved == planned + found['moetier_ahead_bytes_total{use="in_vain"}']
    assert found['moetier_guessed_pairs_total{guess="right"}'] > 0


BAD: dict[str, tuple[str, str, Any, int, dict[str, Any]]] = {
    "invalid JSON": ("POST", "/v1/completions", b"{", 400, {"code": "invalid_json"}),
    "wrong type": ("POST", "/v1/completions", {**BODY, "prompt": {}}, 400, {"param": "prompt"}),
    "negative": ("POST", "/v1/completions", {**BODY, "max_tokens": -1}, 400, {}),
    "huge": (
        "POST",
        "/v1/completions",
        {**BODY, "max_tokens": 10**9},
        400,
        {"code": "context_length_exceeded"},
    ),
    "long prompt": (
        "POST",
        "/v1/completions",
        {**BODY, "prompt": "word " * 2000},
        400,
        {"code": "context_length_exceeded"},
    ),
    "empty": ("POST", "/v1/completions", {**BODY, "prompt": ""}, 400, {"param": "prompt"}),
    "no messages": (
        "POST",
        "/v1/chat/completions",
        {"model": "mini", "messages": []},
        400,
        {"param": "messages"},
    ),
    "model": (
        "POST",
        "/v1/completions",
        {**BODY, "model": "gpt-5"},
        404,
        {"code": "model_not_found"},
    ),
    "large": (
        "POST",
        "/v1/completions",
        {**BODY, "prompt": "x" * 200_000},
        413,
        {"code": "request_too_large"},
    ),
    "no route": ("GET", "/v2", None, 404, {}),
    "method": ("GET", "/v1/chat/completions", None, 405, {}),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_has_its_status_and_shape(case: str, http: httpx2.Client) -> None:
    method, path, body, status, expected = BAD[case]
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    response = http.request(method, path, content=content)
    check_error(response, status, **expected)
    assert len(response.headers.get_list("x-request-id")) == 1


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_slot(command: Command, stream: bool) -> None:
    cancelled = 'moetier_sequences_total{how="cancelled"}'
    before = command.metrics()
    with httpx2.Client(base_url=command.url, timeout=60) as leaving:
        if stream:
            with leaving.stream("POST", "/v1/completions", json={**LONG, "stream": True}) as answer:
                next(answer.iter_lines())
        else:
            with pytest.raises(httpx2.ReadTimeout):
                leaving.post("/v1/completions", json=LONG, timeout=1.0)

    def freed() -> bool:
        now = command.metrics()
        return (
            now.get(cancelled, 0) == before.get(cancelled, 0) + 1
            and now["moetier_running_sequences"] == 0
        )

    wait_until(freed, "the slot is free again")
    spent = command.metrics()["moetier_output_tokens_total"] - before["moetier_output_tokens_total"]
    assert spent < 900, "it would have gone on to its end"


def test_too_much_work_is_429_and_the_rest_is_served(command: Command, http: httpx2.Client) -> None:
    answers: list[httpx2.Response] = []

    def ask(max_tokens: int) -> threading.Thread:
        body = {**BODY, "max_tokens": max_tokens, "ignore_eos": True}
        thread = threading.Thread(
            target=lambda: answers.append(http.post("/v1/completions", json=body))
        )
        thread.start()
        return thread

    def taken() -> float:
        now = command.metrics()
        return now["moetier_running_sequences"] + now["moetier_waiting_sequences"]

    # One at a time, since Serve counts a request as queued until a replica has taken it.
    threads: list[threading.Thread] = []
    for _ in range(4):
        threads.append(ask(400))
        wait_until(lambda: answers or taken() == len(threads), "the worker has taken it")
    threads += [ask(5) for _ in range(6)]
    for thread in threads:
        thread.join()
    refused = [answer for answer in answers if answer.status_code != 200]
    assert len(answers) - len(refused) >= 6, "two slots, two wait there, two at the ingress"
    assert refused
    for answer in refused:
        check_error(answer, 429, code="queue_full", type="rate_limit_error")
        assert answer.headers["retry-after"] == "1"


@pytest.mark.parametrize(
    ("title", "name"), [("ray::NdpActor", "ndp"), ("ray::StoreActor", "store")]
)
def test_a_tier_actor_that_dies_comes_back_and_no_request_fails(
    command: Command, http: httpx2.Client, title: str, name: str
) -> None:
    os.kill(command.tier_pid(title), signal.SIGKILL)
    prompts = ("def f(x):", "It was a dark night", "A noun that means", "usage: grep")
    for prompt in prompts:
        answer = http.post("/v1/completions", json={**BODY, "prompt": prompt})
        assert answer.status_code == 200, answer.text

    def healed() -> bool:
        found = command.metrics()
        labels = f'{{actor="{name}-0",role="{name}",node="'
        restarts = [
            v for k, v in found.items() if k.startswith(f"moetier_tier_restarts_total{labels}")
        ]
        up = [v for k, v in found.items() if k.startswith(f"moetier_tier_up{labels}")]
        return (restarts, up) == ([1], [1])

    wait_until(healed, f"{name} is back", 60)
    assert http.get("/health").status_code == 200
    assert http.post("/v1/completions", json=BODY).status_code == 200


def test_a_missing_label_is_an_error_that_names_it(
    command: Command, tmp_path: Path, mini_cache: Path
) -> None:
    (tmp_path / "cluster.yaml").write_text("ndp: {enabled: true, label: rack=42}\n")
    start_s = time.monotonic()
    done = subprocess.run(
        [moetier_path(), *serve_arguments(tmp_path, "--address", command.ray_address)],
        env=environment(mini_cache),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert "no live node has the label rack=42" in done.stderr
    assert "has moetier.io/ndp=true moetier.io/store=true" in done.stderr
    assert "ndp.label" in done.stderr
    assert "Traceback" not in done.stderr
    assert time.monotonic() - start_s < 60, "seconds, on a machine that may be busy"


def test_a_port_in_use_is_exit_code_2_and_starts_nothing(tmp_path: Path, mini_cache: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        (tmp_path / "cluster.yaml").write_text("")
        port = taken.getsockname()[1]
        done = subprocess.run(
            [moetier_path(), *serve_arguments(tmp_path, "--port", str(port))],
            env=environment(mini_cache),
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    assert done.returncode == 2
    assert f"http.port: {port} on 127.0.0.1 is in use" in done.stderr


def test_a_stream_whose_worker_dies_ends_with_an_error_and_the_next_finds_a_new_one(
    command: Command, http: httpx2.Client
) -> None:
    lines: list[str] = []
    with http.stream("POST", "/v1/completions", json={**LONG, "stream": True}) as answer:
        assert answer.status_code == 200
        for line in answer.iter_lines():
            if not lines:
                os.kill(command.tier_pid("GpuWorker"), signal.SIGKILL)
            lines += [line] if line else []
    error = json.loads(lines[-1].removeprefix("data: "))["error"]
    assert error["code"] == "unavailable"
    assert "[DONE]" not in lines[-1]
    assert http.post("/v1/completions", json=BODY).status_code == 200


@contextmanager
def redis_section() -> Iterator[str]:
    """The config of a directory in a Redis of this test, or nothing where there is no Redis."""
    if (program := shutil.which("redis-server")) is None:
        yield ""
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with subprocess.Popen(
        [program, "--port", str(port), "--bind", "127.0.0.1", "--save", ""],
        stdout=subprocess.DEVNULL,
    ) as redis:
        try:
            yield f"directory: {{kind: redis, redis_url: 'redis://127.0.0.1:{port}/0'}}\n"
        finally:
            redis.terminate()


def test_another_config_on_the_same_cluster_takes_its_place(
    command: Command, tmp_path: Path, mini_cache: Path, http: httpx2.Client
) -> None:
    near = http.post("/v1/completions", json=BODY).json()["choices"][0]["text"]
    port = command.url.rpartition(":")[2]
    joined = ("--address", command.ray_address, "--transport", "grpc", "--no-ndp", "--port", port)
    with (
        redis_section() as directory,
        moetier_serve(tmp_path / "joined", mini_cache, *joined, config=CONFIG + directory) as other,
    ):
        assert other.url == command.url
        answer = http.post("/v1/completions", json=BODY)
        assert answer.status_code == 200
        assert answer.json()["choices"][0]["text"][:3] == near[:3]
        moved = 'moetier_moved_bytes_total{tier="grpc",kind="codes"}'
        wait_until(lambda: other.metrics().get(moved, 0) > 0, "bytes over gRPC")
        assert other.metrics()['moetier_pairs_total{how="near_data"}'] == 0
        end_in_a_stream(other, http)
    assert command.process.poll() is None
    assert http.get("/health").status_code == 404, "the application is gone, Serve is not"


def end_in_a_stream(other: Command, http: httpx2.Client) -> None:
    """What is in flight at SIGTERM is answered to its end, from tiers that are still there."""
    body = {**LONG, "max_tokens": 400, "stream": True, "stream_options": {"include_usage": True}}
    events: list[str] = []
    with http.stream("POST", "/v1/completions", json=body) as answer:
        for line in answer.iter_lines():
            if not events:
                other.process.send_signal(signal.SIGTERM)
                signalled_s = time.monotonic()
            events += [line.removeprefix("data: ")] if line else []
    assert time.monotonic() - signalled_s > 1, "too short to be in flight"
    assert events[-1] == "[DONE]", events[-1]
    assert json.loads(events[-2])["usage"]["completion_tokens"] == 400
    assert other.process.wait(40) == 0


@pytest.mark.parametrize(("name", "number"), [("serve", signal.SIGTERM), ("demo", signal.SIGINT)])
def test_a_signal_while_it_starts_ends_all_of_it_and_ctrl_c_then_does_no_harm(
    name: str, number: signal.Signals, tmp_path: Path, mini_cache: Path
) -> None:
    (tmp_path / "cluster.yaml").write_text(CONFIG)
    with subprocess.Popen(
        [moetier_path(), *(serve_arguments(tmp_path) if name == "serve" else ["demo"])],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(mini_cache),
    ) as process:
        below: set[Process] = set()

        def serve_starts() -> bool:
            below.update(descendants(process.pid))
            return any("ServeController" in command_line(p) for p in below)

        wait_until(serve_starts, "Serve starts", START_DEADLINE_S)
        process.send_signal(number)
        # Ray's own end is a wait of a second and more: the second signal comes in its midst.
        raylets = named(below, ["raylet"])
        wait_until(lambda: not all(p.is_alive for p in raylets), "Ray ends", 60)
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=60)
    assert process.returncode == 130, told
    assert told.splitlines()[-1] == "interrupted; nothing is left running"
    assert "SIGTERM received" not in told, "Ray's own handler"
    assert "did not end by itself" not in told
    assert [command_line(p) for p in below if p.is_alive] == []


def test_ctrl_c_leaves_no_process_and_no_socket(command: Command) -> None:
    below = descendants(command.process.pid)
    assert len(below) > 5
    command.process.send_signal(signal.SIGINT)
    assert command.process.wait(60) == 0, command.log.read_text()
    assert [command_line(p) for p in below if p.is_alive] == []
    assert "did not end by itself" not in command.log.read_text()
    with socket.socket() as again:
        again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        again.bind(("127.0.0.1", int(command.url.rpartition(":")[2])))
