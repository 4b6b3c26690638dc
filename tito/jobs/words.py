"""What programs that we run for the user say and how they end: an exit code, and words where something was refused."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path


def exit_with(main: Callable[[], int | None]) -> None:
    """Run `main` and exit with its code; 130 after Ctrl-C, of which tito tells, and 1 after a file that failed."""
    try:
        code = main()
    except KeyboardInterrupt:
        code = 130
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"tito: {where}{error.strerror or error}.", file=sys.stderr)
        code = 1
    sys.exit(code or 0)


def model_from(checkpoint: Path) -> tuple:
    """The checkpoint's model, tokenizer and notes; a file that is none ends the program with one sentence."""
    from tinytorch.demo import language

    try:
        return language.load(checkpoint)
    except ValueError as error:
        sys.exit(f"tito: {error}")
