"""What a class made of a lesson, on one screen: points per check, their distribution, the commonest failures."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from tito import show
from tito.instructor import results
from tito.instructor.assignment import Assignment

BAR = 30  # columns
FAILURES = 5


def show_summary(assignment: Assignment, folder: Path, students: list[str]) -> None:
    """Read the results of `students` one by one and show what they come to."""
    passed, failures, totals, levels = Counter(), Counter(), [], Counter()
    problems, flagged = [], []
    for student in students:
        result, _ = results.read(folder / "results" / f"{student}.json")
        if result is None:
            continue
        totals.append(result.earned)
        levels[result.sandbox] += 1
        passed.update(check.id for check in result.checks if check.earned == check.points)
        failures.update((check.id, _brief(check.message)) for check in result.checks if check.message)
        problems += [student] if result.problem else []
        flagged += [student] if result.flags else []
    if not totals:
        return
    show.heading(f"{assignment.name}: {assignment.title}", show.count(len(totals), "submission"))
    names = [check.grade_id for check in assignment.checks]
    points = [f"{check.points:g}" for check in assignment.checks]
    shares = [f"{passed[name]}/{len(totals)}" for name in names]
    titles = [assignment.titles.get(name, "") for name in names]
    show.rows(list(zip(names, points, shares, titles)), header=("check", "points", "passed", ""), right=(1, 2))
    show.line()
    show.rows(_distribution(totals, assignment.max_score), right=(0, 1))
    common = [(check, f"{count}x", message) for (check, message), count in failures.most_common(FAILURES)]
    if common:
        show.line()
        show.heading("Commonest failures")
        show.rows(common, right=(1,))
    show.line()
    show.line(f"Sandbox: {', '.join(f'{level} ({count})' for level, count in levels.items())}.")
    if problems:
        show.line(f"Runs with a problem: {', '.join(problems)}.")
    if flagged:
        show.line(f"Please look at: {', '.join(flagged)}.", style="yellow")
    show.line(f"A log per student: {folder / 'logs'}")


def _distribution(totals: list[float], most: float) -> list[tuple[str, str, str]]:
    """Ten classes of points, each with its number and a bar; empty classes at both ends are left out."""
    classes = Counter(min(9, int(10 * total / most)) if most else 0 for total in totals)
    widest = max(classes.values())
    rows = []
    for number in range(min(classes), max(classes) + 1):
        count = classes[number]
        bar = "#" * max(round(BAR * count / widest), 1 if count else 0)
        rows.append((f"{number * most / 10:g} to {(number + 1) * most / 10:g}", str(count), bar))
    return rows


def _brief(message: str) -> str:
    first = message.strip().splitlines()[0] if message.strip() else ""
    return first if len(first) <= 100 else first[:97] + "..."
