"""Start-up of the command line: `tito --help` against `import typer`, side by side on this machine."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
MOST = 1.5  # times the CPU seconds of `python -c "import typer"`
RUNS = 9
HEAVY = ["rich", "numpy", "jupytext", "nbformat", "nbclient", "nbgrader", "jupyter_client", "psutil", "pytest"]


def cpu_seconds(*arguments: str) -> float:
    """CPU time, user and system, of one run of this Python."""
    process = subprocess.Popen([sys.executable, *arguments], cwd=REPOSITORY, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, f"{arguments} ended with {process.returncode}"
    return usage.ru_utime + usage.ru_stime


@pytest.mark.skipif(not hasattr(os, "wait4"), reason="measures CPU time by wait4")
def test_help_costs_at_most_one_and_a_half_times_typer():
    """Medians of interleaved runs: a busy machine slows both alike."""
    pairs = [(cpu_seconds("-c", "import typer"), cpu_seconds("-m", "tito", "--help")) for _ in range(RUNS + 1)]
    typer, tito = (statistics.median(times) for times in zip(*pairs[1:], strict=True))  # the first fills caches
    print(f"import typer {typer:.3f} s, tito --help {tito:.3f} s, ratio {tito / typer:.2f}")
    assert tito <= MOST * typer, (
        f"tito --help takes {tito:.3f} CPU s, import typer {typer:.3f}: {tito / typer:.2f} times"
    )


@pytest.mark.parametrize("arguments", [["--help"], ["module", "--help"], ["--version"]])
def test_help_imports_nothing_heavy(arguments):
    """What the budget rests on, without a clock."""
    code = (
        "import sys\nfrom tito import main\n"
        f"try:\n    code = main.run({arguments!r})\nfinally:\n"
        f"    print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, encoding="utf-8")
    assert done.stderr.strip() == "[]", f"tito {' '.join(arguments)} imports {done.stderr.strip()}"
