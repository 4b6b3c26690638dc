"""The command line: parse, call one function, exit with its code.

Nothing beyond Typer is imported at the top. Each command imports its own module when it runs, so `tito --help` is
quick; tests/architecture/test_budgets.py holds it to that.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer
import typer.core

from tito.course.errors import CourseError
from tito.instructor.cli import grade

HELP = """TinyTorch: build a deep-learning framework in NumPy, lesson by lesson.

Begin with `tito module list` and `tito module start 01`. A lesson is named by number, name or folder: 17,
memoization or 17_memoization."""
STYLE = {"rich_markup_mode": None, "add_completion": False, "pretty_exceptions_enable": False}
STYLE["context_settings"] = {"help_option_names": ["--help", "-h"], "max_content_width": 100}


class _Ordered(typer.core.TyperGroup):
    """Lists the commands in the order in which a student meets them."""

    def list_commands(self, context) -> list[str]:
        return sorted(self.commands, key=lambda name: ORDER.index(name) if name in ORDER else len(ORDER))


ORDER = ["module", "status", "doctor", "demo", "generate", "model", "serve", "explore", "grade", "dev"]
LOCAL = "127.0.0.1"  # only this machine
app = typer.Typer(**STYLE, cls=_Ordered, invoke_without_command=True, help=HELP)
module = typer.Typer(**STYLE, invoke_without_command=True, help="Work on a lesson.")
model = typer.Typer(**STYLE, invoke_without_command=True, help="Look at a downloaded model.")
dev = typer.Typer(**STYLE, invoke_without_command=True, help="For those who write lessons.")
app.add_typer(module, name="module")
app.add_typer(model, name="model")
app.add_typer(grade, name="grade")
app.add_typer(dev, name="dev")

LessonName = Annotated[str, typer.Argument(metavar="LESSON", help="17, memoization or 17_memoization.")]
LessonNames = Annotated[list[str] | None, typer.Argument(metavar="LESSON", help="All, where none is named.")]
Checkpoint = Annotated[Path | None, typer.Option(metavar="FILE", help="A GPT of `tito demo --train`.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document, for programs.")]


@app.callback()
def top(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        from importlib.metadata import version as installed

        print(f"tito {installed('tinytorch-course')}")
        raise typer.Exit()
    _help_if_alone(context)


@module.callback()
@model.callback()
@dev.callback()
def _help_if_alone(context: typer.Context) -> None:
    """Without a command, show which there are."""
    if context.invoked_subcommand is None:
        print(context.get_help())


def _course():
    from tito.course import manifest

    return manifest.load()


@module.command()
def start(lesson: LessonName, open: Annotated[bool, typer.Option(help="Open JupyterLab.")] = True) -> int:
    """Begin a lesson: what it builds and needs; opens its notebook."""
    from tito.student import start as job

    return job.start(_course(), lesson, open)


@module.command()
def test(lesson: LessonName, json: Json = False) -> int:
    """Run your notebook and show each check, with points."""
    from tito.student import test as job

    return job.test(_course(), lesson, json)


@module.command()
def complete(lesson: LessonName, json: Json = False) -> int:
    """Test, then put your code into the package."""
    from tito.student import complete as job

    return job.complete(_course(), lesson, json)


@module.command()
def hint(
    lesson: LessonName,
    exercise: Annotated[str | None, typer.Argument(metavar="EXERCISE", help="As in the list.")] = None,
    json: Json = False,
) -> int:
    """Show the next hint of an exercise, or list the exercises."""
    from tito.student import hint as job

    return job.hint(_course(), lesson, exercise, json)


@module.command()
def reset(lesson: LessonName) -> int:
    """Begin a lesson anew; your notebook is kept as a dated backup."""
    from tito.student import reset as job

    return job.reset(_course(), lesson)


@module.command(name="list")
def list_lessons(json: Json = False) -> int:
    """List the lessons and how far you are."""
    from tito.student import list as job

    return job.list_lessons(_course(), json)


@app.command()
def status(json: Json = False) -> int:
    """Show your progress, and which files of the package are yours."""
    from tito.student import status as job

    return job.status(_course(), json)


@app.command()
def doctor(json: Json = False) -> int:
    """Check that everything the course needs works here."""
    from tito.student import doctor as job

    return job.doctor(json)


@app.command()
def demo(
    prompt: Annotated[str | None, typer.Option(metavar="TEXT", help="The text to continue.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Use the GPT that comes with the course.")] = False,
    train: Annotated[bool, typer.Option("--train", help="Train a GPT first, about two minutes.")] = False,
    steps: Annotated[int | None, typer.Option(metavar="N", min=1, help="With --train: how many steps.")] = None,
    checkpoint: Checkpoint = None,
    tokens: Annotated[int, typer.Option(metavar="N", min=1, help="How many tokens to generate.")] = 120,
) -> int:
    """See the whole idea at work: a GPT with and without the KV cache."""
    from tito.student import demo as job

    if quick and train:
        raise CourseError("--quick and --train exclude each other.", "Choose one.")
    prompt, steps = job.PROMPT if prompt is None else prompt, steps or job.TRAINING_STEPS
    return job.run_demo(_course(), prompt, tokens, train, steps, checkpoint)


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="The text to continue; - reads it from stdin.")],
    model: Annotated[Path | None, typer.Option(metavar="DIRECTORY", help="A downloaded model to run.")] = None,
    checkpoint: Checkpoint = None,
    cache: Annotated[bool, typer.Option(help="Generate with the KV cache.")] = True,
    cache_dtype: Annotated[Literal["float32", "float16"] | None, typer.Option(help="How it stores numbers.")] = None,
    window: Annotated[int | None, typer.Option(metavar="N", min=1, help="It keeps the first 4 and last N.")] = None,
    temperature: Annotated[float, typer.Option(metavar="T", min=0.0, help="0 takes the likeliest token.")] = 0.0,
    top_k: Annotated[int | None, typer.Option(metavar="N", min=1, help="Choose among the k likeliest.")] = None,
    seed: Annotated[int | None, typer.Option(metavar="N", min=0, help="The same seed, the same text.")] = None,
    tokens: Annotated[int, typer.Option(metavar="N", min=1, help="How many tokens to generate.")] = 120,
) -> int:
    """Continue a text with a downloaded model, or with the demo's GPT."""
    from tito.student import generate as job

    options = {"new": tokens, "temperature": temperature, "top-k": top_k, "seed": seed}
    options |= {"cache-dtype": cache_dtype, "window": window}
    return job.run_generate(_course(), prompt, model, checkpoint, cache, options)


@model.command()
def info(directory: Annotated[Path, typer.Argument(metavar="DIRECTORY")], json: Json = False) -> int:
    """Show what a model is, and how much context fits into memory here."""
    from tito.student import model as job

    return job.info(_course(), directory, json)


@app.command()
def serve(
    checkpoint: Checkpoint = None,
    port: Annotated[int, typer.Option(metavar="N", min=0, max=65535, help="Where to listen; 0: a free one.")] = 8000,
    host: Annotated[str, typer.Option(metavar="ADDRESS", help="There is no password: mind who can reach it.")] = LOCAL,
    blocks: Annotated[int | None, typer.Option(metavar="N", min=1, help="Blocks of the cache, for all.")] = None,
    block_size: Annotated[int, typer.Option(metavar="N", min=1, help="Tokens in a block.")] = 16,
    max_running: Annotated[int, typer.Option(metavar="N", min=1, help="Requests that run at once.")] = 16,
    max_waiting: Annotated[int, typer.Option(metavar="N", min=1, help="Requests that may wait; more hear 503.")] = 256,
    token_budget: Annotated[int, typer.Option(metavar="N", min=1, help="Tokens of one pass of the model.")] = 256,
) -> int:
    """Serve the GPT built from your package over HTTP, as OpenAI does."""
    from tito.student import serve as job

    sizes = {"block-size": block_size, "max-running": max_running, "max-waiting": max_waiting}
    sizes |= {"token-budget": token_budget} | ({} if blocks is None else {"blocks": blocks})
    return job.run_serve(_course(), checkpoint, host, port, sizes)


@app.command()
def explore(
    what: Annotated[str, typer.Argument(metavar="WHAT", help="kv-cache")],
    prompt: Annotated[str | None, typer.Option(metavar="TEXT", help="The text to continue.")] = None,
    out: Annotated[Path, typer.Option(metavar="FILE", help="Where to write the page.")] = Path("cache.html"),
    tokens: Annotated[int, typer.Option(metavar="N", min=1, help="How many tokens to generate.")] = 32,
    checkpoint: Checkpoint = None,
) -> int:
    """Write an interactive page of a generation and its KV cache."""
    from tito.student import demo
    from tito.student import explore as job

    if what != "kv-cache":
        raise CourseError(f"There is nothing to explore called '{what}'.", "`tito explore kv-cache` is there.")
    return job.run_explore(_course(), demo.PROMPT if prompt is None else prompt, out, tokens, checkpoint)


@dev.command()
def build(lessons: LessonNames = None) -> int:
    """Build notebooks, package files and the index from src/."""
    from tito.maintainer import commands

    return commands.build_lessons(lessons or [])


@dev.command()
def verify(lessons: LessonNames = None) -> int:
    """Prove that the checks of lessons can fail, can pass, and help."""
    from tito.maintainer import commands

    return commands.verify_lessons(lessons or [])


def run(arguments: list[str]) -> int:
    """Run one command line; returns the exit code."""
    from tito import guard

    return guard.run(app, arguments)


def main() -> None:
    """The entry point of the console script."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: what tito has started ends with it
    sys.exit(run(sys.argv[1:]))
