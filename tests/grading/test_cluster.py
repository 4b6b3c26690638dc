"""`--scheduler`: a class on a Dask cluster of two worker processes comes to what it comes to on this machine."""

from __future__ import annotations

import json
import sys
import threading
import time

import psutil
import pytest

pytest.importorskip("distributed", reason="a cluster needs the extra `cluster`")

import distributed

from tito.course.errors import CourseError
from tito.course.processes import MARK
from tito.instructor import cluster, job, pool
from tito.instructor.assignment import Assignment, AssignmentCell
from tito.instructor.job import Job

HOLE, CHECK = "raise NotImplementedError\n", "assert double(3) == 6, f'got {double(3)}'\n"
SUBMITTED = {
    "ada": "def double(x):\n    return 2 * x\n",
    "bob": "import time\ntime.sleep(2)\n\n\ndef double(x):\n    return x\n",
    "cyd": "import os\nos._exit(3)\n",
    "dan": "def double(x) return\n",
    "eve": "import random\n\n\ndef double(x):\n    return random.random()\n",
}


@pytest.fixture(scope="module")
def lesson() -> Assignment:
    marks = {"schema_version": 3, "task": False, "locked": False, "solution": True, "grade": False}
    hole = AssignmentCell("01-double", "code", "hole", HOLE, HOLE, {"nbgrader": marks | {"grade_id": "01-double"}})
    marks = marks | {"locked": True, "solution": False, "grade": True, "points": 2, "grade_id": "01-double-test"}
    check = AssignmentCell("01-double-test", "code", "check", CHECK, CHECK, {"nbgrader": marks})
    package = {"tinytorch/__init__.py": ""}
    return Assignment("01_scale", "scale", "01", "Scale", "tinytorch.scale", (hole, check), {}, {}, {}, package)


@pytest.fixture(scope="module")
def jobs(lesson, tmp_path_factory) -> list:
    """One job per student, on disk."""
    paths = []
    for student, source in SUBMITTED.items():
        cells = [
            {"cell_type": "code", "id": cell.id, "metadata": cell.metadata, "source": text}
            for cell, text in zip(lesson.cells, (source, CHECK), strict=True)
        ]
        text = json.dumps({"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5})
        path = tmp_path_factory.getbasetemp() / f"{student}.json"
        path.write_text(Job(student, lesson.name, lesson.hash, text).as_text(), encoding="utf-8")
        paths.append(path)
    return paths


def results(outcomes) -> dict[str, dict]:
    """Every result, without the seconds that it took."""
    found = {}
    for path, text, problem in outcomes:
        assert text, problem
        result = json.loads(text)
        for timed in (result, *result["checks"]):
            timed.pop("seconds")
        assert path.stem not in found
        found[path.stem] = result
    return found


@pytest.fixture(scope="module")
def here(jobs, lesson, wanted) -> dict[str, dict]:
    """The oracle: the same jobs without a cluster."""
    return results(pool.on_this_machine(jobs, lesson, wanted, 2))


@pytest.fixture(scope="module")
def workers():
    """A scheduler and two workers, each a process of its own."""
    options = {"n_workers": 2, "threads_per_worker": 1, "processes": True, "dashboard_address": ":0"}
    with distributed.LocalCluster(**options, silence_logs=60) as made:
        yield made


def test_results_are_those_without_it(jobs, lesson, wanted, here, workers):
    assert {name: result["checks"][0]["earned"] for name, result in here.items()} == {
        "ada": 2.0, "bob": 0.0, "cyd": 0.0, "dan": 0.0, "eve": 0.0,
    }  # fmt: skip
    for _ in range(2):  # also when the scheduler has seen these jobs before
        assert results(cluster.on_cluster(jobs, lesson, wanted, workers.scheduler_address)) == here


def test_a_worker_that_is_killed_gives_its_jobs_to_another(jobs, lesson, wanted, here, workers):
    """The one that runs bob's submission, which takes two seconds."""
    pids = [worker.process.pid for worker in workers.workers.values()]
    killed = []

    def kill_one() -> None:
        deadline = time.monotonic() + 60
        while not killed and time.monotonic() < deadline:
            for pid in pids:
                if psutil.pid_exists(pid) and any(map(_is_sandboxed, psutil.Process(pid).children(recursive=True))):
                    psutil.Process(pid).kill()
                    killed.append(pid)
                    return
            time.sleep(0.05)

    slow_first = sorted(jobs, key=lambda path: path.stem != "bob")
    killer = threading.Thread(target=kill_one)
    killer.start()
    found = results(cluster.on_cluster(slow_first, lesson, wanted, workers.scheduler_address))
    killer.join()
    assert killed and found == here


def _is_sandboxed(process: psutil.Process) -> bool:
    try:
        return MARK in process.environ()
    except psutil.Error:
        return False


def test_a_job_that_breaks_is_reported_and_the_others_go_on(jobs, lesson, wanted, here, workers, tmp_path):
    broken = tmp_path / "zoe.json"
    broken.write_text('{"student": "zoe"}')
    told = list(cluster.on_cluster([broken, *jobs], lesson, wanted, workers.scheduler_address))
    ((_, text, problem),) = [each for each in told if each[0] == broken]
    assert text is None and "KeyError" in problem
    assert results(each for each in told if each[0] != broken) == here


def test_a_worker_that_grades_in_another_way_is_refused(jobs, lesson, wanted, workers, monkeypatch):
    monkeypatch.setattr(job, "VERSION", job.VERSION + 1)
    with pytest.raises(CourseError, match="grades in another way"):
        list(cluster.on_cluster(jobs, lesson, wanted, workers.scheduler_address))


def test_nobody_answers(jobs, lesson, wanted, monkeypatch):
    monkeypatch.setattr(cluster, "PATIENCE", 1.0)
    for address in ("tcp://127.0.0.1:1", "nonsense://x", "tcp://no.such.host.invalid:8786"):
        with pytest.raises(CourseError, match="No Dask scheduler answers") as caught:
            list(cluster.on_cluster(jobs, lesson, wanted, address))
        assert "dask scheduler" in caught.value.hint


def test_a_scheduler_without_workers(jobs, lesson, wanted, monkeypatch):
    monkeypatch.setattr(cluster, "PATIENCE", 2.0)
    with distributed.LocalCluster(n_workers=0, dashboard_address=":0", silence_logs=60) as empty:
        with pytest.raises(CourseError, match="has no workers"):
            list(cluster.on_cluster(jobs, lesson, wanted, empty.scheduler_address))


def test_the_last_worker_goes(jobs, lesson, wanted, monkeypatch):
    """Nothing waits for ever, and what was finished before was told."""
    monkeypatch.setattr(cluster, "PATIENCE", 2.0)
    options = {"n_workers": 1, "threads_per_worker": 1, "processes": False, "dashboard_address": ":0"}
    with distributed.LocalCluster(**options, silence_logs=60) as small:
        outcomes = cluster.on_cluster(jobs, lesson, wanted, small.scheduler_address)
        next(outcomes)
        small.scale(0)
        with pytest.raises(CourseError, match="no workers any more"):
            list(outcomes)


def test_without_dask_it_says_what_to_install(jobs, lesson, wanted, monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(CourseError, match="Dask, which is not installed") as caught:
        list(cluster.on_cluster(jobs, lesson, wanted, "tcp://127.0.0.1:8786"))
    assert "cluster" in caught.value.hint


def test_with_nothing_to_run_nobody_is_asked(lesson, wanted):
    assert list(cluster.on_cluster([], lesson, wanted, "tcp://127.0.0.1:1")) == []
