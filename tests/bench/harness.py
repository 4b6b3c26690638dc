"""Rounds in turn, and what they say: medians, quartiles, ratios of neighbouring rounds, and whether a limit holds."""

import statistics
import time
from dataclasses import dataclass
from pathlib import Path

from worker import ContenderFailed, Worker
from workload import Claim, Workload

MOST_ROUNDS, SHORTEST_ROUND = 25, 0.1  # rounds of each contender; seconds of one, of the slowest contender


@dataclass(frozen=True)
class Figure:
    """A median and its quartiles."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Row:
    """What a claim came to; ratio is ours / theirs. problem: why there is no figure, or why it means nothing."""

    room: str
    workload: str
    title: str
    theirs: str
    unit: str
    clock: str
    limit: str = ""
    our_figure: Figure | None = None
    their_figure: Figure | None = None
    ratio: Figure | None = None
    holds: bool | None = None
    rounds: int = 0
    problem: str = ""


def figure(values: list[float]) -> Figure:
    """The median and the quartiles; of a single value, itself three times."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return Figure(median, low, high)


def quantity(claim: Claim, work: dict, calls: int, seconds: dict) -> float:
    """What the claim's unit makes of one round."""
    if claim.unit == "KiB":
        return seconds["value"] / 1024
    per_run = seconds[claim.clock] / calls
    if claim.unit == "ms":
        return 1e3 * per_run
    return {"tokens/s": work.get("tokens", 0), "GB/s": work.get("bytes", 0) / 1e9}[claim.unit] / per_run


def limit_text(claim: Claim) -> str:
    if claim.least is not None:
        return f"at least {claim.least:g}"
    return "" if claim.most is None else f"at most {claim.most:g}"


def holds(claim: Claim, ratio: float) -> bool | None:
    """Whether the median ratio keeps the limit; None where there is none."""
    if claim.least is not None:
        return ratio >= claim.least
    return None if claim.most is None else ratio <= claim.most


def row_of(room: str, workload: Workload, claim: Claim, work: dict, calls: int, rounds: dict) -> Row:
    """The row of a claim. rounds: contender -> its rounds, in the order in which they were run in turn."""
    ours = [quantity(claim, work[claim.ours], calls, each) for each in rounds[claim.ours]]
    theirs = [quantity(claim, work[claim.theirs], calls, each) for each in rounds[claim.theirs]]
    ratio = figure([a / b for a, b in zip(ours, theirs, strict=True)])
    return Row(room, workload.name, claim.title or workload.title, claim.theirs, claim.unit, claim.clock,
               limit_text(claim), figure(ours), figure(theirs), ratio, holds(claim, ratio.median), len(ours))  # fmt: skip


def disagreement(answers: dict[str, list[float] | None], ours: str, theirs: str, tolerance: float) -> str:
    """Why the two have not done the same work, or nothing."""
    a, b = answers.get(ours), answers.get(theirs)
    if a is None or b is None:
        return ""
    if len(a) != len(b):
        return f"not the same work: {len(a)} numbers against {len(b)}"
    worst = max((abs(x - y) for x, y in zip(a, b)), default=0.0)
    return "" if worst <= tolerance else f"not the same work: results differ by {worst:.2g}"


class Bench:
    """One worker per peer, started when it is first needed."""

    def __init__(self, folder: Path, threads: int = 1, share: float = 1.0, least_rounds: int = 3, new_worker=Worker):
        self.folder, self.threads, self.share, self.least_rounds = folder, threads, share, least_rounds
        self.new_worker, self.workers = new_worker, {}

    def worker(self, peer: str):
        if peer in self.workers and self.workers[peer].ended:
            self.workers.pop(peer).close()
        if peer not in self.workers:
            self.workers[peer] = self.new_worker(self.threads)
        return self.workers[peer]

    def close(self) -> None:
        for worker in self.workers.values():
            worker.close()

    def ask(self, do: str, workload: Workload, contender: str, **request) -> dict:
        return self.worker(workload.contenders[contender].peer).ask(do, contender=contender, **request)

    def measure(self, room: str, workload: Workload, without: set[str] = frozenset()) -> list[Row]:
        """The rows of a workload; `without`: peers that take no part."""
        failed, made = {}, {}
        for name, contender in workload.contenders.items():
            if contender.peer in without:
                continue
            try:
                made[name] = self.ask("prepare", workload, name, file=room, name=workload.name, folder=str(self.folder))
            except ContenderFailed as error:
                failed[name] = str(error)
        rounds, calls, rows = {}, 0, []
        try:
            rounds, calls = self.rounds(workload, list(made))
        except ContenderFailed as error:
            failed |= dict.fromkeys(made, str(error))
        for worker in self.workers.values():
            if not worker.ended:
                worker.ask("drop")
        for claim in workload.claims:
            if any(workload.contenders[name].peer in without for name in (claim.ours, claim.theirs)):
                continue
            rows.append(self.row(room, workload, claim, failed, made, calls, rounds))
        return rows

    def row(self, room, workload, claim, failed, made, calls, rounds) -> Row:
        answers = {name: reply["answer"] for name, reply in made.items()}
        problem = next((f"{name}: {failed[name]}" for name in (claim.ours, claim.theirs) if name in failed), "")
        problem = problem or disagreement(answers, claim.ours, claim.theirs, workload.tolerance)
        if problem:
            return Row(room, workload.name, claim.title or workload.title, claim.theirs, claim.unit, claim.clock,
                       limit_text(claim), problem=problem)  # fmt: skip
        return row_of(room, workload, claim, {name: reply["work"] for name, reply in made.items()}, calls, rounds)

    def rounds(self, workload: Workload, names: list[str]) -> tuple[dict[str, list[dict]], int]:
        """Rounds in turn, there and back, so that nobody is always first, until the time is over."""
        end = time.perf_counter() + self.share * workload.seconds
        first = {name: self.ask("timed", workload, name, calls=1) for name in names}
        slowest = max(each["wall"] for each in first.values())
        calls = max(1, round(SHORTEST_ROUND / max(slowest, 1e-6)))
        rounds = {name: [] for name in names}
        for number in range(MOST_ROUNDS):
            if number >= self.least_rounds and time.perf_counter() > end:
                break
            for name in names if number % 2 else reversed(names):
                rounds[name].append(self.ask("timed", workload, name, calls=calls))
        return rounds, calls
