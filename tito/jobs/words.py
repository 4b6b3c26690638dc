"""How a program that we run for the user ends: by an exit code, and by words where the system refused something."""

from __future__ import annotations

import sys
from collections.abc import Callable


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
