"""`python -m benchmarks.faults`: break a cluster in every way of the catalogue, and report.

Needs root, Linux namespaces and redis-server; about two minutes to a fault. With --only, the rows
of the other faults stay as they were kept.
"""

from __future__ import annotations

import argparse
import logging
import signal

from benchmarks.faults import page
from benchmarks.faults.catalogue import ALL
from benchmarks.faults.run import Windows, suffer_all


def main() -> None:
    known = [fault.key for fault in ALL]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=known, default=known, metavar="FAULT")
    parser.add_argument("--seconds", type=float, default=12.0, help="of load before and after each")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    # So that SIGTERM too takes the way through which everything is ended.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    chosen = [fault for fault in ALL if fault.key in arguments.only]
    windows = Windows(arguments.seconds, arguments.seconds)
    text = ""
    for result in suffer_all(chosen, windows, seed=arguments.seed):
        rows = page.read() | {result.fault.key: page.row(result)}
        text = page.write(rows, known)
    print(text)


if __name__ == "__main__":
    main()
