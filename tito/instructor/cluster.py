"""The jobs of a class on the workers of a Dask cluster: the same units of work as on this machine.

A worker that dies gives its jobs to another one. What is asked of the cluster can all be computed again, the
assignment's text too, so that nothing depends on one worker's memory.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

from tito.course.errors import CourseError
from tito.instructor import job as jobs
from tito.instructor.assignment import Assignment
from tito.instructor.pool import Outcome, in_turn, read, unit

PATIENCE = 20.0  # seconds for the scheduler to answer, and for a first worker to be there
GOES_ON = "Finished submissions are kept: the same command goes on from there."


def on_cluster(paths: list[Path], assignment: Assignment, wanted: str, address: str) -> Iterator[Outcome]:
    """Outcomes as they come from the workers of the scheduler at `address`."""
    if not paths:
        return
    client = _client(address)

    def submit(path: Path):
        return client.submit(unit, read(path), text, wanted, key=f"tito-{path.stem}-{client.id}", retries=2)

    with client:
        count = _require_workers(client, address)
        text = client.submit(str, assignment.as_text(), key=f"tito-assignment-{assignment.hash}")
        try:
            yield from in_turn(paths, count, submit, lambda waiting: _some_of(client, waiting, address))
        except OSError as error:  # of the connection
            raise CourseError(f"The Dask scheduler at {address} was lost ({type(error).__name__}).", GOES_ON) from None


def version() -> int:
    """Of the way of grading, as a worker knows it."""
    return jobs.VERSION


def _client(address: str):
    """A connection to the scheduler, which says nothing by itself."""
    try:
        from distributed import Client
    except ImportError:
        raise CourseError(
            "A cluster needs Dask, which is not installed.",
            "Run `pip install -e '.[grade,cluster]'` in TinyTorch's folder, here and on the workers.",
        ) from None
    for name in ("distributed", "distributed.client", "distributed.core", "tornado.application"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", module="distributed")
    try:
        return Client(address, timeout=PATIENCE)
    except (OSError, TimeoutError, ValueError) as error:
        raise CourseError(
            f"No Dask scheduler answers at {address} ({type(error).__name__}).",
            "Start one (`dask scheduler`, then `dask worker ADDRESS` on each machine) and give its address, as in "
            "tcp://host:8786.",
        ) from None


def _require_workers(client, address: str) -> int:
    """How many submissions run at a time: the threads of all workers, each of which must grade as we do."""
    try:
        client.wait_for_workers(1, timeout=PATIENCE)
    except TimeoutError:
        raise CourseError(
            f"The Dask scheduler at {address} has no workers.", f"Start one: `dask worker {address}`."
        ) from None
    for worker, said in client.run(version, on_error="return").items():
        if said != version():
            why = "grades in another way than this one" if isinstance(said, int) else f"cannot grade: {said}"
            raise CourseError(f"Worker {worker} {why}.", "Install this version of TinyTorch and NumPy on the workers.")
    return max(1, sum(client.nthreads().values()))


def _some_of(client, waiting: dict, address: str) -> list:
    """Those that are done, once at least one is."""
    from distributed import wait

    while True:
        try:
            return list(wait(list(waiting), timeout=PATIENCE, return_when="FIRST_COMPLETED").done)
        except TimeoutError:
            if client.status != "running" or not client.nthreads():
                raise CourseError(f"The Dask cluster at {address} has no workers any more.", GOES_ON) from None
