"""Self-contained HTML from a template: every value is escaped, and a page asks no other machine for anything."""

from __future__ import annotations

import functools
from pathlib import Path

TEMPLATES = Path(__file__).with_name("templates")


def render(template: str, **values) -> str:
    """The page that `template` makes of `values`."""
    return _environment().get_template(template).render(values)


@functools.cache
def _environment():
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    return Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip


def number(value: float) -> str:
    """Points as a person writes them: 2, 2.5, 0.3333."""
    text = f"{value:.4f}".rstrip("0").rstrip(".")
    return "0" if text == "-0" else text


def span(seconds: float) -> str:
    """A time in words of its two largest units: 1 day 2 hours."""
    parts = []
    rest = int(seconds)
    for unit, size in (("day", 86400), ("hour", 3600), ("minute", 60), ("second", 1)):
        amount, rest = divmod(rest, size)
        if amount:
            parts.append(f"{amount} {unit}{'s' * (amount != 1)}")
    return " ".join(parts[:2]) or "less than a second"
