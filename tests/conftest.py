"""What tests of several rooms share."""

import os

import pytest


def what_is_shown(terminal: int) -> bytes:
    """All that is written to a pseudo terminal, read on our side of it until the other is closed; closes ours, too."""
    seen = b""
    try:
        while piece := os.read(terminal, 65536):
            seen += piece
    except OSError:  # how Linux says that the other side is closed
        pass
    os.close(terminal)
    return seen


@pytest.fixture
def read_terminal():
    return what_is_shown
