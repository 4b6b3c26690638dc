"""What programs that we run for the user say and how they end: an exit code, and words where something was refused."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path


def exit_with(main: Callable[[], int | None]) -> None:
    """Run `main` and exit with its code; 130 after Ctrl-C, of which tito tells; 1 where a file or memory failed."""
    for stream in filter(None, (sys.stdout, sys.stderr)):
        stream.reconfigure(errors="replace")  # what the terminal's encoding lacks is no reason to stop
    try:
        code = main()
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:  # the reader, e.g. `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except MemoryError as error:
        print(f"tito: there is not enough memory: {error}.", file=sys.stderr)
        code = 1
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
