"""The page that a student gets: the gradebook's points, and nothing that a student must not see or run."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from html.parser import HTMLParser

import pytest

from tito.course.errors import CourseError
from tito.instructor.feedback import feedback
from tito.instructor.gradebook import Writer
from tito.instructor.hidden import LONGEST, WITHHELD, for_students, hidden_lines

NAME = "17_memoization"
SECRET = "assert halve(1729) == 864.5"
QUOTED = "assert double(\"'ab'\") == \"'ab''ab'\", \"a hidden one\""
DOUBLE_LINE = 'assert double(2) == 4, "2 doubled is 4"'  # of a check, and every student has it
EVIL = "</pre><script>alert('x')</script><img src=x onerror=alert(2)>"


class Page(HTMLParser):
    """What a browser sees: elements with attributes, and the text."""

    def __init__(self, text: str):
        super().__init__()
        self.elements, self.words = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


@pytest.fixture
def graded(small):
    """Merge results and write pages; gives the page of a student."""

    def grade(*results, timestamp=None, students=(), by_hand=None):
        with Writer(small.course) as writer:
            for result in results:
                small.save(result)
                writer.merge(small.assignment, result, timestamp)
        if by_hand:
            small.by_hand(by_hand)
        code = feedback(small.course, "17", list(students))
        return code, Page(small.page(results[0].student).read_text(encoding="utf-8"))

    return grade


class TestWhatItSays:
    def test_points_messages_hints_findings_and_how_it_was_graded(self, small, graded):
        result = small.result(double=0.5, findings=("A changed test cell was restored.",), problem="It took too long.")
        code, page = graded(result)
        assert code == 0
        for said in ("3.5 of 5 points", "Doubling", "0.5 of 2", "3 of 3", "got 5", "Hint: What is 2 + 2?",
                     "A changed test cell was restored.", "It took too long.", small.assignment.hash[:12],
                     "Feedback for Ada Lovelace (ada)", "Lesson 17: Small & simple"):  # fmt: skip
            assert said in page.text, said
        assert "Handed in" not in page.text and "got 1" not in page.text

    def test_what_a_person_changed_counts(self, small, graded):
        def person(grades, comments):
            grades["17-double-test"].manual_score, grades["17-halve-test"].extra_credit = 1.5, 1.0
            comments["17-double"].manual_comment = f"nearly {EVIL}"

        _, page = graded(small.result(double=0.0), by_hand=person)
        assert "5.5 of 5 points" in page.text and "set by hand to 1.5 (the check gave 0); " not in page.text
        assert "set by hand to 1.5 (the check gave 0)" in page.text and "1 extra" in page.text
        assert f"nearly {EVIL}" in page.text

    def test_late_and_its_price(self, small, graded):
        with small.course.config.open("a", encoding="utf-8") as config:
            config.write('c.LateSubmissionPlugin.penalty_method = "zero"\n')
        _, page = graded(small.result(), timestamp=datetime(2026, 12, 2, 1, 59, tzinfo=UTC))
        assert "0 of 5 points" in page.text
        assert "Handed in 1 day 3 hours late; 5 points are taken off for it." in page.text

    def test_flags_are_not_for_the_student(self, small, graded):
        graded(small.result(flags=("answers look copied",)))
        assert "copied" not in small.page().read_text(encoding="utf-8")


class TestThePageItself:
    def test_one_file_that_fetches_nothing_and_can_be_read_aloud(self, small, graded):
        _, page = graded(small.result(double=0.0))
        names = [name for name, _ in page.elements]
        assert not {"script", "link", "iframe", "img", "form", "a"} & set(names)
        assert not [a for _, a in page.elements if {"src", "href"} & set(a)]
        text = small.page().read_text(encoding="utf-8")
        assert "url(" not in text and "@import" not in text and "prefers-color-scheme: dark" in text
        assert "@media print" in text and ("html", {"lang": "en"}) in page.elements
        assert names.count("h1") == 1 and "caption" in names
        assert {a.get("scope") for name, a in page.elements if name == "th"} == {"col", "row"}

    def test_nothing_of_the_student_is_markup(self, small, graded):
        person = {"messages": {"17-double-test": EVIL}, "findings": (EVIL,), "problem": EVIL}
        _, page = graded(small.result("bob", double=0.0, **person))
        names = [name for name, _ in page.elements]
        assert "script" not in names and "img" not in names
        assert page.text.count("alert('x')") == 3 and "<script>alert(1)</script>" in page.text

    def test_twice_is_the_same(self, small, graded):
        graded(small.result())
        first = small.page().read_bytes()
        assert feedback(small.course, "memoization", ["ada"]) == 0
        assert small.page().read_bytes() == first
        assert [path.name for path in small.page().parent.iterdir()] == [small.page().name]


def quotations():
    """Ways in which a message carries a hidden line."""
    for secret in (SECRET, QUOTED):
        yield f"got {secret}"
        yield "   ".join(secret.split(" ")) + "\tand more"
        yield repr(secret)
        yield repr(repr(["def f():\n", f"    {secret}\n"]))
        yield json.dumps({"source": json.dumps(secret)})
        yield ascii(f"\u2192{secret}\u2190")
        yield secret.replace(" ", "\n")
        yield secret.replace("==", "=\u200b=")
        yield secret.replace("ble", "\x1b[0mble").replace("ve(", "\x1b[1mve(")
        yield "x" * (LONGEST + 5) + secret
    yield "### BEGIN HIDDEN TESTS"
    yield "assert halve(1729) == 865.5"  # a check with a wrong expectation, which runs as well


class TestHiddenTests:
    @pytest.mark.parametrize("message", list(quotations()))
    def test_a_message_that_carries_one_is_withheld_everywhere(self, small, graded, message):
        result = small.result(halve=0.0, messages={"17-halve-test": message}, findings=(message,), problem=message)
        _, page = graded(result)
        text = "".join(page.text.split())
        assert "halve(1729" not in text and "a hidden one" not in page.text and "HIDDEN" not in text
        assert WITHHELD in page.text and "Halving" in page.text
        with small.api().gradebook as gradebook:
            comment = gradebook.find_comment("17-halve", "memoization", NAME, "ada")
            assert comment.auto_comment == WITHHELD

    @pytest.mark.parametrize("message", ["got 5", "2 doubled is 4", DOUBLE_LINE, "a hidden one", "", "x=1"])
    def test_any_other_message_is_shown(self, small, message):
        """What a check says on purpose, and lines that every student has."""
        assert for_students(message, hidden_lines(small.assignment)) == message

    def test_a_long_message_is_cut(self, small):
        said = for_students("y" * 10 * LONGEST, hidden_lines(small.assignment))
        assert len(said) < LONGEST + 50 and said.endswith("(shortened)")

    def test_control_characters_are_left_out(self):
        assert for_students("\x1b[31mred\x1b[0m\x07\ud800\n2", frozenset()) == "red\n2"


class TestProblems:
    def test_one_line_each_and_the_others_get_theirs(self, small, graded, capsys):
        (small.course.grading(NAME) / "results").mkdir()
        with Writer(small.course) as writer:
            for student in ("bob", "eve", "dan"):
                writer.merge(small.assignment, small.result(student))
        small.save(small.result("bob", double=0.0))  # newer than the gradebook
        (small.course.grading(NAME) / "results" / "eve.json").write_text("[" * 100_000, encoding="utf-8")
        code, page = graded(small.result())
        said = " ".join(capsys.readouterr().err.split())
        assert code == 1 and "5 of 5 points" in page.text
        assert "bob: The gradebook does not hold the latest result of bob." in said
        assert "eve: " in said and "dan: There is no result" in said
        assert not small.page("bob").exists() and not small.page("eve").exists()

    def test_students_by_name(self, small, graded, capsys):
        code, _ = graded(small.result(), small.result("bob"), students=["ada", "nobody", "dan"])
        said = capsys.readouterr().err
        assert code == 1 and "nobody: the roster has no such student." in said and "dan: no grades" in said
        assert not small.page("bob").exists()

    def test_before_anything_was_graded(self, small):
        with pytest.raises(CourseError, match="no grades of 17_memoization yet"):
            feedback(small.course, "17", [])

    def test_nbgraders_own_feedback_still_works_in_the_same_folder(self, small, graded):
        graded(small.result(halve=0.0))
        assert small.api().generate_feedback(NAME, force=True)["success"]
        assert "Small" in small.page().read_text(encoding="utf-8")
        assert feedback(small.course, "17", []) == 0
        assert "3 of 3" not in Page(small.page().read_text(encoding="utf-8")).text
        assert "2 of 5 points" in Page(small.page().read_text(encoding="utf-8")).text
