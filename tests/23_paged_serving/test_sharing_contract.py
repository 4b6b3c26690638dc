"""Sequences that share the blocks of a pool, of which a cache of rows knows nothing; and pools that must be caught.

Oracles: a dict of lists of numbers, and generate without a cache.
"""

import numpy as np
import pytest

from tinytorch.generation import paged
from tinytorch.generation.kv_cache import random_gpt
from tinytorch.generation.paged import PagedKVCache, PagedModelKVCache, Request, Scheduler


class Shared:
    """A pool of blocks of 4 beside a dict: the tokens of each sequence, and as keys their numbers times 10."""

    def __init__(self, num_blocks=12):
        self.pool, self.texts = PagedKVCache(num_blocks, 4, 1, 1, max_seqs=6), {}

    def add(self, text):
        """A sequence for a prompt, of which what is here already is not run again: its id."""
        seq = self.pool.add_sequence(text)
        found = self.pool.seq_len(seq)
        assert found < len(text), "a prompt that is here to its last token: none is left to run"
        self.texts[seq] = list(text[:found])
        self.write(seq, text[found:])
        return seq

    def write(self, seq, text):
        keys = np.array(text, np.float32)[None, :, None] * 10
        self.pool.update(seq, keys, -keys, text)
        self.texts[seq] += text
        self.check()

    def fork(self, seq):
        new = self.pool.fork(seq)
        assert new not in self.texts
        self.texts[new] = list(self.texts[seq])
        return new

    def cut(self, seq, length):
        self.pool.truncate(seq, length)
        del self.texts[seq][length:]
        self.check()

    def finish(self, seq):
        self.pool.finish_sequence(seq)
        del self.texts[seq]
        self.check()

    def check(self):
        held = {block for seq in self.texts for block in self.pool.tables.table(seq)}
        assert self.pool.num_free() == self.pool.num_blocks - len(held), "free blocks are those that nobody holds"
        for seq, text in self.texts.items():
            for part, sign in zip(self.pool.get_kv(seq), (10, -10)):
                assert part.shape == (1, len(text), 1)
                np.testing.assert_array_equal(part[0, :, 0], np.array(text) * sign, f"sequence {seq}")


def test_sharing():
    """Forks write on beside each other, end in any order, and all blocks come back."""
    both = Shared()
    first = both.add([1, 2, 3, 4, 5, 6])
    second, third = both.fork(first), both.fork(first)
    free = both.pool.num_free()
    both.write(second, [7])
    assert both.pool.num_free() == free - 1, "the shared partial block is copied, exactly once"
    both.write(first, [8, 9, 10])
    both.finish(first)
    both.write(third, [11, 12, 13])
    both.finish(second)
    last = both.add([20, 21, 22, 23, 24])
    both.finish(third)
    both.finish(last)
    assert both.pool.num_free() == both.pool.num_blocks


def test_prefixes():
    """A prompt takes over what is stored of it, never all of it, and never a block that has been written since."""
    both = Shared()
    first = both.add([1, 2, 3, 4, 5, 6, 7, 8])
    again = both.add([1, 2, 3, 4, 5, 6, 7, 8])
    assert len(set(both.pool.tables.table(first)) & set(both.pool.tables.table(again))) == 1
    both.finish(again)
    both.cut(first, 6)
    both.write(first, [70, 80])
    for text in ([1, 2, 3, 4, 5, 6, 7, 8, 9], [1, 2, 3, 4, 5, 6, 70, 80, 9], [5, 6, 7, 8, 9]):
        both.finish(both.add(text))
    both.finish(first)
    for start in range(100, 148, 8):  # every block is taken for something else
        both.finish(both.add(list(range(start, start + 8))))
    both.add([1, 2, 3, 4, 5, 6, 7, 8, 9])


def test_resume():
    """Who gave way and came back goes on where it stopped. Oracle: generate without a cache, for each alone."""
    model, pool = random_gpt(), PagedModelKVCache(8, 4, num_layers=3, num_heads=2, head_dim=8, max_seqs=2)
    scheduler, prompts = Scheduler(model, pool), [[1, 2, 3, 4, 5, 6, 7, 8], [9, 8, 7, 6, 5, 4]]
    requests = [Request(prompt, 12, temperature=1.0, seed=seed) for seed, prompt in enumerate(prompts)]
    for request in requests:
        scheduler.add(request)
    scheduler.run()
    assert scheduler.preemptions == 1, f"{scheduler.preemptions} gave way"
    for seed, (prompt, request) in enumerate(zip(prompts, requests)):
        expected = model.generate(prompt, 12, temperature=1.0, rng=np.random.default_rng(seed))
        assert prompt + request.tokens == expected and len(set(request.tokens)) > 6


# Wrong pools: one function is replaced by what somebody may well write, and one of the tests above must fail.


def given_back_by_each(right):
    def give(self, block):
        self.counts[block] = max(self.counts[block] - 1, 0)
        self.free[block] = None

    return give


def whole_prompt(right):
    return lambda blocks, tokens, block_size: right(blocks, [*tokens, 0], block_size)


def last_token_again(right):
    def preempt(self, request):
        right(self, request)
        request.tokens += request.tokens[-1:]

    return preempt


def no_longer_done(right):
    return lambda *arguments: None


def never(right):
    return lambda blocks, holders: [False] * len(blocks)


WRONG = {  # what is wrong: whose function is replaced, by what, and the test that must fail
    "double free": (paged.Blocks, "give", given_back_by_each, test_sharing),
    "missing copy on write": (paged, "must_copy", never, test_sharing),
    "whole prompt hit": (paged, "find_prefix", whole_prompt, test_prefixes),
    "resume that repeats a token": (Scheduler, "preempt", last_token_again, test_resume),
    "stale key": (paged.Blocks, "unname", no_longer_done, test_prefixes),
}


@pytest.mark.parametrize("fault", WRONG)
def test_a_wrong_pool_is_caught(fault, monkeypatch):
    owner, function, wrong, contract = WRONG[fault]
    monkeypatch.setattr(owner, function, wrong(getattr(owner, function)))
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        contract()
