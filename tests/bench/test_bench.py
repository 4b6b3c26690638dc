"""The bench's own logic: turns, medians, limits, who is left out, what is written. No clock decides anything here."""

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("resource", reason="the bench counts CPU seconds through a Unix module")

import harness  # noqa: E402
import report  # noqa: E402
import workload  # noqa: E402
from harness import Bench, Figure, Row, disagreement, figure, holds, part_of  # noqa: E402
from worker import ContenderFailed, Worker  # noqa: E402
from workload import PEERS, UNITS, Claim, Contender, Workload  # noqa: E402

spec = importlib.util.spec_from_file_location("bench_main", Path(__file__).with_name("__main__.py"))
program = importlib.util.module_from_spec(spec)
spec.loader.exec_module(program)

ALL = program.chosen([])


def two(*claims, **options) -> Workload:
    contenders = {"tinytorch": Contender(None), "PyTorch": Contender(None, "torch")}
    claims = claims or (Claim("tinytorch", "PyTorch", "ms", most=1),)
    return Workload("two", "two in turn", contenders, claims, **options)


class Script:
    """Stands for a Worker: replies what was written down, and notes who was asked what."""

    def __init__(self, asked, walls, answers=None, broken=(), alive=True):
        self.asked, self.walls, self.answers, self.broken, self.ended = asked, walls, answers or {}, broken, not alive

    def ask(self, do, contender=None, calls=None, **request):
        self.asked.append((do, contender) if calls is None else (do, contender, calls))
        if (do, contender) in self.broken:
            raise ContenderFailed("no luck")
        if do == "prepare":
            return {"work": {"tokens": 10, "bytes": 4e9}, "wall": 0.05, "answer": self.answers.get(contender)}
        if do == "timed":
            wall = self.walls[contender].pop(0)
            return {"wall": wall, "cpu": wall * (2 if contender == "tinytorch" else 4), "value": 1024.0}
        return {}

    def close(self):
        self.ended = True


def rows_of(each, walls, least_rounds=3, **script):
    asked = []
    bench = Bench(Path(), share=0, least_rounds=least_rounds, new_worker=lambda threads: Script(asked, walls, **script))
    return bench.measure("room", each), asked


class TestFigures:
    def test_a_figure_is_median_and_quartiles(self):
        values = np.random.default_rng(0).random(7).tolist()
        found = figure(values)
        np.testing.assert_allclose([found.low, found.median, found.high], np.percentile(values, [25, 50, 75]))

    def test_a_single_value_is_its_own_spread(self):
        assert figure([3.0]) == Figure(3.0, 3.0, 3.0)

    @pytest.mark.parametrize(
        ("limits", "ratio", "kept"),
        [(dict(least=1.2), 1.2, True), (dict(least=1.2), 1.19, False), (dict(most=0.8), 0.8, True),
         (dict(most=0.8), 0.81, False), ({}, 5.0, None)],
    )  # fmt: skip
    def test_a_limit_holds_at_itself(self, limits, ratio, kept):
        assert holds(Claim("a", "b", "ms", **limits), ratio) is kept

    @pytest.mark.parametrize(
        ("unit", "value"), [("tokens/s", 20.0), ("ms/token", 50.0), ("ms", 500.0), ("GB/s", 8.0), ("KiB", 3.0)]
    )
    def test_units(self, unit, value):
        assert UNITS[unit]({"tokens": 10, "bytes": 4e9}, 0.5, 3072) == pytest.approx(value)


class TestRounds:
    def test_ratios_are_of_neighbouring_rounds(self):
        """The machine becomes four times as slow: the ratio of the medians would be 0.25, or 4."""
        walls = {"tinytorch": [1.0, 4.0, 4.0], "PyTorch": [2.0, 8.0, 2.0]}
        (row,), _ = rows_of(two(), walls)
        assert (row.ratio.median, row.rounds, row.holds) == (0.5, 3, True)
        assert row.ours.median == 2000 and row.theirs.median == 1000  # ms of a run, two runs in each round
        assert row.cpu_ratio.median == 0.25

    def test_turns_go_there_and_back_with_as_many_runs_for_each(self):
        _, asked = rows_of(two(), {"tinytorch": [1.0] * 3, "PyTorch": [1.0] * 3})
        assert asked[:2] == [("prepare", "tinytorch"), ("prepare", "PyTorch")]
        turns = [each[1] for each in asked if each[0] == "timed"]
        assert turns == ["PyTorch", "tinytorch", "tinytorch", "PyTorch", "PyTorch", "tinytorch"]
        assert {each[2] for each in asked if each[0] == "timed"} == {2}  # 0.05 s each: two make a tenth of a second
        assert asked[-2:] == [("drop", None)] * 2

    def test_the_clock_of_the_claim_decides(self):
        claims = Claim("tinytorch", "PyTorch", "ms"), Claim("tinytorch", "PyTorch", "ms", clock="cpu")
        rows, _ = rows_of(two(*claims), {"tinytorch": [1.0] * 3, "PyTorch": [1.0] * 3})
        found = [(row.ours.median, row.ratio.median, row.cpu_ratio.median) for row in rows]
        assert found == [(500, 1, 0.5), (1000, 0.5, 0.5)]

    def test_time_ends_them_and_there_are_never_too_many(self, monkeypatch):
        walls = {"tinytorch": [1.0] * 99, "PyTorch": [1.0] * 99}
        bench = Bench(Path(), least_rounds=3, new_worker=lambda threads: Script([], walls))
        clock = SimpleNamespace(perf_counter=iter(range(999)).__next__)  # a second between two looks
        monkeypatch.setattr(harness, "time", clock)
        assert bench.measure("room", two(seconds=6))[0].rounds == 3 + 6  # it looks only after the least
        assert bench.measure("room", two(seconds=500))[0].rounds == harness.MOST_ROUNDS

    def test_who_fails_has_a_row_that_says_why(self):
        claims = Claim("tinytorch", "PyTorch", "ms", most=1), Claim("tinytorch", "tinytorch", "ms")
        walls = {"tinytorch": [1.0] * 3, "PyTorch": [1.0] * 3}
        failed, kept = rows_of(two(*claims), walls, broken={("prepare", "PyTorch")})[0]
        assert failed.problem == "PyTorch: no luck" and failed.ratio is None and failed.holds is None
        assert kept.ratio.median == 1 and not kept.problem
        for row in rows_of(two(*claims), walls, broken={("timed", "PyTorch")})[0]:
            assert row.problem.endswith("no luck")

    def test_a_process_that_has_ended_is_started_anew(self):
        made = []

        def new(threads):
            made.append(Script([], {"tinytorch": [1.0] * 9, "PyTorch": [1.0] * 9}))
            return made[-1]

        bench = Bench(Path(), share=0, new_worker=new)
        bench.measure("room", two())
        assert len(made) == 2
        made[1].ended = True
        assert bench.measure("room", two())[0].ratio and len(made) == 3
        bench.close()
        assert all(script.ended for script in made)


class TestSameWork:
    @pytest.mark.parametrize(
        ("a", "b", "tolerance", "said"),
        [([1.0, 2.0], [1.0, 2.1], 0.2, ""), ([1.0, 2.0], [1.0, 2.1], 0.05, "differ by 0.1"),
         ([1.0], [1.0, 2.0], 0.2, "1 numbers and 2"), (None, [1.0], 0.0, ""), ([1.0], [9.0], None, "")],
    )  # fmt: skip
    def test_answers_are_compared(self, a, b, tolerance, said):
        found = disagreement([a, b], tolerance)
        assert said in found and bool(said) is bool(found)

    def test_other_work_has_no_ratio(self):
        walls = {"tinytorch": [1.0] * 3, "PyTorch": [1.0] * 3}
        (row,), _ = rows_of(two(), walls, answers={"tinytorch": [1.0], "PyTorch": [2.0]})
        assert row.problem == "not the same work: results differ by 1" and row.ratio is None


class TestSelection:
    claims = Claim("tinytorch", "PyTorch", "ms", most=1), Claim("tinytorch", "PyTorch", "ms")

    def test_a_missing_peer_takes_its_claims_along(self):
        whole = two(*self.claims, Claim("tinytorch", "tinytorch", "ms"))
        assert part_of(whole, set(), quick=False) == whole
        part = part_of(whole, {"torch"}, quick=False)
        assert part.claims == whole.claims[2:] and list(part.contenders) == ["tinytorch"]
        assert part_of(two(), {"torch"}, quick=False) is None

    def test_quick_keeps_what_has_a_limit_and_is_not_long(self):
        assert part_of(two(*self.claims), set(), quick=True).claims == self.claims[:1]
        assert part_of(two(*self.claims, long=True), set(), quick=True) is None

    def test_who_is_not_installed_is_named(self, monkeypatch):
        monkeypatch.setattr(workload, "find_spec", lambda name: None if name == "transformers" else name)
        selection, left_out = program.taking_part(ALL, quick=False)
        assert left_out == ["transformers is left out: transformers not installed (pip install -e '.[oracle]')"]
        peers = {contender.peer for _, each in selection for contender in each.contenders.values()}
        assert peers == set(PEERS) - {"transformers"}

    def test_quick_names_what_it_leaves_out(self):
        _, (*_, said) = program.taking_part(ALL, quick=True)
        assert "--quick" in said and "cache-6x384-text" in said

    def test_by_room_by_name_or_not_at_all(self):
        assert {room for room, _ in program.chosen(["training"])} == {"training"}
        assert [each.name for _, each in program.chosen(["small-text", "start-tito"])] == ["small-text", "start-tito"]
        with pytest.raises(SystemExit, match="no workload is called smal; known are .*small-text"):
            program.chosen(["smal", "training"])


class TestWorkloads:
    def test_names_are_unique(self):
        names = [each.name for _, each in ALL]
        assert len(set(names)) == len(names) and not set(names) & {*program.ROOMS, "grading"}

    @pytest.mark.parametrize("each", [each for _, each in ALL], ids=lambda each: each.name)
    def test_claims_fit(self, each):
        assert each.claims and each.seconds > 0
        for claim in each.claims:
            assert {claim.ours, claim.theirs} <= set(each.contenders) and claim.ours != claim.theirs
            assert claim.unit in UNITS and claim.clock in ("wall", "cpu")
            assert claim.least is None or claim.most is None
        assert {contender.peer for contender in each.contenders.values()} <= set(PEERS)

    def test_the_rounds_of_a_full_run_take_less_than_seven_minutes(self):
        assert sum(each.seconds for _, each in ALL) < 7 * 60


TOY = """
import os
from workload import Claim, Contender, Task, Workload

class Count(Task):
    work = {"tokens": 3}
    def __init__(self, folder):
        print("what a library says")
        self.runs, self.rewound, self.folder = 0, 0, folder
    def run(self):
        self.runs += 1
        return self.runs - self.rewound  # 1, if every run is rewound
    def rewind(self):
        self.rewound += 1
    def answer(self):
        return [int(os.environ["OMP_NUM_THREADS"]), self.folder.name == "here"]

class Raises(Task):
    def __init__(self, folder):
        raise ValueError("a bad shape")

class Dies(Count):
    def run(self):
        os.write(2, b"first words\\nlast words\\n")
        os._exit(3)

class Odd(Count):
    def run(self):
        return object()

WORKLOADS = [Workload("toys", "toys", {kind.__name__: Contender(kind) for kind in (Count, Raises, Dies, Odd)}, ())]
"""


@pytest.fixture
def worker(tmp_path, monkeypatch):
    (tmp_path / "toy.py").write_text(TOY)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    worker = Worker(threads=3)
    yield worker
    worker.close()
    assert worker.ended


class TestWorker:
    def prepare(self, worker, contender):
        return worker.ask("prepare", contender=contender, file="toy", name="toys", folder="here")

    def test_rounds_of_a_task(self, worker):
        made = self.prepare(worker, "Count")
        assert made["work"] == {"tokens": 3} and made["answer"] == [3, 1] and made["wall"] >= 0
        told = worker.ask("timed", contender="Count", calls=4)
        assert told["value"] == 1 and told["wall"] > 0 and told["cpu"] >= 0
        worker.ask("drop")
        with pytest.raises(ContenderFailed, match="KeyError"):
            worker.ask("timed", contender="Count", calls=1)

    @pytest.mark.parametrize(("contender", "said"), [("Raises", "ValueError: a bad shape"), ("Odd", "TypeError.*JSON")])
    def test_an_error_is_told_and_the_process_goes_on(self, worker, contender, said):
        with pytest.raises(ContenderFailed, match=said):
            self.prepare(worker, contender)
            worker.ask("timed", contender=contender, calls=1)
        assert self.prepare(worker, "Count")["work"] == {"tokens": 3}

    def test_a_process_that_dies_leaves_its_last_words(self, worker):
        for _ in range(2):
            with pytest.raises(ContenderFailed, match="its process ended: last words"):
                self.prepare(worker, "Dies")
        assert worker.ended


@pytest.fixture
def run():
    claims = [Claim("tinytorch", "transformers", "tokens/s", least=1.2), Claim("tinytorch", "PyTorch", "ms", most=0.8),
              Claim("tito", "import typer", "ms", clock="cpu"), Claim("ours", "PyTorch", "ms", most=1)]  # fmt: skip
    rows = [Row("room", "name", f"workload {number}", claim, Figure(1234.5, 1, 2), Figure(0.61728, 1, 2),
                Figure(1.5, 1.4, 1.6), Figure(1.7, 1.6, 1.8), holds(claim, 1.5), 5)
            for number, claim in enumerate(claims[:3])]  # fmt: skip
    rows.append(Row("room", "name", "workload 3", claims[3], problem="PyTorch: no luck"))
    return report.Run(rows, "2031-05-06", "a machine", {"NumPy": "9.8"}, 1, [0.25, 0.5], 12.3, ["peer x is left out"],
                      False)  # fmt: skip


class TestReport:
    def test_the_table(self, run):
        head, *lines = report.as_text(run).split("\n")
        assert head.split() == " ".join(report.HEAD).split()
        assert [line.split("  ")[0] for line in lines[:4]] == [f"workload {number}" for number in range(4)]
        assert len({line.index("1.50 (1.40 to 1.60)") for line in lines[:3]}) == 1  # columns
        assert "1,234 tokens/s" in lines[0] and "0.617 tokens/s" in lines[0] and lines[0].endswith("at least 1.2  yes")
        assert " 1.70  " in lines[1] and lines[1].endswith("at most 0.8   no")
        assert "1,234 ms CPU" in lines[2] and "at " not in lines[2]
        assert "failed" in lines[3] and lines[3].endswith("no")
        assert lines[4:6] == ["workload 3, beside PyTorch: PyTorch: no luck", "peer x is left out"]
        assert lines[6].startswith("2031-05-06; a machine; NumPy 9.8; float32, threads per process: 1; load 0.2 before")

    def test_the_json_holds_what_the_table_shows(self, run):
        told = json.loads(report.as_json(run))
        assert told["machine"] == "a machine" and told["load"] == [0.25, 0.5] and len(told["rows"]) == 4
        first, *_, failed = told["rows"]
        assert first["claim"]["least"] == 1.2 and first["ratio"] == {"median": 1.5, "low": 1.4, "high": 1.6}
        assert first["holds"] is True and failed["problem"] == "PyTorch: no luck" and failed["ratio"] is None

    def test_the_page(self, run):
        page = report.as_page(run)
        rows = [line for line in page.split("\n") if line.startswith("|")]
        assert len(rows) == 6 and {row.count("|") for row in rows} == {len(report.HEAD) + 1}
        assert rows[2].startswith("| workload 0 | 1,234 tokens/s | transformers |")
        assert "- peer x is left out\n\n2031-05-06; a machine; NumPy 9.8" in page
        assert max(map(len, report.PAGE.split("\n"))) <= 120
        alone = report.as_page(replace(run, rows=run.rows[:1], left_out=[]))
        assert "- " not in alone.split("| yes |")[1].split("2031")[0]

    def test_which_side_of_the_limit(self, run):
        assert report.margin(run.rows[0], 2.4) == 2 and report.margin(run.rows[1], 0.4) == 2

    def test_the_plot(self, run, tmp_path):
        pytest.importorskip("matplotlib")
        assert report.plot(run, tmp_path / "plot.svg")
        assert (tmp_path / "plot.svg").read_text(encoding="utf-8").startswith("<?xml")

    def test_without_matplotlib_there_is_no_plot(self, run, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
        assert not report.plot(run, tmp_path / "plot.svg") and not list(tmp_path.iterdir())


class TestProgram:
    def start(self, monkeypatch, *arguments):
        monkeypatch.setattr(sys, "argv", ["bench", *arguments])
        program.main()

    @pytest.fixture(autouse=True)
    def unmeasured(self, monkeypatch, tmp_path, run):
        """Nothing is measured, and the page lies in a folder of the test."""
        self.asked, self.page = [], tmp_path / "page.md"
        monkeypatch.setattr(program, "PAGE", self.page)
        monkeypatch.setattr(program, "measured", lambda *arguments: self.asked.append(arguments) or run.rows)

    def test_a_part(self, monkeypatch, tmp_path, capsys):
        self.start(monkeypatch, "training", "--threads", "2", "--out", str(tmp_path / "out"))
        (selection, threads, quick), = self.asked
        assert {room for room, _ in selection} == {"training"} and (threads, quick) == (2, False)
        said = capsys.readouterr()
        assert "workload 0" in said.out and "bench.json" in said.err
        assert json.loads((tmp_path / "out" / "bench.json").read_text())["threads"] == 2 and not self.page.exists()

    def test_the_page_is_written_after_a_full_run_alone(self, monkeypatch, tmp_path, capsys):
        for arguments in (["training"], ["--quick"]):
            with pytest.raises(SystemExit):
                self.start(monkeypatch, "--page", *arguments)
            assert "last full table" in capsys.readouterr().err
        assert not self.asked and not self.page.exists()
        self.start(monkeypatch, "--page", "--out", str(tmp_path / "out"))
        assert len(self.asked[0][0]) >= len(ALL) - 10 and "| workload 0 |" in self.page.read_text(encoding="utf-8")

    def test_the_list(self, monkeypatch, capsys):
        self.start(monkeypatch, "--list")
        assert [line.split()[1] for line in capsys.readouterr().out.splitlines()] == [each.name for _, each in ALL]
        assert not self.asked

    def test_grading_has_pages_of_its_own(self, monkeypatch, capsys):
        with pytest.raises(SystemExit):
            self.start(monkeypatch, "grading", "--help")
        assert "--students" in capsys.readouterr().out
