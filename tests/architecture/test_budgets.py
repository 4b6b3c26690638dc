"""Start-up of the command line: what `tito --help` loads, beside what `import typer` loads."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
HEAVY = ["rich", "numpy", "jupytext", "nbformat", "nbclient", "nbgrader", "jupyter_client", "psutil", "pytest"]


def loaded(code: str) -> set[str]:
    """Modules that are there after `code` in a fresh Python."""
    code += "\nimport sys\nprint('\\n' + ' '.join(sys.modules))\n"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, encoding="utf-8", check=True)
    return set(done.stdout.splitlines()[-1].split())


def test_help_loads_typer_and_a_few_files_of_ours():
    """What the start costs, counted without a clock: a timed test would fail on a busy machine."""
    more = loaded("from tito import main\nmain.run(['--help'])") - loaded("import typer")
    ours = {name for name in more if name.split(".")[0] == "tito"}
    others = {name for name in more - ours if name.split(".")[0] not in sys.stdlib_module_names | {"typer", "click"}}
    assert "tito.main" in ours and len(ours) <= 10, f"files of tito: {sorted(ours)}"
    assert not others and len(more - ours) <= 10, f"others: {sorted(more - ours)}"


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
