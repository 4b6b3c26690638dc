"""The same examples in every run, so that a change is what makes a test fail.

`HYPOTHESIS_SEARCH=1 make test TESTS=tests/property` looks for new ones.
"""

import os

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st

settings.register_profile("repeatable", derandomize=True)
if not os.environ.get("HYPOTHESIS_SEARCH"):
    settings.load_profile("repeatable")


@pytest.fixture(scope="session")
def no_look_ahead():
    """Asserts that a model's logits before a token, for two rows of T, do not depend on it, bit for bit."""

    def check(model, seed, T, data):
        vocab = model.vocab_size
        ids = np.random.default_rng(seed).integers(0, vocab, (2, T))
        t = data.draw(st.integers(0, T - 1))
        changed = ids.copy()
        changed[:, t] = (ids[:, t] + data.draw(st.integers(1, vocab - 1))) % vocab
        a, b = model(ids).numpy(), model(changed).numpy()
        assert a.shape == b.shape == (2, T, vocab)
        np.testing.assert_array_equal(a[:, :t], b[:, :t])
        assert (a[:, t:] != b[:, t:]).any()

    return check
