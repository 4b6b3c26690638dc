"""The table as text, and what is known of the machine."""

import os
import platform
from importlib import metadata

from harness import Figure, Row

HEAD = ("workload", "tinytorch", "peer", "its figure", "ratio (quartiles)", "limit", "holds")


def number(value: float) -> str:
    """Three digits that count."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def spread(ratio: Figure) -> str:
    return f"{ratio.median:.2f} ({ratio.low:.2f} to {ratio.high:.2f})"


def cells(row: Row) -> tuple[str, ...]:
    if row.problem:
        return row.title, "", row.theirs, "", row.problem, row.limit, "no" if row.limit else ""
    unit = f"{row.unit} CPU" if row.clock == "cpu" else row.unit
    kept = {True: "yes", False: "no", None: ""}[row.holds]
    ours, theirs = (f"{number(figure.median)} {unit}" for figure in (row.our_figure, row.their_figure))
    return row.title, ours, row.theirs, theirs, spread(row.ratio), row.limit, kept


def table(rows: list[Row]) -> str:
    """Aligned columns: figures to the right, words to the left."""
    lines = [HEAD, *map(cells, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) if place in (1, 3) else cell.ljust(width)
                  for place, (cell, width) in enumerate(zip(line, widths, strict=True))).rstrip()
        for line in lines)  # fmt: skip


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
    for package in ("numpy", "torch", "transformers", "typer"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            pass
    return found
