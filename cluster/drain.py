"""`python -m cluster.drain`: what a pod does before it ends, so that no request is cut off.

Tells Ray to drain this node, upon which Serve starts the node's replicas elsewhere and ends those
here once they are idle; then waits until this node's HTTP proxy has left. Imports no Ray.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence

PROXY_HEALTH = "http://127.0.0.1:8000/-/healthz"
POLL_S = 1.0
ASK_TIMEOUT_S = 2.0
RAY_TIMEOUT_S = 30.0


def main(argv: Sequence[str] | None = None) -> int:
    """0 when the proxy has left, 1 when Ray refused, 3 when the time was up first."""
    parser = argparse.ArgumentParser(prog="python -m cluster.drain", description=__doc__)
    parser.add_argument("--seconds", type=int, default=90, help="time for all of it (90)")
    parser.add_argument("--health", default=PROXY_HEALTH, help="URL of this node's proxy")
    parser.add_argument("--ray", default="ray", help="Ray's command")
    args = parser.parse_args(argv)
    if not 1 <= args.seconds <= 3600:
        parser.error(f"--seconds: got {args.seconds}, expected 1 to 3600")
    end = time.monotonic() + args.seconds
    if problem := ask_ray(args.ray, args.seconds):
        sys.stderr.write(f"drain: {problem}\n")
        return 1
    return 0 if wait_until_left(lambda: proxy_serves(args.health), end - time.monotonic()) else 3


def ask_ray(command: str, seconds: int) -> str | None:
    """Drain this node within so long; what went wrong, or None."""
    words = [command, "drain-node", "--reason", "DRAIN_NODE_REASON_PREEMPTION"]
    words += ["--reason-message", "the pod ends", "--deadline-remaining-seconds", str(seconds)]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=RAY_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{command} drain-node: {error}"
    return None if done.returncode == 0 else f"{command} drain-node: {done.stderr.strip()[-500:]}"


def wait_until_left(
    serves: Callable[[], bool],
    seconds: float,
    *,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> bool:
    """Whether it stopped serving within so long."""
    end = clock() + seconds
    while serves():
        if clock() >= end:
            return False
        sleep(POLL_S)
    return True


def proxy_serves(url: str) -> bool:
    """Whether there is a proxy: one that drains answers 503, and may still have requests."""
    try:
        with urllib.request.urlopen(url, timeout=ASK_TIMEOUT_S):
            return True
    except urllib.error.HTTPError:
        return True
    except urllib.error.URLError as error:
        return not isinstance(error.reason, ConnectionRefusedError)
    except OSError:
        return True  # it took the connection, and said nothing in time


if __name__ == "__main__":
    sys.exit(main())
