"""The line between tito and a program that it started: events go up as JSON, and the end of tito is heard.

The line uses copies of standard input and output that nothing else knows; the streams themselves lead nowhere
from then on, so whatever student code prints or reads, it can neither reach nor block tito.
"""

from __future__ import annotations

import json
import os
import shutil
import threading


class Line:
    """Events to tito by `say`; when tito ends without a word, so does this program with all it started."""

    def __init__(self, private: str, mark: str, silent: bool = True):
        self.private, self.mark = private, mark
        self._up, self._down = os.dup(1), os.dup(0)
        nowhere = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2) if silent else (0, 1):
            os.dup2(nowhere, stream)
        os.close(nowhere)
        self._turn = threading.Lock()
        threading.Thread(target=self._listen, daemon=True).start()

    def say(self, **event) -> None:
        """Send one event."""
        line = json.dumps(event).encode("ascii") + b"\n"
        with self._turn:
            while line:
                line = line[os.write(self._up, line) :]

    def _listen(self) -> None:
        """Wait for the end of tito's side of the line; it stays open for as long as tito lives."""
        while os.read(self._down, 1024):
            pass
        from tito.course.processes import end_all

        end_all(self.mark)
        shutil.rmtree(self.private, ignore_errors=True)
        os._exit(1)
