"""Rounds in turn, and what they say: medians, quartiles, ratios of neighbouring rounds, and whether a limit holds."""

import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path

from worker import ContenderFailed, Worker
from workload import UNITS, Claim, Workload

MOST_ROUNDS, SHORTEST_ROUND = 25, 0.1  # of each contender; seconds that the slowest one takes for its runs in a round


@dataclass(frozen=True)
class Figure:
    """A median and its quartiles."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Row:
    """What a claim came to; ratio is ours / theirs, cpu_ratio the same by CPU seconds. problem: why there is none."""

    room: str
    workload: str
    title: str
    claim: Claim
    ours: Figure | None = None
    theirs: Figure | None = None
    ratio: Figure | None = None
    cpu_ratio: Figure | None = None
    holds: bool | None = None
    rounds: int = 0
    problem: str = ""


def figure(values: list[float]) -> Figure:
    """The median and the quartiles; of a single value, itself three times."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return Figure(median, low, high)


def holds(claim: Claim, ratio: float) -> bool | None:
    """Whether a ratio keeps the limit; None where there is none."""
    if claim.least is not None:
        return ratio >= claim.least
    return None if claim.most is None else ratio <= claim.most


def part_of(workload: Workload, without: set[str], quick: bool) -> Workload | None:
    """The workload without the claims that need a missing peer and, if quick, those without a limit; None: no claim."""
    peers = {name: contender.peer for name, contender in workload.contenders.items()}
    claims = [claim for claim in workload.claims
              if not {peers[claim.ours], peers[claim.theirs]} & without
              and not (quick and claim.least is None and claim.most is None)]  # fmt: skip
    if not claims or (quick and workload.long):
        return None
    names = {name for claim in claims for name in (claim.ours, claim.theirs)}
    contenders = {name: contender for name, contender in workload.contenders.items() if name in names}
    return replace(workload, claims=tuple(claims), contenders=contenders)


def disagreement(answers: list[list[float] | None], tolerance: float | None) -> str:
    """Why two have not done the same work, or nothing."""
    a, b = answers
    if a is None or b is None or tolerance is None:
        return ""
    if len(a) != len(b):
        return f"not the same work: {len(a)} numbers and {len(b)}"
    worst = max((abs(x - y) for x, y in zip(a, b)), default=0.0)
    return "" if worst <= tolerance else f"not the same work: results differ by {worst:.2g}"


class Bench:
    """One worker per peer, started when it is first needed. `share` of each workload's seconds is spent."""

    def __init__(self, folder: Path, threads: int = 1, share: float = 1.0, least_rounds: int = 3, new_worker=Worker):
        self.folder, self.threads, self.share, self.least_rounds = folder, threads, share, least_rounds
        self.new_worker, self.workers = new_worker, {}

    def close(self) -> None:
        for worker in self.workers.values():
            worker.close()

    def ask(self, do: str, workload: Workload, contender: str, **request) -> dict:
        peer = workload.contenders[contender].peer
        if peer in self.workers and self.workers[peer].ended:
            self.workers.pop(peer).close()
        if peer not in self.workers:
            self.workers[peer] = self.new_worker(self.threads)
        return self.workers[peer].ask(do, contender=contender, **request)

    def measure(self, room: str, workload: Workload) -> list[Row]:
        """A row for each claim of the workload."""
        made, failed, rounds, calls = {}, {}, {}, 1
        for name in workload.contenders:
            try:
                made[name] = self.ask("prepare", workload, name, file=room, name=workload.name, folder=str(self.folder))
            except ContenderFailed as error:
                failed[name] = str(error)
        try:
            calls, rounds = self.rounds(workload, made)
        except ContenderFailed as error:
            failed |= dict.fromkeys(made, str(error))
        for worker in self.workers.values():
            if not worker.ended:
                worker.ask("drop")
        rows = []
        for claim in workload.claims:
            row = Row(room, workload.name, claim.title or workload.title, claim)
            names = claim.ours, claim.theirs
            problem = next((f"{name}: {failed[name]}" for name in names if name in failed), "")
            problem = problem or disagreement([made[name]["answer"] for name in names], workload.tolerance)
            rows.append(replace(row, problem=problem) if problem else filled(row, made, calls, rounds))
        return rows

    def rounds(self, workload: Workload, made: dict[str, dict]) -> tuple[int, dict[str, list[dict]]]:
        """Runs per round, and the rounds of each: in turn, there and back, so that nobody is always first."""
        end = time.perf_counter() + self.share * workload.seconds
        slowest = max((reply["wall"] for reply in made.values()), default=1.0)
        calls = max(1, round(SHORTEST_ROUND / max(slowest, 1e-6)))
        rounds = {name: [] for name in made}
        for number in range(MOST_ROUNDS):
            if number >= self.least_rounds and time.perf_counter() > end:
                break
            for name in made if number % 2 else reversed(made):
                rounds[name].append(self.ask("timed", workload, name, calls=calls))
        return calls, rounds


def filled(row: Row, made: dict[str, dict], calls: int, rounds: dict[str, list[dict]]) -> Row:
    """The row with its figures. made: what prepare replied; rounds: what each contender's rounds replied, in order."""
    claim = row.claim

    def figures(name, clock):
        unit, work = UNITS[claim.unit], made[name]["work"]
        return [unit(work, each[clock] / calls, each["value"]) for each in rounds[name]]

    def ratio(clock):
        pairs = zip(figures(claim.ours, clock), figures(claim.theirs, clock), strict=True)
        return figure([ours / theirs for ours, theirs in pairs])

    ours, theirs = (figure(figures(name, claim.clock)) for name in (claim.ours, claim.theirs))
    decisive = ratio(claim.clock)
    return replace(row, ours=ours, theirs=theirs, ratio=decisive, cpu_ratio=ratio("cpu"),
                   holds=holds(claim, decisive.median), rounds=len(rounds[claim.ours]))  # fmt: skip
