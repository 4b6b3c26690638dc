"""A grading course, its students, releases, and the folder that students get.

Oracles: nbgrader's own commands, API and gradebook; the lessons' sources, searched line by line in what is released.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("nbgrader", reason="grading needs nbgrader")

from tito import main  # noqa: E402
from tito.course import manifest, source, student_version  # noqa: E402
from tito.course.errors import CourseError  # noqa: E402
from tito.instructor import assignment, freeze, init, release, roster, student_folder, students  # noqa: E402
from tito.instructor.course import GradingCourse  # noqa: E402
from tito.instructor.nbgrader_setup import course_id, nbgrader_ready, open_gradebook, settings  # noqa: E402
from tito.instructor.students import Student  # noqa: E402

REPOSITORY = Path(__file__).resolve().parents[2]
posix = pytest.mark.skipif(os.name != "posix", reason="signals and fork of POSIX")
CLASS = [Student("ada", "Ada", "Lovelace", "ada@example.org"), Student("carl", "Carl Friedrich", "Gauß")]


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Negative controls run every check on the reference, and have tests of their own; `alembic` runs once."""
    with nbgrader_ready():
        import nbgrader.api
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(freeze, "_controls", lambda *_: {})
        patch.setattr(nbgrader.api, "get_alembic_version", functools.cache(nbgrader.api.get_alembic_version))
        yield


@pytest.fixture(scope="module")
def mini_root(tmp_path_factory) -> Path:
    """The sources of the mini course of tests/tito, built."""
    spec = importlib.util.spec_from_file_location("mini", REPOSITORY / "tests" / "tito" / "mini.py")
    mini = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(mini)
    root = tmp_path_factory.mktemp("maintainers")
    mini.write(root)
    return root


@pytest.fixture(scope="module")
def empty_course(tmp_path_factory) -> Path:
    """A course with two students, made once."""
    root = tmp_path_factory.mktemp("grading") / "Kurs für später"
    init.make(root, CLASS, "mini")
    return root


@pytest.fixture(scope="module")
def released_course(empty_course, mini_root, tmp_path_factory) -> Path:
    """The course with lesson 01 released, made once."""
    root = tmp_path_factory.mktemp("released") / "course"
    shutil.copytree(empty_course, root)
    release.make(GradingCourse(root), release.chosen(mini_root, "01", False), root / "student")
    return root


@pytest.fixture
def maintainers(mini_root, tmp_path) -> Path:
    """A copy of the mini course's sources, to be changed."""
    return shutil.copytree(mini_root, tmp_path / "maintainers")


@pytest.fixture
def course(empty_course, tmp_path) -> GradingCourse:
    return GradingCourse(shutil.copytree(empty_course, tmp_path / "Kurs 1"))


@pytest.fixture
def released(released_course, tmp_path) -> GradingCourse:
    return GradingCourse(shutil.copytree(released_course, tmp_path / "Kurs 2"))


def make(course: GradingCourse, root: Path, lesson: str, upto: bool = False, out: Path | None = None):
    return release.make(course, release.chosen(root, lesson, upto), out or course.root / "student")


def snapshot(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def without_gradebook(files: dict[str, bytes]) -> dict[str, bytes]:
    return {name: content for name, content in files.items() if name != "gradebook.db"}


def rows(course: GradingCourse) -> list[tuple]:
    """What the gradebook knows of assignments, cells and students; its own random ids left out."""
    with sqlite3.connect(course.gradebook) as database:
        queries = (
            "select name, course_id from assignment",
            "select base_cell.name, base_cell.type, assignment.name from base_cell "
            "join notebook on base_cell.notebook_id = notebook.id join assignment on assignment_id = assignment.id",
            "select max_score, cell_type from grade_cells",
            "select source, checksum, locked from source_cell",
            "select id, first_name, last_name, email from student",
        )
        found = sorted(repr(row) for query in queries for row in database.execute(query))
    database.close()
    return found


# --- class lists -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content, expected",
    [
        ("id,name,email\na1,Jane Doe,j@x.org\n", [Student("a1", "Jane", "Doe", "j@x.org")]),
        ("EMAIL;Name;Id\r\nj@x.org;Jane Doe;a1\r\n", [Student("a1", "Jane", "Doe", "j@x.org")]),
        ("\ufeffid\tname\na1\tJürgen Groß\n", [Student("a1", "Jürgen", "Groß")]),
        ('id,name\n7,"Doe, Jane"\n', [Student("7", "Jane", "Doe")]),
        ('id,name\n007,"Doe, Jr"\n', [Student("007", "", "Doe, Jr")]),
        ('id,name\na;b,"x"\n'.replace(";", "."), [Student("a.b", "", "x")]),
        ("\n\nid , Name,E-Mail\n\n a1 , Jane  Doe , \n,,\n", [Student("a1", "Jane", "Doe")]),
        ("Student ID,First Name,last_name,group\nj@x,Ann Mary,Lee,B\n", [Student("j@x", "Ann Mary", "Lee")]),
        ("id\na\nb\n", [Student("a"), Student("b")]),
        ("id,name\na,x", [Student("a", "", "x")]),
        ("id,name,email\na\n", [Student("a")]),
        ('id,name\na,"Jane\nDoe"\nb,x\n', [Student("a", "Jane", "Doe"), Student("b", "", "x")]),
    ],
)
def test_a_good_class_list(tmp_path, content, expected):
    path = tmp_path / "class.csv"
    path.write_text(content, encoding="utf-8", newline="")
    assert students.read(path) == expected


def test_a_class_list_in_utf16_as_spreadsheets_write_it(tmp_path):
    (tmp_path / "class.csv").write_bytes("id\tname\na1\t李 小龙\n".encode("utf-16"))
    assert students.read(tmp_path / "class.csv") == [Student("a1", "李", "小龙")]


@pytest.mark.parametrize(
    "name, first, last",
    [
        ("Jane Doe", "Jane", "Doe"),
        ("Doe, Jane Ann", "Jane Ann", "Doe"),
        ("Ludwig van Beethoven", "Ludwig", "van Beethoven"),
        ("van Beethoven, Ludwig", "Ludwig", "van Beethoven"),
        ("John Doe, Jr.", "John", "Doe, Jr."),
        ("Doe, III, John", "John", "Doe, III"),
        ("Plato", "", "Plato"),
        (",", "", ","),
    ],
)
def test_names_are_split(name, first, last):
    assert students.split_name(name) == (first, last)


@pytest.mark.parametrize(
    "content, words",
    [
        (b"", ["no column id", "nothing"]),
        (b"name,email\na,b@c\n", ["no column id", "'name', 'email'"]),
        (b"id,ID\na,b\n", ["two columns for id"]),
        (b"id,name\n", ["no student"]),
        (b"id,name\n../x,E\na/b,F\n.h,G\na+b,H\n..,I\nx.,J\n", [f"line {n}: id" for n in range(2, 8)]),
        (b"id,name\na b,E\na*,F\n[a],G\n" + "ü,H\n".encode(), [f"line {n}: id" for n in range(2, 6)]),
        (b"id,name\n" + b"a" * 101 + b",x\n", ["line 2: id"]),
        (b"id,name\na,x\n,y\nb,z\n", ["line 3: no id"]),
        (b"id,name\na,x\nb,y\na,z\nB,w\n", ["line 4: id 'a' stands in line 2", "line 5: id 'B' stands in line 3"]),
        (b"id,name\na,Doe, Jr\n", ["line 2: 3 fields under 2 headings", "quotes"]),
        (b"id,email\na,nobody\nb,a b@c\n", ["line 2: 'nobody' is no e-mail", "line 3"]),
        (b"id,name\na,\x1b[31mred\n", ["line 2", "control character"]),
        (b"id,name\na," + b"x" * 129 + b"\n", ["line 2", "longer than 128"]),
        (b'id,name\na,"open\nb,c\n', ["line 3: unexpected end"]),
        (b"id,name\na,\xff\xfe\xfa\n", ["not text in UTF-8"]),
        (b"id,name\na,x\0\n", ["NUL"]),
        (b"\xff\xfeodd", ["UTF-8"]),
        (b"id\n" + b"".join(b"+%d\n" % n for n in range(50)), ["line 2: id", "line 21: id", "and 30 more"]),
    ],
)
def test_a_bad_class_list_is_refused_line_by_line(course, tmp_path, content, words):
    path, before = tmp_path / "class.csv", rows(course)
    path.write_bytes(content)
    with pytest.raises(CourseError) as error:
        roster.update(course, path)
    assert all(word in error.value.message for word in words), error.value.message
    assert rows(course) == before


@pytest.mark.parametrize("kind", ["missing", "folder", "huge"])
def test_a_class_list_that_is_no_file(tmp_path, kind):
    path = tmp_path / "class.csv"
    if kind == "folder":
        path.mkdir()
    elif kind == "huge":
        with open(path, "wb") as file:
            file.truncate(students.MOST_BYTES + 1)
    with pytest.raises(CourseError, match="class.csv"):
        students.read(path)


def test_roster_adds_and_corrects_and_never_removes(course, tmp_path, capsys):
    path = tmp_path / "class.csv"
    path.write_text("id,name,email\nada,Ada King,\nzoe,Zoë Ng,zoe@example.org\n", encoding="utf-8")
    assert roster.update(course, path) == 0
    said = capsys.readouterr().out
    assert "1 student added, 1 field corrected" in said and re.search(r"ada\s+last name\s+Lovelace\s+King", said)
    assert "1 student of the gradebook not in class.csv: kept" in said
    with open_gradebook(course) as gradebook:
        found = {row.id: (row.first_name, row.last_name, row.email) for row in gradebook.students}
    assert found == {
        "ada": ("Ada", "King", "ada@example.org"),  # an address that the list does not tell stays
        "carl": ("Carl Friedrich", "Gauß", None),
        "zoe": ("Zoë", "Ng", "zoe@example.org"),
    }
    assert (
        roster.update(course, path) == 0
        and "0 students added, 0 fields corrected, 2 as before" in capsys.readouterr().out
    )


def test_a_name_that_a_person_split_otherwise_stays(course, tmp_path):
    path = tmp_path / "class.csv"
    path.write_text("id,name\ncarl,Carl Friedrich Gauß\n", encoding="utf-8")
    with open_gradebook(course) as gradebook:
        gradebook.update_or_create_student("carl", first_name="Carl", last_name="Friedrich Gauß")
    roster.update(course, path)
    with open_gradebook(course) as gradebook:
        assert gradebook.find_student("carl").last_name == "Friedrich Gauß"


def test_an_id_that_differs_from_a_known_one_in_case_is_refused(course, tmp_path):
    (tmp_path / "class.csv").write_text("id\nADA\n")
    with pytest.raises(CourseError, match="'ADA' .'ada' in the gradebook"):
        roster.update(course, tmp_path / "class.csv")


# --- init --------------------------------------------------------------------------------------------------------


def nbgrader_says(folder: Path, *arguments: str) -> str:
    """What nbgrader's own command prints, run in `folder` without our PATH and configuration."""
    code = "import sys; sys.modules['rfc3987_syntax'] = None; from nbgrader.apps.nbgraderapp import main; main()"
    env = {**os.environ, "JUPYTER_NO_CONFIG": "1"}
    done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_nbgraders_own_command_works_in_a_course_that_was_moved(empty_course, tmp_path):
    moved = shutil.copytree(empty_course, tmp_path / "elsewhere" / "moved")
    listed = nbgrader_says(moved, "db", "student", "list")
    assert "ada (Lovelace, Ada) -- ada@example.org" in listed and "2 students" in listed
    assert str(empty_course) not in (moved / "nbgrader_config.py").read_text(encoding="utf-8")
    assert course_id(GradingCourse(moved)) == "mini"


def test_init_by_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "class.csv").write_text("id,name\na,x\n")
    assert main.run(["grade", "init", "my course", "--roster", "class.csv", "--course-id", "dl-2026"]) == 0
    said = capsys.readouterr()
    assert "with 1 student" in said.out and 'cd "my course"' in said.out and said.err == ""
    course = GradingCourse(tmp_path / "my course")
    assert course_id(course) == "dl-2026"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["class.csv", "my course"]
    with sqlite3.connect(course.gradebook) as database:
        assert database.execute("select id from course").fetchall() == [("dl-2026",)]
    database.close()


@pytest.mark.parametrize("place", ["file", "full", "course", "pattern[1]", "file/below"])
def test_init_in_a_bad_place_touches_nothing(tmp_path, place):
    (tmp_path / "file").write_text("mine")
    for folder, name in (("full", "mine.txt"), ("course", "nbgrader_config.py")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_text("mine")
    before = snapshot(tmp_path)
    with pytest.raises((CourseError, OSError)):
        init.init(tmp_path / place, None, "tinytorch")
    assert snapshot(tmp_path) == before and sorted(os.listdir(tmp_path)) == ["course", "file", "full"]


@pytest.mark.parametrize("name", ["", "a b", "a+b", "../x", '"; import os; "', "a" * 101, "é"])
def test_a_course_id_that_nbgrader_could_not_use(tmp_path, name):
    with pytest.raises(CourseError, match="cannot be the name"):
        init.init(tmp_path / "c", None, name)
    assert list(tmp_path.iterdir()) == []


def test_init_with_a_bad_class_list_writes_nothing(tmp_path):
    (tmp_path / "class.csv").write_text("id\n../x\n")
    with pytest.raises(CourseError, match="line 2"):
        init.init(tmp_path / "c", tmp_path / "class.csv", "tinytorch")
    assert os.listdir(tmp_path) == ["class.csv"]


@pytest.mark.parametrize(
    "text, words",
    [("c = get_config(\n", "SyntaxError"), ("c = get_config()\n", "names no course"), ("1 / 0\n", "ZeroDivisionError")],
)
def test_a_damaged_configuration_is_said(course, text, words):
    course.config.write_text(text)
    with pytest.raises(CourseError, match=words):
        with open_gradebook(course):
            pass


def test_a_gradebook_that_is_none_is_said(course):
    course.gradebook.write_bytes(b"no database, but long enough to look at" * 100)
    with pytest.raises(CourseError, match="cannot be opened"):
        with open_gradebook(course):
            pass


# --- freeze ------------------------------------------------------------------------------------------------------


def test_the_frozen_assignment_holds_what_grading_needs(mini_root, released_course):
    course, lesson = GradingCourse(released_course), manifest.load(mini_root).lesson("01")
    frozen = assignment.load(course, "scale")
    assert (frozen.name, frozen.notebook, frozen.module) == ("01_scale", "scale", "tinytorch.core.scale")
    roles = {cell.grade_id: cell.role for cell in frozen.cells if cell.grade_id}
    assert roles == {
        "01-double": "hole", "01-double-test": "check", "01-total": "hole", "01-total-test": "check",
        "01-module-test": "check",
    }  # fmt: skip
    assert {cell.grade_id: cell.points for cell in frozen.checks} == {check.id: check.points for check in lesson.checks}
    assert frozen.max_score == lesson.points == 6
    assert frozen.titles == {
        "01-double-test": "Twice a number", "01-total-test": "The sum", "01-module-test": "The whole lesson"
    }  # fmt: skip
    assert frozen.hints["01-total-test"].startswith("Look at the example") and "01-module-test" not in frozen.hints
    handed_out = json.loads(lesson.notebook.read_text(encoding="utf-8"))["cells"]
    assert [(c.id, c.released, c.metadata) for c in frozen.cells] == [
        (raw["id"], "".join(raw["source"]), raw["metadata"]) for raw in handed_out
    ]
    for cell in frozen.cells:
        assert ("### BEGIN HIDDEN TESTS" in cell.source) == (cell.role == "check")
        assert cell.role == "check" or cell.source == cell.released
    assert "SOLUTION" not in frozen.as_text() and "2 * x" not in frozen.as_text()


def test_the_frozen_package_is_what_comes_before(mini_root):
    texts = freeze.freeze(manifest.load(mini_root).lesson("02")).package
    assert sorted(texts) == [
        "tinytorch/__init__.py", "tinytorch/core/__init__.py", "tinytorch/core/scale.py", "tinytorch/text/__init__.py",
    ]  # fmt: skip
    assert texts["tinytorch/core/scale.py"] == (mini_root / "tinytorch/core/scale.py").read_text(encoding="utf-8")


def test_freezing_twice_is_the_same(mini_root):
    lesson = manifest.load(mini_root).lesson("02")
    assert freeze.freeze(lesson).hash == freeze.freeze(lesson).hash


def test_an_index_that_is_behind_its_sources_is_said(maintainers):
    path = maintainers / "src/01_scale/01_scale.py"
    path.write_text(path.read_text().replace("# Lesson 01", "# Lesson 01, newer"))
    with pytest.raises(CourseError, match="not built from the present src/01_scale"):
        freeze.freeze(manifest.load(maintainers).lesson("01"))


# --- release and nbgrader ----------------------------------------------------------------------------------------


def nbgrader_api(course: GradingCourse):
    from nbgrader.apps.api import NbGraderAPI

    return NbGraderAPI(config=settings(course))


def test_nbgrader_knows_the_released_assignment(released_course, mini_root):
    course, lesson = GradingCourse(released_course), manifest.load(mini_root).lesson("01")
    with nbgrader_ready():
        (seen,) = nbgrader_api(course).get_assignments()
    assert (seen["name"], seen["status"], seen["max_score"]) == ("01_scale", "draft", 6)
    with open_gradebook(course) as gradebook:
        notebook = gradebook.find_notebook("scale", "01_scale")
        assert {c.name: c.max_score for c in notebook.grade_cells} == {c.id: c.points for c in lesson.checks}
        assert {c.name for c in notebook.solution_cells} == {"01-double", "01-total"}
        sources = {c.name: c.source for c in notebook.source_cells}
        assert gradebook.find_assignment("01_scale").course_id == "mini"
    frozen = assignment.load(course, "01")
    assert sources == {cell.grade_id: cell.source for cell in frozen.cells if cell.grade_id}
    assert "### BEGIN HIDDEN TESTS" in sources["01-double-test"]


def test_the_released_notebook_is_the_one_in_modules(released_course, mini_root):
    lesson = manifest.load(mini_root).lesson("01")
    text = (released_course / "release/01_scale/scale.ipynb").read_bytes()
    assert (
        text == lesson.notebook.read_bytes() == (released_course / "student/modules/01_scale/scale.ipynb").read_bytes()
    )
    solved = json.loads((released_course / "source/01_scale/scale.ipynb").read_text(encoding="utf-8"))
    code = "\n".join("".join(cell["source"]) for cell in solved["cells"])
    assert "### BEGIN SOLUTION\n    return 2 * x" in code and "### BEGIN HIDDEN TESTS" in code
    assert [cell["id"] for cell in solved["cells"]] == [cell["id"] for cell in json.loads(text)["cells"]]


def test_nbgraders_own_generate_assignment_makes_the_same_of_our_source(released):
    ours = json.loads((released.release("01_scale") / "scale.ipynb").read_text(encoding="utf-8"))["cells"]
    before = rows(released)
    with nbgrader_ready():
        result = nbgrader_api(released).generate_assignment("01_scale", force=True)
    assert result["success"], result
    theirs = json.loads((released.release("01_scale") / "scale.ipynb").read_text(encoding="utf-8"))["cells"]
    assert len(ours) == len(theirs)
    for our, their in zip(ours, theirs):
        grading, wanted = our["metadata"].get("nbgrader", {}), their["metadata"].get("nbgrader", {})
        if not grading.get("solution"):  # ours names the exercise where nbgrader writes YOUR CODE HERE
            assert our["source"] == their["source"] and grading == wanted
    assert [row for row in rows(released) if "raise" not in row] == [row for row in before if "raise" not in row]


def test_nbgrader_autogrades_a_solved_and_an_unsolved_notebook_of_the_release(released, mini_root):
    """The whole way through nbgrader alone: our source, release and gradebook are what it expects."""
    lesson = manifest.load(mini_root).lesson("01")
    for student, text in (("ada", source.solved_notebook(lesson)), ("carl", lesson.notebook.read_text("utf-8"))):
        folder = released.submitted(student, "01_scale")
        folder.mkdir(parents=True)
        (folder / "scale.ipynb").write_text(text, encoding="utf-8")
    with nbgrader_ready():
        api = nbgrader_api(released)
        for student in ("ada", "carl"):
            result = api.autograde("01_scale", student)
            assert result["success"], result
    with open_gradebook(released) as gradebook:
        scores = {row.student.id: row.score for row in gradebook.assignment_submissions("01_scale")}
    assert scores == {"ada": 6, "carl": 0}


def test_releasing_again_changes_no_byte(released, mini_root):
    before, known = snapshot(released.root), rows(released)
    assert make(released, mini_root, "01") is None
    assert without_gradebook(snapshot(released.root)) == without_gradebook(before) and rows(released) == known


def test_upto_releases_what_comes_before(course, mini_root):
    make(course, mini_root, "02", upto=True)
    assert course.released() == ["01_scale", "02_shift"]
    with nbgrader_ready():
        assert [seen["name"] for seen in nbgrader_api(course).get_assignments()] == ["01_scale", "02_shift"]


def test_release_by_command(course, mini_root, monkeypatch, capsys):
    monkeypatch.chdir(mini_root)
    assert main.run(["grade", "release", "scale", "--course", str(course.root), "--out", str(course.root / "o")]) == 0
    said = capsys.readouterr()
    assert re.search(r"01_scale\s+Scale\s+6\s+3", said.out) and str(course.root / "o") in said.out and said.err == ""
    assert main.run(["grade", "release", "09", "--course", str(course.root)]) == 1
    assert "no lesson '09'" in capsys.readouterr().err


def test_without_src_a_release_says_what_it_needs(course, monkeypatch, capsys):
    monkeypatch.chdir(course.root)
    monkeypatch.setattr(release, "TITO_HOME", course.root)
    assert main.run(["grade", "release", "01"]) == 1
    said = capsys.readouterr().err
    assert "built from src/" in said and "maintainers' repository" in said
    monkeypatch.setattr(release, "TITO_HOME", REPOSITORY)
    assert release.repository() == REPOSITORY


# --- releasing again after a change ------------------------------------------------------------------------------

CHANGES = {  # name -> what is replaced (a regular expression), by what, what a refusal says
    "text": ("# Lesson 01", "# Lesson 01, better said", None),
    "test": (r"    assert double\(4\) == 8\n", "    assert double(5) == 10\n", None),
    "points": (r'(?<=01-total-test", "locked": true, "points": )3', "4", "points: 01-total-test had 3 and would"),
    "renamed": ('"01-module-test"', '"01-whole-test"', "renamed: 01-module-test is now 01-whole-test"),
    "removed": (r"(?s)# %% nbgrader=[^\n]*01-module-test.*", "", "removed: 01-module-test"),
    "added": (r"# %%\n#\| default_exp", r'''# %% nbgrader={"grade": false, "grade_id": "01-new", "locked": true, '''
              r'''"schema_version": 3, "solution": false, "task": false}\nprint(1)\n\n\g<0>''', "added: 01-new"),
}  # fmt: skip


def change(root: Path, name: str) -> None:
    """Make one of CHANGES in src/ and build it."""
    from tito.maintainer.build import build

    path = root / "src/01_scale/01_scale.py"
    old, new, _ = CHANGES[name]
    text, count = re.subn(old, new, path.read_text(encoding="utf-8"))
    assert count == 1
    path.write_text(text, encoding="utf-8")
    build(root)


def submit(course: GradingCourse, where: str) -> None:
    """A submission of ada, in submitted/ or in the gradebook."""
    if where == "folder":
        course.submitted("ada", "01_scale").mkdir(parents=True)
    elif where == "gradebook":
        with open_gradebook(course) as gradebook:
            gradebook.add_submission("01_scale", "ada")


@pytest.mark.parametrize("where", ["nowhere", "folder", "gradebook"])
@pytest.mark.parametrize("name", CHANGES)
def test_releasing_again_after_a_change(released, maintainers, name, where):
    change(maintainers, name)
    submit(released, where)
    before, words = snapshot(released.root), CHANGES[name][2]
    if words is None or where == "nowhere":
        old = assignment.load(released, "01").hash
        make(released, maintainers, "01")
        new = assignment.load(released, "01")
        assert new.hash != old
        with open_gradebook(released) as gradebook:
            notebook = gradebook.find_notebook("scale", "01_scale")
            assert {c.name: c.source for c in notebook.source_cells} == {
                c.grade_id: c.source for c in new.cells if c.role != "plain"
            }
            assert len(gradebook.assignment_submissions("01_scale")) == (where == "gradebook")
        return
    with pytest.raises(CourseError) as error:
        make(released, maintainers, "01")
    assert words in error.value.message and "1 submission" in error.value.message
    assert snapshot(released.root) == before


def test_submissions_bind_the_release_where_the_gradebook_was_lost(released, maintainers):
    change(maintainers, "points")
    submit(released, "folder")
    released.gradebook.unlink()
    with pytest.raises(CourseError, match="had 3 and would have 4"):
        make(released, maintainers, "01")


def test_a_lesson_that_changed_since_its_release_is_named(released, maintainers, monkeypatch, capsys):
    change(maintainers, "text")
    monkeypatch.chdir(maintainers)
    assert main.run(["grade", "release", "04", "--course", str(released.root)]) == 0
    assert "01_scale is not as it was released" in capsys.readouterr().out


# --- the students' folder ----------------------------------------------------------------------------------------


def test_the_students_folder_holds_what_they_need_and_nothing_more(released_course):
    folder = released_course / "student"
    assert sorted(snapshot(folder)) == [
        "README.md", "modules/01_scale/scale.ipynb", "modules/index.json", "release.json",
        "tests/01_scale/test_progressive_integration.py",
        "tinytorch/__init__.py", "tinytorch/core/__init__.py", "tinytorch/text/__init__.py",
    ]  # fmt: skip
    (lesson,) = manifest.load(folder).lessons
    assert lesson.folder == "01_scale" and not lesson.has_reference and lesson.points == 6
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert "`modules/01_scale/scale.ipynb`" in text and "tito module start 01" in text and "{" not in text


def test_lessons_in_between_come_with_their_reference(course, mini_root):
    make(course, mini_root, "02")
    assert sorted(path.name for path in (course.root / "student/tinytorch/core").iterdir()) == [
        "__init__.py",
        "scale.py",
    ]
    make(course, mini_root, "01")  # graded from now on: its file is no longer handed out
    assert sorted(path.name for path in (course.root / "student/tinytorch/core").iterdir()) == ["__init__.py"]
    lessons = manifest.load(course.root / "student").lessons
    assert [(lesson.number, lesson.has_reference) for lesson in lessons] == [("01", False), ("02", False)]
    assert not list(course.root.glob("student-before*"))


def test_a_repository_that_was_played_in_leaks_nothing(course, maintainers):
    lessons = manifest.load(maintainers).lessons
    fresh = student_folder.contents(manifest.load(maintainers), list(lessons), {"02_shift"})
    lessons[0].notebook.write_text(source.solved_notebook(lessons[0]), encoding="utf-8")
    lessons[0].package_file.write_text("SECRET = 1\n")
    (maintainers / "tinytorch/core/shift_old.py").write_text("SECRET = 1\n")
    (maintainers / "tests/01_scale/__pycache__").mkdir()
    (maintainers / "tests/01_scale/__pycache__/x.pyc").write_text("SECRET = 1\n")
    assert student_folder.contents(manifest.load(maintainers), list(lessons), {"02_shift"}) == fresh


@pytest.mark.parametrize("kind", ["file", "full", "link", "other marker"])
def test_a_folder_that_we_did_not_make_is_refused(course, mini_root, tmp_path, kind):
    out = tmp_path / "out"
    if kind == "file":
        out.write_text("mine")
    elif kind == "link":
        (tmp_path / "target").mkdir()
        out.symlink_to(tmp_path / "target")
    else:
        out.mkdir()
        (out / ("release.json" if kind == "other marker" else "thesis.tex")).write_text('{"files": []}')
    before = snapshot(tmp_path)
    with pytest.raises(CourseError) as error:
        make(course, mini_root, "01", out=out)
    assert str(out) in error.value.message and "--out" in error.value.hint
    assert snapshot(tmp_path) == before and course.released() == []


def test_an_empty_folder_is_taken(course, mini_root, tmp_path):
    (tmp_path / "out").mkdir()
    assert make(course, mini_root, "01", out=tmp_path / "out") is None
    assert (tmp_path / "out/README.md").is_file() and not (course.root / "student").exists()


@pytest.mark.parametrize("what", ["new", "changed", "deleted"])
def test_work_in_the_old_folder_is_kept(released, mini_root, what):
    student = released.root / "student"
    if what == "new":
        (student / "notes.txt").write_text("mine")
    elif what == "changed":
        (student / "modules/01_scale/scale.ipynb").write_text("mine")
    else:
        (student / "README.md").unlink()
    old = snapshot(student)
    kept = make(released, mini_root, "02")
    assert kept == released.root / "student-before-1" and snapshot(kept) == old
    assert manifest.load(student).lessons[-1].number == "02"


def test_a_student_builds_the_missing_file_in_the_folder(released, mini_root, monkeypatch, capsys):
    """The student's own commands in the released folder: to build, completed, and reset to what was handed out."""
    student = released.root / "student"
    monkeypatch.chdir(student)

    def owner() -> str:
        capsys.readouterr()
        assert main.run(["status", "--json"]) == 0
        return json.loads(capsys.readouterr().out)["files"][0]["owner"]

    assert owner() == "to build"
    assert main.run(["module", "list"]) == main.run(["module", "start", "01", "--no-open"]) == 0
    assert main.run(["module", "reset", "01"]) == 0 and owner() == "to build"
    assert main.run(["generate", "x"]) == 1 and "end with 01_scale" in capsys.readouterr().err
    handed_out = snapshot(student / "modules")
    lesson = manifest.load(student).lesson("01")
    lesson.notebook.write_text(source.solved_notebook(manifest.load(mini_root).lesson("01")), encoding="utf-8")
    assert main.run(["module", "complete", "01"]) == 0 and owner() == "learner"
    assert "def double" in lesson.package_file.read_text(encoding="utf-8")
    assert main.run(["module", "reset", "01"]) == 0 and owner() == "to build" and not lesson.package_file.exists()
    assert {n: c for n, c in snapshot(student / "modules").items() if "backups" not in n} == handed_out


# --- nothing leaks -----------------------------------------------------------------------------------------------

DISTINCTIVE = 25  # letters; shorter lines, e.g. `return x`, are in every program


def secret_lines(lessons: list[manifest.Lesson]) -> set[str]:
    """Lines of solutions and hidden tests of `lessons` that the released notebooks do not show."""
    visible = "\n".join(student_version.notebook_text(lesson) for lesson in lessons)
    found = set()
    for lesson in lessons:
        for cell in source.cells(lesson):
            regions = [match.group() for match in source.REGION.finditer(cell.source)] if cell.is_hole else []
            regions += re.findall(r"### BEGIN HIDDEN TESTS\n(.*?)### END HIDDEN TESTS", cell.source, re.S)
            found |= {line.strip() for region in regions for line in region.splitlines() if "### " not in line}
    return {line for line in found if len(line) >= DISTINCTIVE and json.dumps(line)[1:-1] not in visible}


def leaks(files: dict[str, bytes], secrets: set[str]) -> list[str]:
    """`file: line` for each secret that a file holds, as text or as text in JSON."""
    found = []
    for path, content in files.items():
        text = content.decode("utf-8", errors="replace")
        found += [f"{path}: {s}" for s in secrets if s in text or json.dumps(s)[1:-1] in text
                  or json.dumps(s, ensure_ascii=False)[1:-1] in text]  # fmt: skip
    return found


@pytest.fixture(scope="module")
def real() -> manifest.Course:
    if not (REPOSITORY / "src/course.toml").is_file():
        pytest.skip("a release has no src/")
    return manifest.load(REPOSITORY)


@pytest.fixture(scope="module")
def releases(real) -> dict[str, tuple[list[manifest.Lesson], dict[str, bytes]]]:
    """The students' folder of the real course: lesson 17 alone, and everything up to it."""
    lessons, last = list(real.lessons), real.lesson("17")
    return {
        "17": ([last], student_folder.contents(real, lessons, {last.folder})),
        "upto": (lessons, student_folder.contents(real, lessons, {lesson.folder for lesson in lessons})),
    }


@pytest.mark.parametrize("which", ["17", "upto"])
def test_no_line_of_a_solution_or_hidden_test_is_released(releases, which):
    graded, files = releases[which]
    secrets = secret_lines(graded)
    assert len(secrets) > 60 * len(graded) ** 0.5, "the search knows what to look for"
    assert len(files) > 100 and leaks(files, secrets) == []


def test_the_search_finds_a_planted_leak(releases):
    graded, files = releases["17"]
    secrets = secret_lines(graded)
    for line in ("return prompt_len + max_new_tokens - 1", "assert token_rows(128, 128, cached=False) == 24512"):
        (secret,) = [secret for secret in secrets if line in secret]
        for planted in (secret, f"    {secret}  # x", json.dumps([secret]), json.dumps({"a": secret + "\n"}, indent=1)):
            assert leaks(files | {"tito/x.bin": b"\xff\x00" + planted.encode()}, secrets) == [f"tito/x.bin: {secret}"]
    reference = student_version.reference_text(graded[0])
    assert len(leaks({"kv_cache.py": reference.encode()}, secrets)) > 30
    hidden = json.dumps([cell.source for cell in source.cells(graded[0])])
    assert len(leaks({"a.ipynb": hidden.encode()}, secrets)) == len(secrets)


def test_the_real_folders_hold_the_right_files(releases, real):
    for which, (graded, files) in releases.items():
        assert not [path for path in files if path.startswith(("src/", ".git", "tests/oracle", "tests/grading"))], which
        by_hand = ("tinytorch/demo/demo.safetensors", "tinytorch/models/checkpoint.py")
        for path in ("README.md", "LICENSE", "pyproject.toml", "tito/main.py", *by_hand):
            assert path in files, path
        present = {lesson.number for lesson in real.lessons if lesson.package_path.as_posix() in files}
        assert present == {lesson.number for lesson in real.lessons} - {lesson.number for lesson in graded}
        for lesson in real.lessons:
            assert files[f"modules/{lesson.folder}/{lesson.name}.ipynb"] == lesson.notebook.read_bytes()
            assert any(path.startswith(f"tests/{lesson.folder}/") for path in files)


def test_tito_of_the_released_folder_works_there(releases, tmp_path, empty_course):
    student_folder.put(releases["17"][1], tmp_path / "student")
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"PYTHONDONTWRITEBYTECODE": "1"}

    def tito(*arguments: str):
        command = [sys.executable, "-m", "tito", *arguments]
        return subprocess.run(command, cwd=tmp_path / "student", env=env, capture_output=True, encoding="utf-8")

    files = json.loads(tito("status", "--json").stdout)["files"]
    assert len(files) > 12
    assert all(file["owner"] == ("to build" if file["number"] == "17" else "reference") for file in files)
    refused = tito("grade", "release", "17", "--course", str(empty_course))
    assert refused.returncode == 1 and "maintainers' repository" in refused.stderr


def test_a_release_that_stopped_in_the_gradebook_is_made_whole_by_the_next(course, mini_root, monkeypatch):
    from nbgrader.api import Gradebook

    enter, seen = Gradebook.update_or_create_source_cell, []

    def stop(self, *arguments, **more):
        seen.append(arguments)
        if len(seen) == 5:  # 01 was entered whole, 02 in part
            raise KeyboardInterrupt
        return enter(self, *arguments, **more)

    with monkeypatch.context() as patch:
        patch.setattr(Gradebook, "update_or_create_source_cell", stop)
        with pytest.raises(KeyboardInterrupt):
            make(course, mini_root, "02", upto=True)
    assert course.released() == [] and not (course.root / "student").exists()
    half = rows(course)
    make(course, mini_root, "02", upto=True)
    whole = rows(course)
    assert course.released() == ["01_scale", "02_shift"] and len(whole) > len(half)
    shutil.rmtree(course.root / "grading")
    course.gradebook.unlink()
    with open_gradebook(course) as gradebook:
        students.enter(gradebook, CLASS)
    make(course, mini_root, "02", upto=True)
    assert rows(course) == whole, "as if it had never stopped"


# --- killed at any point -----------------------------------------------------------------------------------------

# Runs an action again and again on fresh folders, each time in a child that kills itself (SIGKILL) right before its
# k-th touch of the file system, for every k until the action comes to its end. The next command is not killed.
EVERY_POINT = """
import functools, json, os, shutil, signal, sys
from pathlib import Path
import nbgrader.api, nbgrader.dbutil
from nbgrader.preprocessors import SaveCells
from tito.course import manifest, student_version
from tito.instructor import assignment, freeze, init, release, students
from tito.instructor.course import GradingCourse

action, template, sources, place = sys.argv[1], *map(Path, sys.argv[2:])
freeze._controls = lambda *_: {}
nbgrader.api.get_alembic_version = lambda: "e43177bfe90b"  # a program of its own, which takes a second
student_version.notebook_text = functools.cache(student_version.notebook_text)  # what is read costs time, not safety
student_version.reference_text = functools.cache(student_version.reference_text)
release.freeze = functools.cache(release.freeze)
TOUCHES = ("open", "os.", "shutil.", "tempfile.", "sqlite3.")

def act(root):
    if action == "init":
        init.make(root / "course", [students.Student("ada")], "mini")
    else:
        course = GradingCourse(root)
        release.make(course, release.chosen(sources, "02", True), root / "student")

def is_write(event, arguments):
    if event == "open":
        return isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    silent = ("os.listdir", "os.scandir", "os.chdir", "os.putenv", "os.unsetenv")
    return event.startswith(TOUCHES) and event not in silent

def killed_at(k, root):
    child = os.fork()
    if child == 0:
        count = [0]
        def hook(event, arguments):
            if is_write(event, arguments):
                count[0] += 1
                if count[0] == k:
                    os.kill(os.getpid(), signal.SIGKILL)
        # nbgrader's part takes long, and test_a_release_that_stopped_in_the_gradebook stops there
        release.registration.register = release.registration.require_same_cells = lambda *_: None
        sys.addaudithook(hook)
        try:
            act(root)
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1]

def look(root):
    found = {p.relative_to(root).as_posix(): p for p in root.rglob("*") if p.suffix != ".db-journal"}
    return {name: "" if p.is_dir() or p.suffix == ".db" else p.read_text(encoding="utf-8", errors="replace")
            for name, p in found.items() if ".tmp" not in name}

warm = place / "warm"  # parsed sources and imported modules come with the fork
shutil.copytree(template, warm)
act(warm)
shutil.rmtree(warm)
points = []
for k in range(1, 2000):
    root = place / str(k)
    shutil.copytree(template, root)
    status = killed_at(k, root)
    state = {"after": look(root)}
    known = next((old for old in points if old["after"] == state["after"]), None)
    if known:  # the same files as at an earlier point: the next command does the same with them
        state = known
    elif action == "release" or not (root / "course").exists():
        act(root)
    state.setdefault("then", look(root))
    shutil.rmtree(root)
    if status == 0:
        break
    assert status == signal.SIGKILL, status
    points.append(state)
print(json.dumps({"points": points, "end": state}))
"""


def kill_everywhere(action: str, template: Path, sources: Path, place: Path) -> dict:
    place.mkdir()
    command = [sys.executable, "-c", EVERY_POINT, action, str(template), str(sources), str(place)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@posix
def test_init_killed_at_every_point(mini_root, tmp_path):
    (tmp_path / "empty").mkdir()
    result = kill_everywhere("init", tmp_path / "empty", mini_root, tmp_path / "runs")
    end = result["end"]["after"]
    parts = ("gradebook.db", "nbgrader_config.py", "release", "source", "submitted")
    assert sorted(end) == ["course", *(f"course/{name}" for name in parts)] and len(result["points"]) >= 8
    for state in result["points"]:
        assert state["after"] in ({}, end), "no course or a whole one"
        assert state["then"] == end


@posix
def test_release_killed_at_every_point(empty_course, released_course, mini_root, tmp_path):
    """From lesson 01 to 01 and 02: the students' folder is the old or the new one, and the next release heals."""
    result = kill_everywhere("release", released_course, mini_root, tmp_path / "runs")
    end = result["end"]["after"]
    old = {name: text for name, text in result["points"][0]["after"].items() if name.startswith("student/")}
    new = {name: text for name, text in end.items() if name.startswith("student/")}
    assert old != new and len(result["points"]) >= 30
    for state in result["points"]:
        after = state["after"]
        student = {name: text for name, text in after.items() if name.startswith("student/")}
        assert student in (old, new, {}), "one or the other, or for a moment only its old copy"
        if not student:
            assert {
                f"student/{name.split('/', 1)[1]}" for name in after if name.startswith("student-before-1/")
            } == set(old)
        for name, text in after.items():
            if name.endswith(("assignment.json", ".ipynb", "index.json")):
                json.loads(text)
        if "grading/02_shift/assignment.json" in after:
            assert student == new, "what is released has been handed out"
        then = {name: text for name, text in state["then"].items() if not name.startswith("student-before-")}
        assert then == end, "the next release makes it whole"


def test_an_assignment_of_another_format_asks_for_a_new_release(tmp_path):
    path = tmp_path / "assignment.json"
    path.write_text('{"format": 0, "name": "17_memoization"}', encoding="utf-8")
    with pytest.raises(CourseError, match="format 0.*format 1") as refused:
        assignment.read(path)
    assert "tito grade release" in refused.value.hint
