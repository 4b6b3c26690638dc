"""`tito dev build` and `tito dev verify`: call the job, show what came of it, return the exit code."""

from __future__ import annotations

from tito import show
from tito.course import source
from tito.maintainer.build import build
from tito.maintainer.verify import Finding, verify


def build_lessons(names: list[str]) -> int:
    """Build the lessons that `names` tell (default: all) and say which files changed."""
    root = source.find_root()
    changed = build(root, source.chosen(root, names))
    for path in changed:
        show.line(f"built {path.relative_to(root).as_posix()}")
    files = "1 file" if len(changed) == 1 else f"{len(changed)} files"
    show.line(f"{files} changed." if changed else "Everything was up to date.")
    return 0


def verify_lessons(names: list[str]) -> int:
    """Verify the lessons that `names` tell (default: all), finding by finding."""
    root = source.find_root()

    def tell(finding: Finding) -> None:
        result = ("FAIL" if finding.problem else "ok", finding.lesson, finding.subject)
        show.rows([result], indent=0)
        if finding.problem:
            show.line(finding.problem, indent=10)

    findings = verify(root, source.chosen(root, names), tell)
    failed = sum(finding.problem is not None for finding in findings)
    show.line(f"{len(findings) - failed} hold, {failed} fail.")
    return 1 if failed else 0
