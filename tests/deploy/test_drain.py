"""Goal: a pod's preStop asks Ray once, waits until its proxy has left, and never longer than told.

Method: a fake clock for the waiting; a real HTTP server and a small script in Ray's place for the
rest. (What Ray and Serve do upon it is tried in the behavioural run.)
"""

from __future__ import annotations

import http.server
import threading
from pathlib import Path

import pytest

from cluster.drain import main, proxy_serves, wait_until_left


@pytest.mark.parametrize(("answers", "expected", "asked"), [(3, True, 4), (99, False, 11)])
def test_it_waits_until_left_or_the_time_is_up(answers: int, expected: bool, asked: int) -> None:
    now, calls = [0.0], []

    def serves() -> bool:
        calls.append(now[0])
        return len(calls) <= answers

    def sleep(seconds: float) -> None:
        now[0] += seconds

    assert wait_until_left(serves, 10, clock=lambda: now[0], sleep=sleep) == expected
    assert len(calls) == asked


class Answer(http.server.BaseHTTPRequestHandler):
    status = 200

    def do_GET(self) -> None:
        self.send_response(self.status)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.parametrize("status", [200, 503])
def test_a_proxy_that_drains_is_still_there(status: int) -> None:
    handler = type("Handler", (Answer,), {"status": status})
    with http.server.HTTPServer(("127.0.0.1", 0), handler) as server:
        url = f"http://127.0.0.1:{server.server_port}/-/healthz"
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        assert proxy_serves(url)
        server.shutdown()
        thread.join()
    assert not proxy_serves(url)


def script(folder: Path, text: str) -> str:
    path = folder / "ray"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def test_the_command_asks_ray_for_this_node(tmp_path: Path) -> None:
    ray = script(tmp_path, f'echo "$@" >> {tmp_path}/asked')
    url = "http://127.0.0.1:9/-/healthz"
    assert main(["--seconds", "20", "--health", url, "--ray", ray]) == 0
    words = (tmp_path / "asked").read_text().split()
    assert words[:3] == ["drain-node", "--reason", "DRAIN_NODE_REASON_PREEMPTION"]
    assert words[-2:] == ["--deadline-remaining-seconds", "20"]


def test_a_refusal_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ray = script(tmp_path, "echo not accepted >&2; exit 1")
    assert main(["--seconds", "5", "--ray", ray]) == 1
    assert "not accepted" in capsys.readouterr().err
    assert main(["--seconds", "5", "--ray", str(tmp_path / "none")]) == 1
    with pytest.raises(SystemExit):
        main(["--seconds", "0"])
