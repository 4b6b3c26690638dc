"""The instructor's page with plots: self-contained, the same for the same data, and without a student's markup."""

from __future__ import annotations

import base64
import sys
import xml.etree.ElementTree as ElementTree
from datetime import datetime
from html.parser import HTMLParser

import pytest

from tito.course.errors import CourseError
from tito.instructor.gradebook import Writer
from tito.instructor.report import report

EVIL = "<script>alert('x')</script>"


class Images(HTMLParser):
    """The pictures of a page, and the names of all elements."""

    def __init__(self, text: str):
        super().__init__()
        self.pictures, self.names = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.names.append(tag)
        if tag == "img":
            self.pictures.append(dict(attributes))


@pytest.fixture
def graded(small):
    pytest.importorskip("matplotlib")
    results = [
        (small.result(), datetime(2026, 11, 1)),
        (small.result("bob", double=0.0, messages={"17-double-test": EVIL}), datetime(2026, 11, 2)),
        (small.result("eve", double=0.0, messages={"17-double-test": EVIL}), datetime(2026, 12, 2)),
    ]
    with Writer(small.course) as writer:
        for result, timestamp in results:
            small.save(result)
            writer.merge(small.assignment, result, timestamp)
    return small


def test_distribution_checks_time_and_messages(graded):
    assert report(graded.course, None) == 0
    text = (graded.course.root / "report.html").read_text(encoding="utf-8")
    page = Images(text)
    over_time, points, checks = [picture["alt"] for picture in page.pictures]
    assert "3 submissions from 2026-11-01 to 2026-12-02" in over_time
    assert "lowest 3, median 3, mean 3.7, highest 5 of 5 points" in points
    assert "Doubling 33 %, Halving 100 %" in checks
    assert '<td class="number">2</td><th scope="row">Doubling</th><td>&lt;script&gt;' in text
    assert "script" not in page.names and "Lovelace" not in text and "bob" not in text


def test_every_picture_is_in_the_page(graded):
    report(graded.course, None)
    page = Images((graded.course.root / "report.html").read_text(encoding="utf-8"))
    assert not {"script", "link", "iframe"} & set(page.names)
    for picture in page.pictures:
        kind, _, data = picture["src"].partition(",")
        assert kind == "data:image/svg+xml;base64"
        assert ElementTree.fromstring(base64.b64decode(data)).tag.endswith("svg")


def test_the_same_data_give_the_same_bytes(graded, tmp_path):
    for name in ("a.html", "b.html"):
        assert report(graded.course, tmp_path / name) == 0
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def test_a_lesson_without_submissions(small):
    pytest.importorskip("matplotlib")
    assert report(small.course, None) == 0
    assert "No submission says when" in (small.course.root / "report.html").read_text(encoding="utf-8")


def test_without_matplotlib_the_extra_is_named(graded, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(CourseError) as caught:
        report(graded.course, None)
    assert ".[plot]" in caught.value.hint and not (graded.course.root / "report.html").exists()


def test_without_a_released_lesson(small):
    small.course.frozen("17_memoization").unlink()
    with pytest.raises(CourseError, match="No lesson was released"):
        report(small.course, None)
