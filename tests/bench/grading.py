"""`make bench BENCH=grading`: what `tito grade autograde` costs beside nbgrader's own autograding, on this machine.

One class of lesson 17 (solved notebooks, and the wrong solutions that its checks must catch) is graded by
`nbgrader autograde` in one batch, by nbgrader's API in one process, and by tito in its sandbox; all must come to the
same points. CPU seconds are those of every process that takes part. What the lesson's own cells take is measured
apart, by running the same cells once in a plain interpreter; the rest of the CPU seconds is what grading adds.
"""

import argparse
import json
import os
import shutil
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import damaged

from tito.course import manifest, source
from tito.instructor import assignment as assignments
from tito.instructor import job as jobs
from tito.instructor import results
from tito.instructor.course import GradingCourse

ROOT = Path(__file__).resolve().parents[2]
LESSON, DAMAGED_LESSON = "17", "04"
TARGET = 0.25  # CPU seconds per submission beyond the lesson's own cells

# A run of tito that also tells what `wait` does not: the CPU seconds of programs in a namespace that is ended with
# them in it, and the peak memory of the process itself.
TITO = """
import json, os, sys, time
import psutil
from tito import main
from tito.instructor import sandbox

lost, end = [], sandbox.end

def seconds(process):
    times = process.cpu_times()
    return time.clock_gettime(~process.pid << 3 | 2) + times.children_user + times.children_system

def counted(level, process, mark):
    if level in ("bwrap", "landlock+userns"):
        try:
            first = psutil.Process(process.pid).children()
            lost.append(sum(seconds(each) for one in first for each in one.children(recursive=True)))
        except (psutil.Error, OSError):
            pass
    return end(level, process, mark)

sandbox.end = counted
code = main.run(sys.argv[2:])
with open("/proc/self/status") as status:
    peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
with open(sys.argv[1], "w") as report:
    json.dump({"lost": sum(lost), "peak": peak / 1024}, report)
sys.exit(code)
"""

API = """
import sys
from pathlib import Path
from nbgrader.apps.api import NbGraderAPI
from tito.instructor.course import GradingCourse
from tito.instructor.nbgrader_setup import nbgrader_ready, settings

course = GradingCourse(Path.cwd())
with nbgrader_ready():
    api = NbGraderAPI(config=settings(course))
    for student in course.submitters(sys.argv[1]):
        api.autograde(sys.argv[1], student)
"""

# The cells of a notebook in one interpreter, as `exec` runs them: CPU seconds, imports included.
PLAIN = """
import io, json, sys, time, types
from contextlib import redirect_stdout

cells = json.load(sys.stdin)
main = sys.modules["__main__"] = types.ModuleType("__main__")
before = time.process_time()
for cell in cells:
    with redirect_stdout(io.StringIO()):
        try:
            exec(compile(cell, "<cell>", "exec"), main.__dict__)
        except Exception:
            pass
print(time.process_time() - before)
"""


@dataclass(frozen=True)
class Cost:
    cpu: float
    wall: float
    peak: float = 0.0  # MiB, of the process that drives the others


def environment(package: Path) -> dict[str, str]:
    one_thread = {f"{library}_NUM_THREADS": "1" for library in ("OMP", "OPENBLAS", "MKL")}
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return os.environ | one_thread | {"PYTHONPATH": f"{package}{os.pathsep}{ROOT}", "PATH": path}


def measured(command: list[str], folder: Path, package: Path) -> Cost:
    """Run it in `folder`; CPU seconds of it and of every process that it waited for."""
    started = time.perf_counter()
    with open(folder.parent / "output.txt", "w") as output:
        process = subprocess.Popen(command, cwd=folder, env=environment(package), stdout=output, stderr=output)
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return Cost(usage.ru_utime + usage.ru_stime, time.perf_counter() - started)


def by_tito(folder: Path, package: Path, *arguments: str) -> Cost:
    report = folder.parent / "report.json"
    report.unlink(missing_ok=True)
    cost = measured([sys.executable, "-c", TITO, str(report), "grade", *arguments], folder, package)
    if not report.is_file():
        raise SystemExit((folder.parent / "output.txt").read_text())
    told = json.loads(report.read_text())
    return replace(cost, cpu=cost.cpu + told["lost"], peak=told["peak"])


def points(folder: Path) -> dict[tuple[str, str], float | None]:
    """(student, check) -> points, as nbgrader's gradebook holds them; None where it waits for a person."""
    with sqlite3.connect(folder / "gradebook.db") as db:
        rows = db.execute(
            """SELECT a.student_id, b.name, g.auto_score, g.needs_manual_grade FROM grade g
            JOIN submitted_notebook n ON g.notebook_id = n.id JOIN submitted_assignment a ON n.assignment_id = a.id
            JOIN base_cell b ON g.cell_id = b.id"""
        ).fetchall()
    return {(student, name): None if waits else score for student, name, score, waits in rows}


def submissions(lesson, count: int) -> list[str]:
    """Notebooks: every third one solved, the others each with one of the listed wrong solutions."""
    cells = {cell.grade_id: cell for cell in source.cells(lesson)}
    wrong = [(f"{lesson.number}-{e['id']}", w) for e in source.exercises(lesson) for w in e.get("wrong", [])]
    texts = []
    for number in range(count):
        name, one = wrong[number % len(wrong)]
        body = source.with_body(cells[name].source, one["body"], one.get("hole", 1))
        spoiled = {name: source.MARKER.sub("", body)} if number % 3 else {}
        texts.append(source.solved_notebook(lesson, spoiled))
    return texts


def new_course(folder: Path, lesson, texts: dict[str, str], package: Path) -> Path:
    """A course, made by the commands that an instructor uses, with the submissions collected."""
    folder.mkdir()
    (folder / "class.csv").write_text("id,name,email\n" + "".join(f"{name},,\n" for name in texts))
    for name, text in texts.items():
        path = folder / "handed_in" / name / f"{lesson.name}.ipynb"
        path.parent.mkdir(parents=True)
        path.write_text(text, encoding="utf-8")
    course = folder / "course"
    for arguments in (["init", "course", "--roster", "class.csv"], ["release", lesson.number, "--course", "course"],
                      ["collect", lesson.number, "handed_in", "--course", "course"]):  # fmt: skip
        measured([sys.executable, "-m", "tito", "grade", *arguments], folder, package)
    frozen = assignments.load(GradingCourse(course), lesson.number)
    for name, text in frozen.package.items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(text, encoding="utf-8")
    return course


def own_seconds(frozen, text: str, package: Path, measure: bool) -> float:
    """CPU seconds of the cells of a submission, with the graded ones as they are graded."""
    written = {cell["id"]: "".join(cell["source"]) for cell in json.loads(text)["cells"]}
    cells = [
        cell.source if cell.role in ("check", "locked") else written[cell.id]
        for cell in frozen.cells
        if cell.kind == "code" and (measure or "-measure-" not in cell.id)
    ]
    done = subprocess.run([sys.executable, "-c", PLAIN], input=json.dumps(cells), env=environment(package),
                          capture_output=True, encoding="utf-8", check=True)  # fmt: skip
    return float(done.stdout.split()[-1])


def copied(course: Path, name: str, students: list[str]) -> Path:
    """The course again, with the submissions of `students` only."""
    copy = course.parent.parent / name / "course"
    shutil.copytree(course, copy)
    for path in (copy / "submitted").iterdir():
        if path.name not in students:
            shutil.rmtree(path)
    return copy


def cost_page(work: Path, count: int, stock: int, repeats: int) -> Path:
    lesson = manifest.load(ROOT).lesson(LESSON)
    package, texts = work / "package", {f"s{n:03d}": text for n, text in enumerate(submissions(lesson, count))}
    course = new_course(work / "class", lesson, texts, package)
    frozen, name = assignments.load(GradingCourse(course), LESSON), lesson.folder
    few = list(texts)[:stock]
    own = [own_seconds(frozen, text, package, measure=False) for text in texts.values()]
    whole = statistics.median(own_seconds(frozen, texts["s000"], package, measure=True) for _ in range(3))
    print(f"\n{name}: the cells of a solved notebook take {whole:.2f} s CPU; without those that only measure, which "
          f"tito leaves out, {statistics.median(own):.2f} s (median of {count} submissions)", flush=True)
    nbgrader = [sys.executable, "-m", "nbgrader"]
    by_command = copied(course, "command", few)
    rows = [("nbgrader autograde", len(few), measured([*nbgrader, "autograde", name], by_command, package), whole)]
    by_api = copied(course, "api", few)
    rows.append(("nbgrader's API", len(few), measured([sys.executable, "-c", API, name], by_api, package), whole))
    costs = [by_tito(course, package, "autograde", LESSON, "--jobs", "2", "--rerun") for _ in range(repeats)]
    cost = Cost(*(statistics.median(each) for each in zip(*((c.cpu, c.wall, c.peak) for c in costs), strict=True)))
    rows.append(("tito, sandboxed, 2 jobs", count, cost, statistics.fmean(own)))
    print(f"{'':24} {'students':>8} {'wall s':>8} {'CPU s':>8} {'per student':>12} {'its cells':>10} {'rest':>6}")
    for title, number, each, cells in rows:
        per = each.cpu / number
        print(f"{title:24} {number:8} {each.wall:8.1f} {each.cpu:8.1f} {per:12.2f} {cells:10.2f} {per - cells:6.2f}")
    rest = cost.cpu / count - statistics.fmean(own)
    print(f"beyond the cells that it runs, tito takes {rest:.2f} s CPU per submission (target {TARGET:.2f}); "
          f"beyond all cells of the lesson {cost.cpu / count - whole:.2f} s", flush=True)
    theirs, ours = (points(each) for each in (by_command, course))
    assert theirs == points(by_api), "nbgrader's command and its API differ"
    differ = [key for key in theirs if theirs[key] != ours[key]]
    assert theirs and not differ, differ
    print(f"points: equal in all {len(theirs)} checks of {len(few)} submissions")
    return course


def memory_page(course: Path, package: Path, many: int) -> None:
    """Peak memory of tito's own process for this class, and for `many` copies of it with their results there."""
    small = by_tito(course, package, "autograde", LESSON).peak
    grading = GradingCourse(course).grading(manifest.load(ROOT).lesson(LESSON).folder)
    students = sorted(path.stem for path in (grading / "results").glob("*.json"))
    more = [f"x{number:04d}" for number in range(many - len(students))]
    roster = course.parent / "more.csv"
    roster.write_text("id,name,email\n" + "".join(f"{name},,\n" for name in more))
    measured([sys.executable, "-m", "tito", "grade", "roster", str(roster)], course, package)
    for number, name in enumerate(more):
        shutil.copytree(course / "submitted" / students[number % len(students)], course / "submitted" / name)
    measured([sys.executable, "-m", "tito", "grade", "plan", LESSON], course, package)
    for number, name in enumerate(more):
        result = results.read(grading / "results" / f"{students[number % len(students)]}.json")[0]
        key = jobs.read(grading / "jobs" / f"{name}.json").key
        (grading / "results" / f"{name}.json").write_text(replace(result, student=name, job=key).as_text())
    large = by_tito(course, package, "autograde", LESSON).peak
    print(f"\npeak memory of tito's process: {small:.0f} MiB for {len(students)} submissions, "
          f"{large:.0f} MiB for {many}", flush=True)


def damage_page(work: Path) -> None:
    """Damaged and hostile submissions in one course. A row is complete where every check has points, and where points
    are missing a reason for the student."""
    lesson = manifest.load(ROOT).lesson(DAMAGED_LESSON)
    texts = damaged.submissions(source.solved_notebook(lesson))
    package = work / "package04"
    ours = new_course(work / "damage", lesson, texts, package)
    grading = GradingCourse(ours).grading(lesson.folder)
    frozen = assignments.load(GradingCourse(ours), lesson.number)
    stock = copied(ours, "damage_stock", list(texts))
    with open(stock / "nbgrader_config.py", "a") as config:
        config.write("c.ExecutePreprocessor.timeout = 4\n")
    measured([sys.executable, "-c", API, lesson.folder], stock, package)
    measured([sys.executable, "-m", "tito", "grade", "plan", lesson.number], ours, package)
    for path in (grading / "jobs").glob("*.json"):
        job = jobs.read(path)
        path.write_text(replace(job, limits=replace(job.limits, cell_seconds=4.0, seconds=20.0)).as_text())
    by_tito(ours, package, "run", str(grading), "--jobs", "2")
    by_tito(ours, package, "merge", lesson.number)
    mine, theirs = points(ours), points(stock)
    names = [check.grade_id for check in frozen.checks]

    def row(found: dict, student: str) -> tuple[bool, str]:
        scores = [found.get((student, name)) for name in names]
        return None not in scores, f"{sum(filter(None, scores)):g}"

    print(f"\n{len(texts)} damaged or hostile submissions of {lesson.folder} ({frozen.max_score:g} points)")
    print(f"{'':26} {'nbgrader':>12} {'tito':>12}   reason or flag")
    complete = {"nbgrader": 0, "tito": 0}
    for student in texts:
        told = results.read(grading / "results" / f"{student}.json")[0]
        said = [told.problem, *told.flags, *told.findings, *(c.message for c in told.checks)] if told else []
        reason = " ".join(next(filter(None, said), "").split())
        cells = []
        for who, found in (("nbgrader", theirs), ("tito", mine)):
            whole, earned = row(found, student)
            whole = whole and (who != "tito" or bool(reason) or float(earned) == frozen.max_score)
            complete[who] += whole
            cells.append(earned if whole else f"{earned}, open")
        print(f"{student:26} {cells[0]:>12} {cells[1]:>12}   {reason[:70]}")
    print(f"complete rows: nbgrader {complete['nbgrader']} of {len(texts)}, tito {complete['tito']} of {len(texts)}")


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python tests/bench grading", description=__doc__.splitlines()[0])
    parser.add_argument("--students", type=int, default=40, help="submissions of lesson 17")
    parser.add_argument("--stock", type=int, help="how many of them nbgrader grades (default: all)")
    parser.add_argument("--repeats", type=int, default=1, help="runs of tito, of which the median is shown")
    parser.add_argument("--many", type=int, default=400, help="submissions for the second figure of memory; 0: none")
    parser.add_argument("--no-damage", action="store_true", help="without the damaged and hostile submissions")
    options = parser.parse_args(arguments)
    print(f"{os.cpu_count()} cores, Python {sys.version.split()[0]}, load {os.getloadavg()[0]:.1f} when it began")
    with tempfile.TemporaryDirectory(prefix="bench-") as work:
        course = cost_page(Path(work), options.students, options.stock or options.students, options.repeats)
        if options.many:
            memory_page(course, Path(work) / "package", options.many)
        if not options.no_damage:
            damage_page(Path(work))
