"""The ledger against a plain dictionary; own times and FLOPs for any tree and any sizes."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tinytorch.core.activations import ReLU
from tinytorch.core.layers import Linear, Sequential
from tinytorch.models.transformer import GPT
from tinytorch.profiling.profiler import MemoryTracker, count_flops, count_parameters, own_seconds, profile_layers

LIMIT = 100


class Ledger(RuleBasedStateMachine):
    """Any order of requests, refusals and (repeated) closes; the oracle is a list of open requests."""

    def __init__(self):
        super().__init__()
        self.tracker, self.handles, self.open, self.peak = MemoryTracker(LIMIT), [], {}, 0

    @rule(size=st.integers(0, 60), purpose=st.sampled_from(["kv_cache", "weights", "other"]))
    def ask(self, size, purpose):
        if sum(n for n, _ in self.open.values()) + size > LIMIT:
            try:
                self.tracker.allocate(size, purpose)
            except MemoryError as error:
                assert str(size) in str(error) and str(LIMIT) in str(error)
            else:
                raise AssertionError("more than the limit was granted")
        else:
            handle = self.tracker.allocate(size, purpose)
            self.handles.append(handle)
            self.open[id(handle)] = (size, purpose)
            self.peak = max(self.peak, sum(n for n, _ in self.open.values()))

    @precondition(lambda self: self.handles)
    @rule(data=st.data())
    def close(self, data):
        handle = data.draw(st.sampled_from(self.handles))
        if data.draw(st.booleans()):
            handle.close()
        else:
            with handle:
                pass
        self.open.pop(id(handle), None)

    @invariant()
    def agrees(self):
        expected = {}
        for size, purpose in self.open.values():
            expected[purpose] = expected.get(purpose, 0) + size
        assert self.tracker.by_purpose == {purpose: used for purpose, used in expected.items() if used}
        assert self.tracker.current == sum(expected.values()) <= LIMIT
        assert self.tracker.peak == self.peak


TestLedger = Ledger.TestCase
TestLedger.settings = settings(deadline=None, max_examples=50, stateful_step_count=25)


@settings(deadline=None, max_examples=80)
@given(st.data())
def test_own_times_of_any_tree_add_up(data):
    depths = [0]
    for _ in range(data.draw(st.integers(0, 15))):
        depths.append(data.draw(st.integers(1, depths[-1] + 1)))
    rows = [{"depth": d, "seconds": data.draw(st.integers(0, 50))} for d in depths]
    own = [own_seconds(rows, index) for index in range(len(rows))]
    assert len(own) == len(rows) and sum(own) == rows[0]["seconds"]


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(1, 9), min_size=2, max_size=5), st.integers(1, 6))
def test_any_mlp(sizes, rows):
    layers = [layer for a, b in zip(sizes, sizes[1:]) for layer in (Linear(a, b), ReLU())]
    model = Sequential(*layers)
    products = sum(a * b for a, b in zip(sizes, sizes[1:]))
    assert count_flops(model, (rows, sizes[0])) == 2 * rows * products
    assert count_parameters(model) == products + sum(sizes[1:])


@settings(deadline=None, max_examples=15)
@given(st.integers(1, 3), st.integers(1, 2), st.sampled_from([(1, 1), (2, 1), (4, 2), (4, 4)]), st.integers(1, 8))
def test_any_gpt_is_the_sum_of_its_parts(batch, layers, heads, tokens):
    model = GPT(20, 16, layers, heads[0], 8, num_kv_heads=heads[1])
    rows = profile_layers(model, (batch, tokens), warmup=0, repeats=1)
    assert rows[0]["flops"] == count_flops(model, (batch, tokens)) > 0
    top = [row for row in rows if row["depth"] == 1]
    assert len(top) == 5 + layers and sum(row["flops"] for row in top) == rows[0]["flops"]
    assert rows[0]["shape"] == (batch, tokens, 20) and np.all([row["calls"] == 1 for row in rows])
