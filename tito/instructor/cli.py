"""The commands `tito grade …`. Imports nothing heavy: each command imports its own module when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

HELP = """Grade a class with nbgrader, from release to feedback.

Begin with `tito grade init DIRECTORY`. All other commands work in the course that the current folder lies in."""

grade = typer.Typer(
    rich_markup_mode=None, add_completion=False, pretty_exceptions_enable=False, invoke_without_command=True, help=HELP,
    context_settings={"help_option_names": ["--help", "-h"], "max_content_width": 100},
)  # fmt: skip

Lesson = Annotated[str, typer.Argument(metavar="LESSON", help="17, memoization or 17_memoization.")]
CourseFolder = Annotated[Path | None, typer.Option("--course", metavar="DIR", help="Default: the current folder's.")]
Jobs = Annotated[int | None, typer.Option("--jobs", "-j", metavar="N", min=1, help="Default: one per core.")]
Students = Annotated[list[str] | None, typer.Option("--student", metavar="ID", help="Only this one; repeatable.")]
Rerun = Annotated[bool, typer.Option("--rerun", help="Run again what has a result already.")]
Sandbox = Annotated[str, typer.Option(metavar="LEVEL", help="auto, bwrap, landlock or none.")]
Cumulative = Annotated[bool, typer.Option("--cumulative", help="On the student's own package, not the reference.")]


@grade.callback()
def _help_if_alone(context: typer.Context) -> None:
    """Without a command, show which there are."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def _course(folder: Path | None):
    from tito.instructor import course

    return course.find(folder)


@grade.command()
def init(
    directory: Annotated[Path, typer.Argument(metavar="DIRECTORY", help="A new or empty folder.")],
    roster: Annotated[Path | None, typer.Option(metavar="CSV", help="Columns id, name, email.")] = None,
    course_id: Annotated[str, typer.Option(metavar="ID", help="nbgrader's name of the course.")] = "tinytorch",
) -> int:
    """Make the folder of a class: a course of nbgrader."""
    from tito.instructor import init as job

    return job.init(directory, roster, course_id)


@grade.command()
def roster(
    file: Annotated[Path, typer.Argument(metavar="CSV", help="Columns id, name, email.")], course: CourseFolder = None
) -> int:
    """Add the students of a CSV, or correct their names."""
    from tito.instructor import roster as job

    return job.update(_course(course), file)


@grade.command()
def release(
    lesson: Lesson,
    upto: Annotated[bool, typer.Option("--upto", help="And every lesson before it.")] = False,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="The students' folder. Default: student/.")] = None,
    course: CourseFolder = None,
) -> int:
    """Release a lesson, and build what students get."""
    from tito.instructor import release as job

    return job.release(_course(course), lesson, upto, out)


@grade.command()
def collect(
    lesson: Lesson,
    source: Annotated[Path | None, typer.Argument(metavar="PATH", help="A folder or a zip file.")] = None,
    form: Annotated[
        str,
        typer.Option("--from", metavar="FORM", help="auto, folder, canvas, moodle, gradescope, git or exchange."),
    ] = "auto",
    due: Annotated[str | None, typer.Option(metavar="TIME", help='As "2026-11-30 23:59"; later is late.')] = None,
    course: CourseFolder = None,
) -> int:
    """Bring in submissions; a newer one replaces an older."""
    from tito.instructor import collect as job

    return job.collect(_course(course), lesson, source, form, due)


@grade.command()
def autograde(
    lesson: Lesson,
    jobs: Jobs = None,
    student: Students = None,
    rerun: Rerun = False,
    sandbox: Sandbox = "auto",
    cumulative: Cumulative = False,
    scheduler: Annotated[str | None, typer.Option(metavar="TCP", help="A Dask cluster: tcp://host:port.")] = None,
    course: CourseFolder = None,
) -> int:
    """Grade what was collected, or go on where it was stopped."""
    from tito.instructor import autograde as job

    return job.autograde(_course(course), lesson, jobs, student or [], rerun, sandbox, cumulative, scheduler)


@grade.command()
def plan(
    lesson: Lesson, student: Students = None, cumulative: Cumulative = False, course: CourseFolder = None
) -> int:
    """Write jobs, one per submission, for any machine."""
    from tito.instructor import autograde as job

    return job.plan(_course(course), lesson, student or [], cumulative)


@grade.command()
def run(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="grading/LESSON of a course, or a copy of it.")],
    shard: Annotated[str, typer.Option(metavar="I/N", help="Only every N-th job, from the I-th.")] = "1/1",
    jobs: Jobs = None,
    rerun: Rerun = False,
    sandbox: Sandbox = "auto",
) -> int:
    """Run planned jobs; needs neither course nor gradebook."""
    from tito.instructor import autograde as job

    return job.run(folder, shard, jobs, rerun, sandbox)


@grade.command()
def merge(lesson: Lesson, course: CourseFolder = None) -> int:
    """Bring results into the gradebook; twice is as once."""
    from tito.instructor import autograde as job

    return job.merge(_course(course), lesson)


@grade.command()
def feedback(
    lesson: Lesson,
    student: Students = None,
    course: CourseFolder = None,
) -> int:
    """Write one HTML page per student."""
    from tito.instructor import feedback as job

    return job.feedback(_course(course), lesson, student or [])


@grade.command()
def export(
    lesson: Annotated[str | None, typer.Argument(metavar="LESSON", help="Default: all.")] = None,
    form: Annotated[str, typer.Option("--to", metavar="FORM", help="csv, canvas or moodle.")] = "csv",
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Default: grades.csv, canvas.csv or moodle.csv in the course.")
    ] = None,
    like: Annotated[
        Path | None, typer.Option(metavar="CSV", help="For canvas: its own gradebook export, whose rows to fill.")
    ] = None,
    course: CourseFolder = None,
) -> int:
    """Write grades as CSV, or as Canvas and Moodle import them."""
    from tito.instructor import export as job

    return job.export(_course(course), lesson, form, out, like)


@grade.command()
def report(
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Default: report.html in the course.")] = None,
    course: CourseFolder = None,
) -> int:
    """Write a page with plots of the class."""
    from tito.instructor import report as job

    return job.report(_course(course), out)
