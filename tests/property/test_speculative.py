"""Beams and guesses against plain Python, for any sizes; and the exact distribution of what is sampled.

`every_path` runs a function once for each path that chance can take through it, and says how probable the path is. So
the distribution of sampled speculation is computed, not estimated.
"""

import collections
import copy
import itertools
import math

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from tinytorch.core.autograd import no_grad
from tinytorch.generation.kv_cache import create_kv_cache
from tinytorch.generation.paged import paged_kv_cache
from tinytorch.generation.speculative import (
    accept_greedy,
    accept_sampled,
    beam_search,
    best_continuations,
    forget_rejected,
    part_candidates,
    residual,
    speculative_generate,
)
from tinytorch.models.transformer import GPT

# ---- chance, path by path


class Path:
    """A random generator that makes given choices, then the first that is possible, and notes the others."""

    def __init__(self, choices):
        self.choices, self.taken, self.others, self.probability = choices, [], [], 1.0

    def take(self, weights):
        possible = [i for i, weight in enumerate(weights) if weight > 0]
        if len(self.taken) < len(self.choices):
            choice = self.choices[len(self.taken)]
        else:
            choice = possible[0]
            self.others += [[*self.taken, other] for other in possible[1:]]
        self.taken.append(choice)
        self.probability *= weights[choice]
        return choice

    def choice(self, count, p):
        assert len(p) == count and abs(sum(p) - 1) < 1e-9 and min(p) >= 0
        return self.take(p)

    def random(self):
        return Uniform(self)


class Uniform:
    """A number between 0 and 1 that is not known until it is compared."""

    def __init__(self, path):
        self.path = path

    def __lt__(self, ratio):
        return self.path.take([1 - min(1, ratio), min(1, ratio)]) == 1

    def __ge__(self, ratio):
        return not self < ratio


def every_path(run):
    """The probability of each result of run(rng), as a dict; results are lists."""
    found, paths = collections.Counter(), [[]]
    while paths:
        path = Path(paths.pop())
        found[tuple(run(path))] += path.probability
        paths += path.others
    assert math.isclose(sum(found.values()), 1, abs_tol=1e-9)
    return found


def distributions(rows, size, seed):
    """Random distributions (rows, size), some of whose probabilities are zero, some almost."""
    rng = np.random.default_rng(seed)
    weights = rng.exponential(size=(rows, size)) * rng.choice([0, 1e-9, 0.1, 1], size=(rows, size))
    weights[np.arange(rows), rng.integers(0, size, rows)] += 0.5
    return weights / weights.sum(axis=1, keepdims=True)


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 6), seed=st.integers(0, 10**6))
def test_what_is_accepted_and_the_residual_make_p(size, seed):
    p, q = distributions(2, size, seed)
    rest, passed = residual(p, q), np.minimum(p, q)
    assert rest.shape == (size,) and (rest >= 0).all() and math.isclose(rest.sum(), 1)
    np.testing.assert_allclose(passed + (1 - passed.sum()) * rest, p, atol=1e-12)
    np.testing.assert_array_equal(residual(p, p.copy()), p)


@settings(max_examples=40, deadline=None)
@given(size=st.integers(1, 4), guesses=st.integers(0, 2), seed=st.integers(0, 10**6))
def test_kept_tokens_have_exactly_the_targets_distribution(size, guesses, seed):
    """Both models are tables: what follows each pair of tokens. After a rejection the text goes on without a draft."""
    p, q = (distributions(size**2, size, seed + i).reshape(size, size, size) for i in range(2))

    def run(rng):
        text = [0, 0]
        for _ in range(guesses):
            text.append(rng.choice(size, p=q[text[-2], text[-1]]))
        rows = [(text[i], text[i + 1]) for i in range(guesses + 1)]
        kept = accept_sampled(np.array([p[row] for row in rows]), [q[row] for row in rows[:-1]], text[2:], rng)
        text = [0, 0, *kept]
        while len(text) < guesses + 3:
            text.append(rng.choice(size, p=p[text[-2], text[-1]]))
        return text[2:]

    found = every_path(run)
    for tokens in itertools.product(range(size), repeat=guesses + 1):
        text, expected = [0, 0, *tokens], 1.0
        for i in range(guesses + 1):
            expected *= p[text[i], text[i + 1], text[i + 2]]
        assert math.isclose(found[tokens], expected, abs_tol=1e-9), tokens


# ---- whole models


def random_model(vocab_size, seed, num_layers=1, max_seq_len=16):
    rng = np.random.default_rng(seed)
    model = GPT(vocab_size, 8, num_layers, 2, max_seq_len, tie_weights=False, rng=rng)
    for parameter in model.parameters():
        noise = 0.5 * rng.standard_normal(parameter.shape)
        parameter.data = (noise if parameter.ndim > 1 else parameter.data + noise).astype(np.float32)
    return model.eval()


def log_probabilities(model, text):
    """Of each next token, as a list; float64, without a cache."""
    with no_grad():
        logits = model(np.array([text])).numpy()[0, -1].astype(float)
    return (logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())).tolist()


@pytest.mark.parametrize("k", [1, 2, 5])
@pytest.mark.parametrize("temperature, top_k", [(1.0, None), (2.5, None), (1.0, 2)])
def test_sampled_speculation_has_exactly_the_targets_distribution(k, temperature, top_k):
    """All texts of three tokens of a vocabulary of three, over every path of chance."""
    target, draft = random_model(3, seed=1), random_model(3, seed=6)

    def run(rng):
        return speculative_generate(draft, target, [1], 3, k, temperature=temperature, top_k=top_k, rng=rng)[1:]

    def probabilities(text):
        scaled = np.array(log_probabilities(target, text)) / temperature
        if top_k is not None:
            scaled[np.argsort(scaled)[:-top_k]] = -np.inf
        return np.exp(scaled) / np.exp(scaled).sum()

    found = every_path(run)
    for a, b, c in itertools.product(range(3), repeat=3):
        expected = probabilities([1])[a] * probabilities([1, a])[b] * probabilities([1, a, b])[c]
        assert abs(found[a, b, c] - expected) < 1e-5


@settings(max_examples=40, deadline=None)
@given(data=st.data(), k=st.integers(1, 9), most=st.integers(0, 12), p=st.sampled_from([0.0, 0.4, 0.8, 1.0]))
def test_greedy_speculation_equals_the_target(data, k, most, p):
    target = random_model(11, seed=data.draw(st.integers(0, 5)), num_layers=2)
    prompt = data.draw(st.lists(st.integers(0, 10), min_size=1, max_size=4))
    stops = data.draw(st.lists(st.integers(0, 10), max_size=2)) or None
    draft, rng, written = copy.copy(target), np.random.default_rng(0), []
    draft.head = lambda x: target.head(x) if rng.random() < p else -target.head(x)
    make = data.draw(st.sampled_from([create_kv_cache, paged_kv_cache]))
    caches = [make(1, max(1, len(prompt) + most - 1), 2, 2, 4) for _ in range(2)]

    def look(done):
        written.extend(done.kept)
        assert caches[1].seq_pos == len(prompt) + len(written) - 1
        assert caches[0].seq_pos <= caches[1].seq_pos

    got = speculative_generate(draft, target, prompt, most, k, stop_token=stops, on_round=look,
                               draft_cache=caches[0], target_cache=caches[1])
    assert got == prompt + written == target.generate(prompt, most, stop_token=stops)


@settings(max_examples=40, deadline=None)
@given(data=st.data(), width=st.integers(1, 5), length=st.integers(0, 5), penalty=st.sampled_from([0.0, 0.5, 2.0]))
def test_beams_equal_a_search_over_lists(data, width, length, penalty):
    model = random_model(5, seed=data.draw(st.integers(0, 5)))
    prompt = data.draw(st.lists(st.integers(0, 4), min_size=1, max_size=4))
    stops = data.draw(st.sets(st.integers(0, 4), max_size=5))
    live, finished = [(0.0, prompt)], []
    for step in range(1, length + 1):
        candidates = [(score + more, [*text, v]) for score, text in live
                      for v, more in enumerate(log_probabilities(model, text))]
        candidates.sort(reverse=True)
        finished += [(score / step**penalty, score, text) for score, text in candidates[:width] if text[-1] in stops]
        live = [pair for pair in candidates if pair[1][-1] not in stops][:width]
    finished += [(score / max(length, 1) ** penalty, score, text) for score, text in live]
    expected = sorted(finished, reverse=True)[:width]
    for make in (None, create_kv_cache, paged_kv_cache):
        cache = None if make is None else make(width, 16, 1, 2, 4)
        beams = beam_search(model, prompt, width, length, cache=cache, stop_token=list(stops), length_penalty=penalty)
        assert [beam.ids for beam in beams] == [text for *_, text in expected]
        np.testing.assert_allclose([beam.log_prob for beam in beams], [pair[1] for pair in expected], atol=1e-5)


# ---- the parts


@settings(max_examples=100, deadline=None)
@given(choices=st.lists(st.integers(0, 2), min_size=1, max_size=7), data=st.data())
def test_the_kept_tokens_are_the_longest_prefix_and_one(choices, data):
    count = len(choices) - 1
    proposals = data.draw(st.lists(st.integers(0, 2), min_size=count, max_size=count))
    agreed = len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], zip(choices, proposals))))
    assert list(accept_greedy(choices, proposals)) == proposals[:agreed] + [choices[agreed]]


@settings(max_examples=60, deadline=None)
@given(data=st.data(), before=st.integers(1, 4), proposed=st.integers(0, 6))
def test_both_caches_keep_what_is_text(data, before, proposed):
    kept = data.draw(st.integers(1, proposed + 1))
    text = list(range(before)) + [100 + i for i in range(kept)]
    ran = {"draft": list(range(before)) + [100 + i for i in range(proposed)],
           "target": list(range(before)) + [100 + i for i in range(proposed + 1)]}
    caches = {}
    for name, tokens in ran.items():
        caches[name] = create_kv_cache(1, 16, 1, 1, 1)
        caches[name].update(0, *np.array([tokens, tokens], np.float32).reshape(2, 1, 1, -1, 1))
        caches[name].advance()
    forget_rejected(caches["draft"], caches["target"], proposed, kept)
    for name, cache in caches.items():
        expected = [a for a, b in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(ran[name], text))]
        assert cache.get(0)[0].numpy().ravel().tolist() == expected


@settings(max_examples=60, deadline=None)
@given(beams=st.integers(1, 4), vocab_size=st.integers(1, 6), count=st.integers(1, 30), seed=st.integers(0, 10**6))
def test_continuations_equal_a_sorted_list(beams, vocab_size, count, seed):
    rng = np.random.default_rng(seed)
    scores, logits = rng.choice([-np.inf, -1.0, -2.5], beams), rng.integers(-2, 3, (beams, vocab_size)) * 1.0
    table = [(scores[b] + logits[b, v] - math.log(sum(math.exp(x) for x in logits[b])), -b, -v)
             for b in range(beams) for v in range(vocab_size)]
    got_scores, parents, tokens = best_continuations(scores, logits.astype(np.float32), count)
    expected = sorted(((round(score, 9), b, v) for score, b, v in table), reverse=True)[:count]
    assert len(got_scores) == len(parents) == len(tokens) == len(expected)
    np.testing.assert_allclose(got_scores, [score for score, *_ in expected], atol=1e-7)
    assert {(-b, -v) for score, b, v in expected if score > -np.inf} >= {
        (b, v) for score, b, v in zip(got_scores, parents, tokens) if score > expected[-1][0] + 1e-6}


@settings(max_examples=60, deadline=None)
@given(data=st.data(), width=st.integers(1, 4), stops=st.sets(st.integers(0, 4), max_size=3))
def test_candidates_are_parted(data, width, stops):
    tokens = data.draw(st.lists(st.integers(0, 4), min_size=width, max_size=12))
    texts = data.draw(st.integers(0, len(tokens)))
    scores = np.array([-1.0 * i if i < texts else -np.inf for i in range(len(tokens))])
    finished, alive = part_candidates(scores, np.array(tokens), width, stops)
    assert list(finished) == [i for i, t in enumerate(tokens) if t in stops and i < min(width, texts)]
    assert list(alive) == [i for i, t in enumerate(tokens) if t not in stops][:width]
