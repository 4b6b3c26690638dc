"""The command line: parse, call one function, exit with its code.

Nothing beyond Typer is imported at the top. Each command imports its own module when it runs, so `tito --help` is
quick; tests/architecture/test_budgets.py measures that.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer


PLAIN = {"rich_markup_mode": None, "add_completion": False, "no_args_is_help": True}
app = typer.Typer(**PLAIN, help="TinyTorch: build a deep-learning framework in NumPy, lesson by lesson.")
module = typer.Typer(**PLAIN, help="Work on a lesson: start, test, complete, hint, reset, list.")
dev = typer.Typer(**PLAIN, help="For those who write lessons: build and verify.")
app.add_typer(module, name="module")
app.add_typer(dev, name="dev")

Numbers = Annotated[list[str] | None, typer.Argument(metavar="[LESSON]...", show_default=False)]


@dev.command()
def build(lessons: Numbers = None) -> None:
    """Build notebooks, package files and the index from src/ (all lessons, or those named)."""
    from tito.maintainer import build as job
    from tito.course import source

    root = source.find_root()
    changed = job.build(root, source.chosen(root, lessons or []))
    for path in changed:
        print(f"built {path.relative_to(root).as_posix()}")
    print(f"{len(changed)} files changed." if changed else "Everything was up to date.")


@dev.command()
def verify(lessons: Numbers = None) -> None:
    """Prove lessons: unsolved fails every check, solved passes all, wrong bodies fail with their message."""
    from tito.course import source
    from tito.maintainer import verify as job

    root = source.find_root()

    def tell(finding) -> None:
        print(f"{'FAIL' if finding.problem else 'ok  '} {finding.lesson} {finding.subject}")
        if finding.problem:
            print(f"       {finding.problem}")

    findings = job.verify(root, source.chosen(root, lessons or []), tell)
    failed = sum(finding.problem is not None for finding in findings)
    print(f"{len(findings) - failed} hold, {failed} fail.")
    raise typer.Exit(1 if failed else 0)


def main() -> None:
    """The entry point of the console script."""
    sys.exit(app())
