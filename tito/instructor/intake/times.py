"""Times as people, nbgrader and Gradescope write them; all in UTC, to the second."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta, tzinfo

from tito.course.errors import CourseError
from tito.instructor.intake.model import shown

TIME = re.compile(r"(\d{4}-\d\d-\d\d)[T ]+(\d\d:\d\d(?::\d\d)?)(?:\.\d+)?\s*(Z|UTC|GMT|[+-]\d\d:?\d\d|\w+(?:/\w+)+)?")


def parse(text: str, naive: tzinfo | None) -> datetime:
    """`2026-11-30 23:59`, with seconds and a zone if there are any; else the zone `naive` (None: local time).

    Zones are Z, UTC, +01:00, Europe/Berlin. Raises ValueError.
    """
    found = TIME.fullmatch(text.strip()[:100])
    if not found:
        raise ValueError(f"{text!r} is not a time")
    day, hour, zone = found.groups()
    when = datetime.fromisoformat(f"{day} {hour}")
    try:
        if zone is None:
            return (when.replace(tzinfo=naive) if naive else when).astimezone(UTC)
        if zone in ("Z", "UTC", "GMT"):
            return when.replace(tzinfo=UTC)
        if "/" in zone:
            from zoneinfo import ZoneInfo

            return when.replace(tzinfo=ZoneInfo(zone)).astimezone(UTC)
        return datetime.fromisoformat(f"{day} {hour}{zone}").astimezone(UTC)
    except (KeyError, OverflowError, OSError) as error:
        raise ValueError(f"{text!r} is not a time ({error})") from None


def due(text: str) -> datetime:
    """What `--due` says; local time unless a zone is given."""
    try:
        return parse(text, None)
    except ValueError:
        raise CourseError(
            f"--due '{shown(text, 40)}' is not a day and a time.",
            'Write it as "2026-11-30 23:59" (local time) or with a zone: "2026-11-30 23:59 UTC", '
            '"2026-11-30 23:59 +01:00", "2026-11-30 23:59 Europe/Berlin".',
        ) from None


EARLIEST, LATEST = datetime(1980, 1, 1, tzinfo=UTC), datetime(2100, 1, 1, tzinfo=UTC)


def from_seconds(seconds: float) -> datetime:
    """Seconds since 1970, as a stranger's file or commit gives them: kept within years that every clock can show."""
    whole = int(min(max(seconds, EARLIEST.timestamp()), LATEST.timestamp()))
    return datetime.fromtimestamp(whole, UTC)


def stamp(when: datetime) -> str:
    """As nbgrader's timestamp.txt has it: `2026-11-21 14:00:00 UTC`."""
    return f"{when.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC"


def read_stamp(text: str) -> datetime | None:
    """What a timestamp.txt says, as nbgrader reads it; None where it says no time, or one that cannot be."""
    when = _read_stamp(text)
    return when if when and EARLIEST <= when <= LATEST else None


def _read_stamp(text: str) -> datetime | None:
    try:
        return parse(text, UTC)
    except ValueError:
        pass
    try:  # another `Exchange.timestamp_format`
        from nbgrader.utils import parse_utc

        return parse_utc(text.strip()[:100]).replace(tzinfo=UTC, microsecond=0)
    except Exception:  # a stranger's text, and dateutil fails in many ways
        return None


def folder_name(when: datetime) -> str:
    """A time as a folder's name on every system: `2026-11-21T140000Z`."""
    return f"{when.astimezone(UTC):%Y-%m-%dT%H%M%SZ}"


def local(when: datetime) -> str:
    """For the terminal, in local time."""
    return f"{when.astimezone():%Y-%m-%d %H:%M}"


def late_by(when: datetime, deadline: datetime | None, extension: timedelta | None = None) -> timedelta:
    """How long after the deadline, as nbgrader counts it: with a student's extension, never negative."""
    if deadline is None:
        return timedelta(0)
    return max(timedelta(0), when - deadline - (extension or timedelta(0)))


def spoken(span: timedelta) -> str:
    """`2 d 3 h`, `5 min`, `12 s`."""
    seconds = int(span.total_seconds())
    units = (("d", seconds // 86400), ("h", seconds // 3600 % 24), ("min", seconds // 60 % 60), ("s", seconds % 60))
    first = next((index for index, (_, number) in enumerate(units) if number), 3)
    return " ".join(f"{number} {unit}" for unit, number in units[first : first + 2] if number) or "0 s"
