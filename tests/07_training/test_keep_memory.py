"""keep_memory in a process of its own: the kernel's count of page faults is the oracle."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import tinytorch

COUNT = """
import resource, sys
import numpy as np
from tinytorch.core.training import keep_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    arrays = [np.ones(6_000_000, np.float32) for _ in range(4)]  # 96 MB at once
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

kept = sys.argv[1] == "keep" and keep_memory()
faults()
print(kept, sum(faults() for _ in range(5)))
"""


def count(word):
    pytest.importorskip("resource", reason="the kernel's counts are read through a Unix module")
    environment = {**os.environ, "PYTHONPATH": str(Path(tinytorch.__file__).parents[1])}
    kept, faults = subprocess.check_output([sys.executable, "-c", COUNT, word], env=environment, text=True).split()
    return kept == "True", int(faults)


def test_freed_memory_serves_the_next_step_without_the_kernel():
    kept, faults = count("keep")
    if not kept:
        pytest.skip("this C library has no mallopt; keep_memory says so and changes nothing")
    assert faults <= 20, f"{faults} page faults although the memory was there already"


def test_the_import_alone_throws_no_switch():
    kept, faults = count("keep")
    if kept:
        assert count("leave")[1] > 20, "without keep_memory() the memory should have gone back to the kernel"
