"""The words for how a run ended: one clear sentence each, naming the cell and, where we can, what to do."""

from __future__ import annotations

import signal

DELETED = (
    "The cell of this check was deleted, so nothing shows that the exercise is right. "
    "`tito module reset {lesson}` brings the notebook as released and keeps yours as a backup to copy from."
)
CHANGED = (
    "The cell of this check was changed, so it does not count. Undo the change, or "
    "`tito module reset {lesson}` brings the notebook as released and keeps yours as a backup to copy from."
)
NOT_CODE = "The cell of this check was turned into text. Turn it back into a code cell."

INPUT = "StdinNotImplementedError"


def late(limits) -> str:
    return f"Took longer than {limits.cell_seconds:g} seconds and was interrupted. Is there a loop that never ends?"


def not_reached(story, number: int, where: dict[int, str]) -> str:
    """Why a check has no result of its own."""
    if story.running == number:
        return "The run ended in this very check, so it is not passed."
    if story.running is not None:
        return f"Not reached: the run ended in {where[story.running]}."
    return "Not reached: the run ended before."


def sentence(error: dict, where: dict[int, str], limits) -> str:
    """What went wrong in a cell. A check's own message stands for itself; other errors get their name and place."""
    name, text = error["name"], error["text"].strip()
    place = _place(error["place"], where)
    if name == "AssertionError":
        code = (error["place"] or {}).get("code")
        return text or f"The check failed without a message{f', at: {code}' if code else '.'}"
    if name == "NotImplementedError":
        return text or f"Something is not written yet (NotImplementedError){place}."
    if name == INPUT:
        return f"Asks for input, which nobody can give while tito runs the notebook{place}."
    if name == "SystemExit":
        return f"The code ended itself by exit or sys.exit{place}."
    if name == "MemoryError":
        return f"MemoryError: {text or 'no more memory'}{place}; a run may use {limits.memory_bytes / 2**30:g} GiB."
    return f"{name}: {text}{place}" if text else f"{name}{place}"


def _place(place: dict | None, where: dict[int, str]) -> str:
    if not place:
        return ""
    spot = where.get(int(place["cell"])) if place.get("cell") else place.get("file")
    code = f": {place['code']}" if place.get("code") else ""
    return f" ({spot}, line {place['line']}{code})" if spot else ""


def problem_of_run(story, where: dict[int, str], limits, last_words: str) -> str | None:
    """The sentence for a run that was stopped, None for one that went through all cells."""
    if story.finished:
        return None
    if story.stopped is None:
        return f"The program that runs the notebook ended by itself: {last_words or 'no reason given'}."
    why, number = story.stopped["why"], story.stopped["cell"]
    cell = where.get(number, "the start") if number is not None else "the start"
    if why == "start":
        return "The kernel did not start. `tito doctor` looks for the reason."
    if why == "time":
        return f"The notebook was stopped in {cell}: a run may take {limits.seconds:g} seconds."
    if why == "stuck":
        return (
            f"{capital(cell)} took longer than {limits.cell_seconds:g} seconds and could not be interrupted, "
            "so the run was stopped there. Is there a loop that never ends?"
        )
    if why == "output":
        much = f"more than {limits.output_bytes / 1e6:g} MB of text, or too many pictures"
        return f"The run was stopped in {cell}: it printed {much}."
    if why == "memory":
        return f"The run was stopped in {cell}: it used more than {limits.memory_bytes / 2**30:g} GiB of memory."
    return f"The kernel died in {cell}: {death(story.stopped['code'])}."


def is_problem(event: dict) -> bool:
    """Whether the end of a cell concerns the whole run: it was interrupted, or asked for input."""
    return event["late"] or bool(event["error"] and event["error"]["name"] == INPUT)


def problem_of_cells(ended: dict[int, dict], where: dict[int, str], limits) -> str | None:
    """The first cell that had to be interrupted or asked for input, in a run that went on after it."""
    for number, event in ended.items():
        if is_problem(event):
            text = late(limits) if event["late"] else sentence(event["error"], where, limits)
            return f"{capital(where[number])}: {small(text)}"
    return None


def problem_of_tests(timed_out: bool, running: str, limits, last_words: str) -> str:
    """The sentence for progressive tests that did not come to their end."""
    where = f" in {running}" if running else " before the first test"
    if timed_out:
        return f"The progressive tests were stopped{where}: they may take {limits.seconds:g} seconds."
    return f"The progressive tests ended by themselves{where}{f': {last_words}' if last_words else ''}."


def death(code: int | None) -> str:
    if code is None:
        return "the reason is unknown"
    if code >= 0:
        return f"the code ended the process (exit status {code}), as exit() and os._exit() do"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        return f"it was ended by signal {-code}"
    known = {
        "SIGSEGV": "a crash in memory (SIGSEGV), as endless recursion or ctypes can cause",
        "SIGKILL": "it was killed (SIGKILL), as happens when memory runs out",
        "SIGXFSZ": "it wrote a file that is too large (SIGXFSZ)",
    }
    return known.get(name, f"it was ended by {name}")


def capital(text: str) -> str:
    """As it begins a sentence."""
    return text[:1].upper() + text[1:]


def small(text: str) -> str:
    """A sentence as it goes on behind a colon."""
    return text[:1].lower() + text[1:]
