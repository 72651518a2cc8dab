"""Goal: what the command prints of a seed is the same in every process.

Method: two processes with different hash seeds, so that no set's order is in the log.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest


@pytest.mark.slow
def test_a_seed_is_replayed_alike_by_another_process() -> None:
    logs = []
    for hash_seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-m", "tests.sim", "--seed", "19"],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        logs.append(done.stdout)
    assert logs[0] == logs[1]
    assert "fault: corrupt mem-0" in logs[0]
    assert "log digest" in logs[0]
