"""Goal: what `moetier serve` can know beforehand it says beforehand, and what it ends is ended.

Method: real sockets, real folders and real child processes; no Ray.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import torch
from hand_store import build_store

from cluster.app import RunningCluster, join_cluster
from cluster.commands import serve
from cluster.config import ClusterConfig
from cluster.door import (
    check_port,
    check_ray_address,
    check_store,
    check_worker,
    last_line,
    settle_port,
    wait_healthy,
)
from cluster.processes import Process, descendants, end, named, uninterrupted
from cluster.settings import HttpSettings, StoreSettings
from expert_store.errors import StoreError, StoreFormatError
from gpu_worker.config import WorkerConfig


def test_a_port_in_use_is_named_with_the_way_out() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"http.port: {port} .* in use .*--port 0"):
            check_port(HttpSettings(port=port))
    check_port(HttpSettings(port=port))


def test_a_host_that_is_not_ours_is_named() -> None:
    with pytest.raises(ValueError, match=r"http.host: cannot listen on 192\.0\.2\.250"):
        settle_port(HttpSettings(host="192.0.2.250", port=0))
    assert settle_port(HttpSettings(port=0)).port > 0


def test_a_ray_address_where_nobody_is_is_told_at_once() -> None:
    with socket.socket() as head:
        head.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{head.getsockname()[1]}"
        with pytest.raises(StoreError, match=rf"cannot join .* {address}: nobody answers there"):
            check_ray_address(address)
        with pytest.raises(StoreError, match="cannot join"):
            join_cluster(ClusterConfig(), address)
        head.listen()
        check_ray_address(address)


def test_a_ray_head_that_swallows_packets_is_given_five_seconds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[object] = []

    def silent(where: object, timeout_s: float) -> None:
        asked.append((where, timeout_s))
        raise TimeoutError("timed out")

    monkeypatch.setattr(socket, "create_connection", silent)
    with pytest.raises(StoreError, match="timed out"):
        check_ray_address("[2001:db8::1]:6379")
    assert asked == [(("2001:db8::1", 6379), 5.0)]


def test_other_forms_of_a_ray_address_are_rays_own() -> None:
    check_ray_address("auto")
    check_ray_address("ray://127.0.0.1:1")
    for address in ("head", "head:", ":6379", "head:0", "head:70000", "head:x"):
        with pytest.raises(ValueError, match="--address: got '.*', expected HOST:PORT"):
            check_ray_address(address)


def test_a_folder_that_is_no_store_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"store.path: .*moetier compress MODEL"):
        check_store(StoreSettings(path=str(tmp_path)))
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(StoreFormatError):
        check_store(StoreSettings(path=str(tmp_path)))
    manifest = build_store(tmp_path / "store")
    assert check_store(StoreSettings(path=str(tmp_path / "store"))) == manifest


def test_worker_settings_that_do_not_fit_are_named(tmp_path: Path) -> None:
    manifest = build_store(tmp_path / "store")
    with pytest.raises(ValueError, match=r"worker\.top_n: got 5, .* use 0 to 2"):
        check_worker(WorkerConfig(top_n=5), manifest, is_here=False)
    check_worker(WorkerConfig(device="cuda"), manifest, is_here=False)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match=r"worker\.device: got 'cuda'"):
            check_worker(WorkerConfig(device="cuda"), manifest, is_here=True)


def test_steps_that_are_no_near_data_message_are_refused(tmp_path: Path) -> None:
    manifest = build_store(tmp_path / "store")
    token_bytes = 4 * manifest.model.top_k * (manifest.model.expert.hidden + 2)
    most = (64 * 2**20 - 64 * 2**10) // token_bytes
    for name in ("prefill_chunk", "max_sequences"):
        fits = WorkerConfig(near_data="low_bit", **{name: most})
        check_worker(fits, manifest, is_here=False)
        with pytest.raises(ValueError, match=rf"worker\.{name}: got {most + 1}, .* most {most}"):
            check_worker(replace(fits, **{name: most + 1}), manifest, is_here=False)
        off = WorkerConfig(near_data="off", **{name: most + 1})
        check_worker(off, manifest, is_here=False)


def test_of_a_traceback_the_last_line_is_told() -> None:
    assert last_line("Traceback:\n  File x\nValueError: no\n\n") == "ValueError: no"
    assert last_line(" \n") == "no reason given"


def test_waiting_for_health_ends_with_the_last_answer() -> None:
    answers = [503, 200]

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(answers.pop(0) if len(answers) > 1 else answers[0])
            self.end_headers()
            self.wfile.write(b'{"model": "mini"}')

        def log_message(self, *_: object) -> None:
            """Quiet."""

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        url = f"http://127.0.0.1:{server.server_port}"
        try:
            assert wait_healthy(url, 20) == "mini"
            answers[:] = [503]
            with pytest.raises(StoreError, match=r'not 200 within 0 s: \{"model"'):
                wait_healthy(url, 0)
        finally:
            server.shutdown()
            thread.join()
    with pytest.raises(StoreError, match="refused"):
        wait_healthy(url, 0)


def options(**given: object) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    args = parser.parse_args([])
    for name, value in given.items():
        setattr(args, name, value)
    return args


def test_options_win_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(
        "store: {path: /a, transport: grpc}\nhttp: {port: 1}\n"
        "ndp: {enabled: true}\nworker: {near_data: low_bit}\n"
    )
    config = serve.configured(options(config=file))
    assert (config.store.path, config.store.transport, config.http.port) == ("/a", "grpc", 1)
    config = serve.configured(
        options(config=file, store="/b", transport="object_store", port=0, ndp=False, model="m")
    )
    assert (config.store.path, config.store.transport) == ("/b", "object_store")
    assert (config.http.port, config.model) == (0, "m")
    assert (config.ndp.enabled, config.worker.near_data) == (False, "off")


def test_a_bad_option_is_an_error_with_its_field() -> None:
    with pytest.raises(ValueError, match="port: got 70000"):
        serve.configured(options(store="/b", port=70000))


SLEEPER = [sys.executable, "-c", "import sys; print('up', flush=True); sys.stdin.read()"]
STUBBORN = [
    sys.executable,
    "-c",
    "import signal, sys; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
    "print('up', flush=True); sys.stdin.read()",
]


def start(command: list[str]) -> tuple[subprocess.Popen[str], Process]:
    before = descendants(os.getpid())
    child = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "up\n"
    (process,) = descendants(os.getpid()) - before
    assert process.pid == child.pid
    return child, process


@pytest.mark.parametrize(
    ("command", "code"), [(SLEEPER, -signal.SIGTERM), (STUBBORN, -signal.SIGKILL)]
)
def test_what_does_not_end_by_itself_is_ended(command: list[str], code: int) -> None:
    child, process = start(command)
    with child:
        assert end([process], patience_s=0.1) == {process}
        assert not process.is_alive
        assert child.wait(10) == code


@pytest.fixture
def interruptible() -> Iterator[None]:
    """SIGINT as on a terminal: a shell that starts the tests in the background has it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_no_signal_leaves_a_clean_up_half_way(interruptible: None) -> None:
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    done = []
    with uninterrupted():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        done.append("clean")
    assert done == ["clean"]
    assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


def test_elsewhere_than_on_the_main_thread_signals_are_left_alone() -> None:
    seen: list[object] = []

    def clean() -> None:
        with uninterrupted():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=clean)
    thread.start()
    thread.join()
    assert seen == [signal.getsignal(signal.SIGINT)]


def test_the_demo_refuses_a_port_before_it_compresses(
    moetier: Callable[..., tuple[int, str, str]],
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        for port, told in ((99999, "port: got 99999"), (taken.getsockname()[1], "is in use")):
            code, out, err = moetier("demo", "--port", port)
            assert (code, out) == (2, "")
            assert told in err


def test_what_ends_by_itself_is_left_alone() -> None:
    child, process = start(SLEEPER)
    with child:
        slept: list[float] = []

        def sleep(seconds: float) -> None:
            slept.append(seconds)
            if len(slept) == 2:
                child.communicate()

        assert end([process], patience_s=5, sleep=sleep) == frozenset()
        assert child.returncode == 0


def test_the_wait_ends_when_ray_does() -> None:
    child, process = start(SLEEPER)
    with child:
        assert named([process], [Path(sys.executable).name[:15]]) == {process}
        assert named([process], ["raylet"]) == frozenset()
        cluster = RunningCluster(
            "http://x", "m", ClusterConfig(), frozenset(), frozenset([process])
        )
        assert cluster.is_alive
        child.communicate()
        assert not cluster.is_alive
        with pytest.raises(StoreError, match="a process of Ray has ended"):
            serve.wait(threading.Event(), cluster)


def test_another_process_with_the_same_number_is_not_the_same() -> None:
    child, process = start(SLEEPER)
    with child:
        assert process.is_alive
        assert not Process(process.pid, process.start_ticks + 1).is_alive
        child.communicate()
