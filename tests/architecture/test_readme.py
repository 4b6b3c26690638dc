"""What the README shows runs, and what it names is there."""

import doctest
import re
from pathlib import Path

from tito.course import manifest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_example_prints_what_the_readme_says():
    result = doctest.testfile(str(ROOT / "README.md"), module_relative=False, encoding="utf-8")
    assert result.attempted > 10 and result.failed == 0


def test_the_table_of_lessons_is_the_registry():
    rows = re.findall(r"^\| (\d\d) (\w+) \| (.+) \| `(.+)` \|$", README, re.MULTILINE)
    lessons = manifest.load(ROOT).lessons
    assert rows == [(e.number, e.name, e.summary, e.package_path.as_posix()) for e in lessons]


def test_every_room_that_the_readme_names_is_there():
    rooms = re.findall(r"`((?:src|modules|tinytorch|tests|tito)/[\w/]*)`", README)
    assert len(rooms) > 10
    for room in rooms:
        assert room == "tests/NN_name/" or (ROOT / room).is_dir() or room in ("viewer/",), room
