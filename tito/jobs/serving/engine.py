"""The engine: lesson 23's scheduler in a thread of its own. It knows nothing of HTTP.

Only this thread touches the scheduler, the cache and the model. Others leave orders in a queue, and what becomes of a
job comes back through its `deliver`, called in this thread.
"""

from __future__ import annotations

import queue
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple

from tinytorch.generation.paged import Request
from tito.jobs.text import Text


class Event(NamedTuple):
    """What has become of a job: more text; at its end why and after how many tokens, or the error that ended it."""

    text: str = ""
    finish: str | None = None  # "stop" or "length"
    tokens: int = 0
    error: Exception | None = None


class Refused(Exception):
    """The scheduler cannot serve this job, and says why."""


class Busy(Exception):
    """As many jobs run and wait as may."""


class Stopped(Exception):
    """The engine takes and runs nothing more."""


class Broken(Exception):
    """An error of the model, the scheduler or the cache ended this job; the terminal shows it."""


@dataclass(eq=False)
class Job:
    """One text to generate: its prompt, how to sample, and who hears of it."""

    prompt: list[int]
    sampling: dict
    stops: tuple[str, ...]
    deliver: Callable[[Event], None]
    tokens: int = 0
    text: Text | None = None
    request: Request | None = None  # only while the scheduler has it


class Stats(NamedTuple):
    """What /metrics tells, as it was after the last step."""

    blocks_free: int
    blocks_total: int
    running: int
    waiting: int
    totals: dict[str, int]


class Engine:
    """Runs jobs on a scheduler. `new` makes one, with its cache: at the start, and again after an error.

    tokens: {id: bytes} of the tokenizer. end: the id that ends a text, if there is one; it is no part of the text.
    most: jobs that run or wait; one more hears Busy.
    """

    def __init__(self, new: Callable[[], tuple], tokens: Mapping[int, bytes], end: int | None = None, most: int = 256):
        self._new, self._tokens, self._end, self._most = new, tokens, end, most
        self._scheduler, self._cache = new()
        self._orders, self._jobs, self._outbox = queue.SimpleQueue(), {}, []  # jobs by request_id
        self._totals, self.closed = Counter(), False
        self._count()
        threading.Thread(target=self._run, name="tito-engine", daemon=True).start()

    def submit(self, job: Job) -> None:
        """Run a job; everything more is said through its `deliver`."""
        self._orders.put(lambda: self._add(job))

    def cancel(self, job: Job) -> None:
        """Forget a job whose client has gone. One that has ended already stays as it is."""
        self._orders.put(lambda: self._forget(job))

    def close(self) -> None:
        """End what runs, and take no more."""
        self._orders.put(self._close)

    def _run(self) -> None:
        while True:
            try:
                self._obey()
                if self._busy():
                    self._step()
                self._count()  # before anybody hears of an end, so that its blocks are seen to be free
            except Exception:
                traceback.print_exc()
                self._start_again()
            outbox, self._outbox = self._outbox, []
            for job, event in outbox:
                job.deliver(event)

    def _busy(self) -> bool:
        return not self.closed and self._scheduler.has_work

    def _obey(self) -> None:
        """Carry out the orders that are there; where there is nothing else to do, wait for one."""
        wait = not self._busy()
        with suppress(queue.Empty):
            while True:
                self._orders.get(block=wait)()
                wait = False

    def _add(self, job: Job) -> None:
        """Hand a job to the scheduler, or say why not."""
        if self.closed:
            return self._tell(job, Event(error=Stopped()))
        if len(self._jobs) >= self._most:
            return self._tell(job, Event(error=Busy()))
        job.text = Text(self._tokens, job.stops)
        request = Request(prompt=job.prompt, stop_token=self._end, **job.sampling)
        try:
            self._scheduler.add(request)
        except ValueError as error:
            return self._tell(job, Event(error=Refused(str(error))))
        except Exception:
            traceback.print_exc()
            return self._tell(job, Event(error=Broken()))
        job.request, self._jobs[request.request_id] = request, job

    def _step(self) -> None:
        """One step of the scheduler: each new token becomes text of its job."""
        for request, token in self._scheduler.step():
            if request.request_id in self._jobs:
                self._hand_out(self._jobs[request.request_id], int(token))

    def _hand_out(self, job: Job, token: int) -> None:
        """A job ends with the scheduler's request, or at a stop string before that."""
        job.tokens += 1
        self._totals["tokens"] += 1
        finish = job.request.finish_reason
        text = "" if token == self._end else job.text.add(token)
        text += job.text.end() if finish else ""
        if job.text.stopped:
            if not finish:
                self._scheduler.cancel(job.request.request_id)
            finish = "stop"
        if finish:
            self._release(job, "finished")
        if text or finish:
            self._tell(job, Event(text, finish, job.tokens if finish else 0))

    def _forget(self, job: Job) -> None:
        if job.request is not None:
            self._scheduler.cancel(job.request.request_id)
            self._release(job, "cancelled")

    def _release(self, job: Job, how: str) -> None:
        del self._jobs[job.request.request_id]
        job.request = None
        self._totals[how] += 1

    def _tell(self, job: Job, event: Event) -> None:
        self._outbox.append((job, event))

    def _fail(self, job: Job, error: Exception) -> None:
        self._release(job, "failed")
        self._tell(job, Event(error=error))

    def _start_again(self) -> None:
        """A fresh scheduler and cache after an error. What ran has failed; what only waited waits on.

        Each error costs a job, and one without jobs closes the engine: so it never runs in circles.
        """
        jobs, ran = list(self._jobs.values()), {request.request_id for request in self._scheduler.running}
        self.closed = self.closed or not jobs
        try:
            self._scheduler, self._cache = self._new()
        except Exception:  # no memory for another
            self.closed = True
        for job in jobs:
            if not ran or job.tokens or job.request.request_id in ran:
                self._fail(job, Broken())
            else:
                del self._jobs[job.request.request_id]
                job.request = None
                self._add(job)
        self._count()

    def _close(self) -> None:
        self.closed = True
        for job in [*self._jobs.values()]:
            self._fail(job, Stopped())

    def _count(self) -> None:
        scheduler, cache = self._scheduler, self._cache
        counts = cache.num_free(), cache.num_blocks, len(scheduler.running), len(scheduler.waiting)
        self.stats = Stats(*counts, dict(self._totals))
