"""`make bench`: one table of what this project does beside its peers, on this machine.

Each workload is run in turn by everybody who takes part, each peer in a process of its own, float32, with the same
number of threads. A figure is a median; a ratio is the median of the ratios of neighbouring rounds, with its quartiles.
Absolute times change from hour to hour on a shared machine; the ratios are what counts.
"""

import argparse
import importlib
import sys
import tempfile
import time
from pathlib import Path

import report
from harness import Bench
from workload import PEERS, missing

ROOMS = ("inference",)


def workloads() -> list[tuple[str, object]]:
    """(room, workload) of every file, in order."""
    return [(room, each) for room in ROOMS for each in importlib.import_module(room).WORKLOADS]


def chosen(names: list[str]) -> list[tuple[str, object]]:
    """Those that were named by their own name or by their room; all, where nothing is named."""
    everything = workloads()
    known = {*ROOMS, *(each.name for _, each in everything)}
    if unknown := [name for name in names if name not in known]:
        sys.exit(f"no workload is called {', '.join(unknown)}; known are {', '.join(sorted(known))}")
    return [(room, each) for room, each in everything if not names or room in names or each.name in names]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python tests/bench", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="workloads or rooms (default: all)")
    parser.add_argument("--list", action="store_true", help="name the workloads, and measure nothing")
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--threads", type=int, default=1, help="threads of each process (default: 1)")
    options = parser.parse_args()
    selection = chosen(options.names)
    if options.list:
        for room, each in selection:
            print(f"{room:12} {each.name:16} {each.title}")
        return
    without = {peer: missing(peer) for peer in PEERS if missing(peer)}
    started, rows = time.perf_counter(), []
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        bench = Bench(Path(folder), options.threads, *((0.15, 2) if options.quick else (1.0, 3)))
        try:
            for room, each in selection:
                print(f"{time.perf_counter() - started:5.0f} s  {each.title}", file=sys.stderr, flush=True)
                rows += bench.measure(room, each, set(without))
        finally:
            bench.close()
    print(report.table(rows))
    for peer, packages in without.items():
        print(f"{peer} is left out: {', '.join(packages)} is not installed")
    print(f"{report.machine()}; threads: {options.threads}; "
          f"{', '.join(f'{name} {version}' for name, version in report.versions().items())}; "
          f"{time.perf_counter() - started:.0f} s")  # fmt: skip


if __name__ == "__main__":
    main()
