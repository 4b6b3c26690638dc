"""Around every command: one place where errors become words and an exit code.

0 success, 1 a mistake that the user can mend or a lesson that is not right yet, 2 a wrong command line, 70 an error
of ours, 130 Ctrl-C.
"""

from __future__ import annotations

import os
import sys

import typer

from tito import show
from tito.course.errors import CourseError

INTERRUPTED, UNEXPECTED = 130, 70


def run(app, arguments: list[str]) -> int:
    """Run one command line; returns the exit code. Every error becomes words here."""
    show.prepare()
    json = "--json" in arguments
    try:
        result = app(arguments, prog_name="tito", standalone_mode=False)
        if sys.stdout:  # None where it was closed before we began
            sys.stdout.flush()
        if result == INTERRUPTED:  # how newer versions of Typer hand over Ctrl-C
            show.problem("stopped.")
        return result if isinstance(result, int) else 0
    except CourseError as error:
        show.problem(error.message, error.hint, json)
        return 1
    except (KeyboardInterrupt, typer.Abort):
        show.problem("stopped.")
        return INTERRUPTED
    except BrokenPipeError:  # the reader, e.g. `head`, has seen enough
        show.abandon_stdout()
        return 1
    except OSError as error:  # no rights, no room, a file where a folder should be
        if os.environ.get("TITO_DEBUG"):
            raise
        if error.args and isinstance(error.args[0], list):  # of shutil: every file that could not be copied
            _, name, why = error.args[0][0]
            error = OSError(f"{name}: {str(why).split(': ')[0]}")
        where = f"{error.filename}: " if error.filename else ""
        show.problem(f"{where}{error.strerror or error}.", "`tito doctor` looks for what is wrong here.", json)
        try:
            if sys.stdout:
                sys.stdout.flush()
        except OSError:  # it was stdout that failed
            show.abandon_stdout()
        return 1
    except Exception as error:
        if hasattr(error, "format_message"):  # a wrong command line
            show.problem(*_usage(error), json)
            return 2
        if os.environ.get("TITO_DEBUG"):
            raise
        show.crash(error)
        return UNEXPECTED


def _usage(error) -> tuple[str, str]:
    """What is wrong with a command line, and where to look."""
    context = getattr(error, "ctx", None)
    path = context.command_path if context else "tito"
    return error.format_message(), f"`{path} --help` shows what it takes."
