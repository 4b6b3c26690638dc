"""`make bench`: one table of what this project does beside its peers, on this machine.

    python tests/bench                     everything that has a place in the table
    python tests/bench training gpt2-step  one room, or one workload
    python tests/bench grading --help      what grading costs beside nbgrader: minutes, and pages of its own

Each workload is run in turn by everybody who takes part, each peer in a process of its own, in float32 and with the
same number of threads. A figure is a median; a ratio is the median of the ratios of neighbouring rounds, with its
quartiles. Absolute times change from hour to hour on a shared machine; the ratios are what counts.
"""

import argparse
import importlib
import os
import sys
import tempfile
import time
from pathlib import Path

import report
from harness import Bench, Row, part_of
from workload import PEERS, Workload, missing

ROOMS = ("inference", "training", "cache", "startup")
ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "BENCHMARKS.md"
Selection = list[tuple[str, Workload]]


def chosen(names: list[str]) -> Selection:
    """(room, workload): those that were named by their own name or by their room; all, where nothing is named."""
    everything = [(room, each) for room in ROOMS for each in importlib.import_module(room).WORKLOADS]
    known = [*ROOMS, "grading", *(each.name for _, each in everything)]
    if unknown := [name for name in names if name not in known]:
        sys.exit(f"no workload is called {', '.join(unknown)}; known are {', '.join(known)}")
    return [(room, each) for room, each in everything if not names or room in names or each.name in names]


def taking_part(selection: Selection, quick: bool) -> tuple[Selection, list[str]]:
    """What can be measured of it, and what is left out, in sentences."""
    absent = {peer: missing(peer) for peer in PEERS if missing(peer)}
    parts = [(room, part_of(each, set(absent), quick)) for room, each in selection]
    left_out = [f"{peer} is left out: {' and '.join(packages)} not installed (pip install -e '.[oracle]')"
                for peer, packages in absent.items()]  # fmt: skip
    if quick:
        skipped = [each.name for (_, each), (_, part) in zip(selection, parts) if part is None]
        left_out.append(f"left out by --quick: rows without a limit{''.join(f', {name}' for name in skipped)}")
    return [(room, part) for room, part in parts if part is not None], left_out


def measured(selection: Selection, threads: int, quick: bool) -> list[Row]:
    """All rows; progress is told on stderr."""
    rows, started = [], time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        bench = Bench(Path(folder), threads, **({"share": 0.1, "least_rounds": 2} if quick else {}))
        try:
            for room, each in selection:
                print(f"{time.perf_counter() - started:5.0f} s  {each.name}: {each.title}", file=sys.stderr, flush=True)
                rows += bench.measure(room, each)
        finally:
            bench.close()
    return rows


def parsed() -> argparse.Namespace:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python tests/bench", description=__doc__, formatter_class=form)
    parser.add_argument("names", nargs="*", metavar="NAME", help="workloads or rooms (default: all)")
    parser.add_argument("--list", action="store_true", help="name the workloads, and measure nothing")
    parser.add_argument("--quick", action="store_true", help="few rounds, and only of what has a limit")
    parser.add_argument("--threads", type=int, default=1, help="threads of each process (default: 1)")
    parser.add_argument("--out", type=Path, default=ROOT / "out", help="folder for bench.json and bench.svg")
    parser.add_argument("--page", action="store_true", help=f"write {PAGE.name}, too: for a full run alone")
    options = parser.parse_args()
    if options.page and (options.names or options.quick):
        parser.error("--page shows the last full table: give no names and no --quick with it")
    if options.threads < 1:
        parser.error("--threads is 1 or more")
    return options


def main() -> None:
    if sys.argv[1:2] == ["grading"]:
        import grading

        return grading.main(sys.argv[2:])
    options = parsed()
    selection = chosen(options.names)
    if options.list:
        return print("\n".join(f"{room:10} {each.name:18} {each.title}" for room, each in selection))
    selection, left_out = taking_part(selection, options.quick)
    load, started = os.getloadavg()[0], time.perf_counter()
    rows = measured(selection, options.threads, options.quick)
    run = report.Run(rows, report.today(), report.machine(), report.versions(), options.threads,
                     [load, os.getloadavg()[0]], time.perf_counter() - started, left_out, options.quick)  # fmt: skip
    print(report.as_text(run))
    options.out.mkdir(parents=True, exist_ok=True)
    written = [options.out / "bench.json"]
    written[0].write_text(report.as_json(run), encoding="utf-8")
    if report.plot(run, options.out / "bench.svg"):
        written.append(options.out / "bench.svg")
    if options.page:
        written.append(PAGE)
        PAGE.write_text(report.as_page(run), encoding="utf-8")
    print(f"written: {', '.join(map(str, written))}", file=sys.stderr)


if __name__ == "__main__":
    main()
