"""What a run is told as: a table, a file of JSON, a page, a plot; and the machine that it ran on."""

import json
import os
import platform
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

from harness import Figure, Row
from workload import Claim

HEAD = ("workload", "tinytorch", "peer", "its figure", "ratio (quartiles)", "by CPU time", "limit", "holds")
RIGHT = (1, 3, 5)  # columns of figures


@dataclass(frozen=True)
class Run:
    """All that is known of a run."""

    rows: list[Row]
    date: str
    machine: str
    versions: dict[str, str]
    threads: int
    load: list[float]  # when it began, and when it ended
    seconds: float
    left_out: list[str]  # sentences
    quick: bool

    def setting(self) -> str:
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        before, after = self.load
        return (f"{self.date}; {self.machine}; {versions}; float32, threads per process: {self.threads}; "
                f"load {before:.1f} before and {after:.1f} after; {self.seconds:.0f} s")  # fmt: skip


def today() -> str:
    return datetime.now(UTC).date().isoformat()


def machine() -> str:
    model = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as info:
            model = next(line.split(":")[1].strip() for line in info if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return f"{model}, {os.cpu_count()} cores, {platform.system()}"


def versions() -> dict[str, str]:
    found = {"Python": platform.python_version()}
    for name, package in {"NumPy": "numpy", "PyTorch": "torch", "transformers": "transformers"}.items():
        try:
            found[name] = metadata.version(package)
        except metadata.PackageNotFoundError:
            pass
    return found


def number(value: float) -> str:
    """Three digits that count."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def limit(claim: Claim) -> str:
    if claim.least is not None:
        return f"at least {claim.least:g}"
    return "" if claim.most is None else f"at most {claim.most:g}"


def spread(ratio: Figure) -> str:
    return f"{ratio.median:.2f} ({ratio.low:.2f} to {ratio.high:.2f})"


def cells(row: Row) -> tuple[str, ...]:
    """A row as text; a problem is told below the table."""
    claim = row.claim
    if row.problem:
        return row.title, "", claim.theirs, "", "failed", "", limit(claim), "no" if limit(claim) else ""
    unit = f"{claim.unit} CPU" if claim.clock == "cpu" else claim.unit
    ours, theirs = (f"{number(each.median)} {unit}" for each in (row.ours, row.theirs))
    by_cpu, kept = f"{row.cpu_ratio.median:.2f}", {True: "yes", False: "no", None: ""}[row.holds]
    return row.title, ours, claim.theirs, theirs, spread(row.ratio), by_cpu, limit(claim), kept


def notes(run: Run) -> list[str]:
    """What the table does not say."""
    return [f"{row.title}, beside {row.claim.theirs}: {row.problem}" for row in run.rows if row.problem] + run.left_out


def as_text(run: Run) -> str:
    """Aligned columns: figures to the right, words to the left."""
    lines = [HEAD, *map(cells, run.rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    table = [
        "  ".join(cell.rjust(width) if place in RIGHT else cell.ljust(width)
                  for place, (cell, width) in enumerate(zip(line, widths, strict=True))).rstrip()
        for line in lines]  # fmt: skip
    return "\n".join([*table, *notes(run), run.setting()])


def as_json(run: Run) -> str:
    return json.dumps(asdict(run), indent=1)


PAGE = """# Benchmarks

What this project does beside its peers, on one machine, in one run; `make bench` measures yours.

{table}

{notes}{setting}

Every workload is run in turn by all who take part, each peer in a process of its own, in float32 and with the same
number of threads. A figure is the median of the rounds; a ratio is the median of the ratios of neighbouring rounds,
with its quartiles. By CPU time it is free of the time that other programs took, and not of what they did to memory.
transformers runs its eager attention, or PyTorch's kernel (sdpa), with its cache; weights are random, and the same for
all. Our training keeps freed memory (`keep_memory`, lesson 07). The read limit is what a matrix of 512 MiB times a
vector reads per second, in the same run.

This page is written by `make bench BENCH_OPTIONS=--page`, after a full run.
"""


def as_page(run: Run) -> str:
    """The table in Markdown, with machine, versions and date."""
    rule = tuple("--:" if place in RIGHT else "---" for place in range(len(HEAD)))
    lines = [HEAD, rule, *map(cells, run.rows)]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    told = "".join(f"- {note}\n" for note in notes(run))
    return PAGE.format(table=table, notes=told and told + "\n", setting=run.setting())


def margin(row: Row, ratio: float) -> float:
    """How far a ratio is on the good side of its limit: 1 is the limit itself, 2 is twice as good."""
    return ratio / row.claim.least if row.claim.least is not None else row.claim.most / ratio


def plot(run: Run, path: Path) -> bool:
    """A dot for each ratio that has a limit, with its quartiles; False where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure as Picture
    except ImportError:
        return False
    rows = [row for row in reversed(run.rows) if row.holds is not None]
    picture = Picture(figsize=(11, 1.5 + 0.32 * len(rows)), layout="constrained")
    axes = picture.add_subplot()
    for place, row in enumerate(rows):
        middle, *ends = (margin(row, value) for value in (row.ratio.median, row.ratio.low, row.ratio.high))
        color = "tab:green" if row.holds else "tab:red"
        axes.plot(sorted(ends), [place, place], color=color, linewidth=3, alpha=0.4)
        axes.plot([middle], [place], "o", color=color)
        end, away, side = (max(ends), 6, "left") if middle >= 1 else (min(ends), -6, "right")  # never across the limit
        axes.annotate(f"{row.ratio.median:.2f}, {limit(row.claim)}", (end, place), xytext=(away, 0),
                      textcoords="offset points", va="center", ha=side, fontsize=8)  # fmt: skip
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, place: f"{value:g}")
    axes.set_yticks(range(len(rows)), [f"{row.title}\nbeside {row.claim.theirs}" for row in rows], fontsize=8)
    axes.set_xlabel("how good beside its limit: below 1 it is missed, 2 is twice as good; dot: median, bar: quartiles")
    axes.set_title(f"TinyTorch, {run.date}, {run.machine}, threads: {run.threads}", fontsize=10)
    axes.margins(x=0.25)
    picture.savefig(path)
    return True
