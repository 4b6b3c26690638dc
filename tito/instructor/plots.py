"""Plots as pictures inside a page: the same bytes for the same data, and a text that says what each shows."""

from __future__ import annotations

import base64
import functools
import io
import statistics
from dataclasses import dataclass

from tito.course.errors import CourseError
from tito.instructor.pages import number

STYLE = {"svg.hashsalt": "tinytorch", "font.family": "DejaVu Sans", "font.size": 9}  # the font comes with matplotlib
BLUE, ORANGE, WIDTH = "#3b6ea8", "#c8641b", 7.0
BINS = 10


@dataclass(frozen=True)
class Plot:
    """A picture as a data URL, and its content in words."""

    source: str
    alt: str


def drawn(height: float, draw, alt: str) -> Plot:
    """The picture that `draw(axes)` paints."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise CourseError(
            "The report needs matplotlib, which is not installed.", 'Run `pip install -e ".[plot]"` in the repository.'
        ) from None
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # whatever the user's own matplotlibrc says
        matplotlib.rcParams.update(STYLE)
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        draw(figure.subplots())
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
    return Plot("data:image/svg+xml;base64," + base64.b64encode(text.getvalue().encode()).decode(), alt)


def distribution(totals: list[float], most: float) -> Plot:
    """How many submissions earned how much of a lesson's points."""
    mean, median = statistics.fmean(totals), statistics.median(totals)
    top = max([most, *totals]) or 1.0
    edges = [top * i / BINS for i in range(BINS + 1)]

    def draw(axes) -> None:
        axes.hist(totals, bins=edges, color=BLUE, edgecolor="white")
        axes.axvline(mean, color=ORANGE, label=f"mean {mean:.1f}")
        axes.set(xlabel=f"points of {number(most)}", ylabel="submissions")
        axes.yaxis.get_major_locator().set_params(integer=True)
        axes.legend(frameon=False)

    said = f"{len(totals)} submissions: lowest {number(min(totals))}, median {number(median)}, mean {mean:.1f}, "
    return drawn(2.4, draw, f"Histogram of points. {said}highest {number(max(totals))} of {number(most)} points.")


def success(rates: list[tuple[str, float]]) -> Plot:
    """Which part of the submissions passed each check, in the lesson's order."""
    titles, shares = [title for title, _ in rates], [100 * rate for _, rate in rates]

    def draw(axes) -> None:
        bars = axes.barh(range(len(rates)), shares, color=BLUE)
        axes.bar_label(bars, [f"{share:.0f} %" for share in shares], padding=3)
        axes.set_yticks(range(len(rates)), [_literal(title) for title in titles])
        axes.invert_yaxis()
        axes.set(xlim=(0, 112), xlabel="submissions with full points, in %")

    said = ", ".join(f"{title} {share:.0f} %" for title, share in zip(titles, shares, strict=True))
    return drawn(0.7 + 0.27 * len(rates), draw, f"Bar chart of the share that passed each check: {said}.")


def timeline(days: list[tuple[str, int, float]]) -> Plot:
    """Submissions per day and their mean, in % of their lessons' points; only days with submissions."""
    labels = [day for day, _, _ in days]

    def draw(axes) -> None:
        axes.bar(range(len(days)), [count for _, count, _ in days], color=BLUE)
        axes.set_ylabel("submissions", color=BLUE)
        axes.yaxis.get_major_locator().set_params(integer=True)
        every = max(1, len(days) // 12)
        axes.set_xticks(range(0, len(days), every), labels[::every], rotation=45, ha="right")
        means = axes.twinx()
        means.plot(range(len(days)), [100 * mean for _, _, mean in days], color=ORANGE, marker="o")
        means.set(ylim=(0, 105))
        means.set_ylabel("mean, in % of the points", color=ORANGE)

    most = max(days, key=lambda day: day[1])
    said = f"{sum(count for _, count, _ in days)} submissions from {labels[0]} to {labels[-1]}, most on {most[0]}"
    return drawn(3.0, draw, f"Submissions per day with their mean score: {said} ({most[1]}).")


@functools.cache
def _literal(text: str) -> str:
    """A title as it is: matplotlib would read what stands between dollars as a formula."""
    return (text if len(text) <= 40 else text[:37] + "...").replace("$", r"\$")
