"""The folder that students get: all that they need to work on the released lessons, and nothing more."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path

from tito.course import manifest, student_version
from tito.course.errors import CourseError
from tito.course.manifest import INDEX, Course, Lesson
from tito.course.processes import remove_tree
from tito.instructor import freeze
from tito.instructor.student_readme import readme

MARKER = "release.json"  # in the folder: that we made it, from what, and each file as we wrote it
PLAIN_FILES = ("LICENSE", "pyproject.toml")
CACHES = {"__pycache__", ".ipynb_checkpoints"}


def contents(course: Course, lessons: list[Lesson], graded: set[str]) -> dict[str, bytes]:
    """Path -> bytes of every file. `lessons` are those up to the highest released; `graded` names the released ones.

    Notebooks and reference files come from src/, not from modules/ and tinytorch/, where a maintainer may have
    played the student. The files of graded lessons are left out: they are what students build.
    """
    root, texts = course.root, {}
    for lesson in lessons:
        notebook = student_version.notebook_text(lesson)
        freeze.require_up_to_date(lesson, notebook)
        texts[lesson.notebook.relative_to(root).as_posix()] = notebook
        if lesson.folder not in graded:
            texts[lesson.package_path.as_posix()] = student_version.reference_text(lesson)
    texts |= freeze.rooms(root)
    texts[INDEX.as_posix()] = _index(root, lessons, graded)
    texts["README.md"] = readme(course, [lesson for lesson in lessons if lesson.folder in graded])
    files = {path: text.encode("utf-8") for path, text in texts.items()}
    for folder in ("tito", *manifest.UNTAUGHT, *(f"tests/{lesson.folder}" for lesson in lessons)):
        files |= {p.relative_to(root).as_posix(): p.read_bytes() for p in _package_files(root / folder)}
    files |= {name: (root / name).read_bytes() for name in PLAIN_FILES if (root / name).is_file()}
    listed = {path: hashlib.sha256(content).hexdigest() for path, content in sorted(files.items())}
    marker = {"made by": "tito grade release", "lessons": sorted(graded), "files": listed}
    return files | {MARKER: (json.dumps(marker, indent=1) + "\n").encode()}


def _index(root: Path, lessons: list[Lesson], graded: set[str]) -> str:
    """modules/index.json, cut to `lessons`; those that are `graded` come without a reference."""
    index = json.loads((root / INDEX).read_text(encoding="utf-8"))
    entries = {entry["number"]: entry for entry in index["lessons"]}
    index["lessons"] = [
        entries[lesson.number] | ({"has_reference": False} if lesson.folder in graded else {}) for lesson in lessons
    ]
    return json.dumps(index, indent=1, ensure_ascii=False) + "\n"


def _package_files(folder: Path) -> list[Path]:
    """The files below `folder`, without caches and hidden ones; `folder` may be a file itself."""
    return [
        path
        for path in [folder, *sorted(folder.rglob("*"))]
        if path.is_file() and path.suffix not in (".pyc", ".tmp")
        and not any(part in CACHES or part.startswith(".") for part in path.relative_to(folder).parts)
    ]  # fmt: skip


def require_ours(folder: Path) -> None:
    """A CourseError unless `folder` is free or one that we made."""
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise CourseError(f"{folder} is no folder.", "Name a new or empty folder by --out.")
    if folder.is_dir() and any(folder.iterdir()) and _listed(folder) is None:
        raise CourseError(
            f"{folder} is not empty, and `tito grade release` did not make it (it holds no {MARKER}).",
            "Name a new or empty folder by --out.",
        )


def _listed(folder: Path) -> dict[str, str] | None:
    """Path -> SHA-256 as we wrote them, None where the folder is not ours."""
    try:
        marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        return dict(marker["files"]) if marker["made by"] == "tito grade release" else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def put(files: dict[str, bytes], folder: Path) -> Path | None:
    """Put `files` in the place of `folder` in one step. Returns where the old folder is kept, if it held other work."""
    if folder.is_dir() and _present(folder) == {path: hashlib.sha256(data).digest() for path, data in files.items()}:
        return None
    folder.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.", suffix=".tmp"))
    try:
        building.chmod(0o755)
        for path, data in files.items():
            (building / path).parent.mkdir(parents=True, exist_ok=True)
            (building / path).write_bytes(data)
        kept = _put_aside(folder)
        os.rename(building, folder)
    except BaseException:
        remove_tree(building)
        raise
    if kept and _is_untouched(kept):
        remove_tree(kept)
        return None
    return kept


def _put_aside(folder: Path) -> Path | None:
    """Rename the old folder; None where there is none."""
    if not folder.is_dir():
        return None
    if not any(folder.iterdir()):
        folder.rmdir()
        return None
    names = (folder.with_name(f"{folder.name}-before-{n}") for n in range(1, 10_000))
    kept = next(name for name in names if not os.path.lexists(name))
    os.rename(folder, kept)
    return kept


def _present(folder: Path) -> dict[str, bytes]:
    """Path -> SHA-256 of all files but caches."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).digest()
        for path in folder.rglob("*")
        if path.is_file() and not CACHES & set(path.relative_to(folder).parts)
    }


def _is_untouched(folder: Path) -> bool:
    """Does the folder hold what we wrote, and nothing else?"""
    listed, present = _listed(folder) or {}, _present(folder)
    present.pop(MARKER, None)
    return {path: digest.hex() for path, digest in present.items()} == listed
