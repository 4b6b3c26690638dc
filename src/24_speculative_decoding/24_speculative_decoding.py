# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   tinytorch:
#     lesson: "24"
# ---

# %% [markdown]
"""
# Lesson 24: Speculative decoding

**You build** two ways to spend a pass of the model on more than one row. Beam search follows several texts at once
and returns the most probable. Speculative decoding lets a small model guess and the large one check: the same text
in fewer passes, and, when we sample, the same distribution.

**Needs** lessons 13, 14 and 17; any cache of lessons 17, 22 and 23 will do. **Exported** to
`tinytorch.generation.speculative`. **Time** 75 minutes.
"""

# %%
#| default_exp generation.speculative
#| export
import copy
import math
from contextlib import nullcontext
from typing import Any, NamedTuple

import numpy as np

from tinytorch.core.autograd import no_grad
from tinytorch.core.tensor import default_rng
from tinytorch.generation.kv_cache import create_kv_cache, random_gpt, stored_heads, whole_number
from tinytorch.models.transformer import (
    check_capacity,
    check_prompt,
    check_sampling,
    evaluating,
    like_prompt,
    next_probabilities,
)
from tinytorch.profiling.profiler import measure_latency, time_calls

# %%
# Given, and not part of the package: what the checks and measurements below use.
def error_of(run, kind=ValueError):
    """The message of the error that `run()` raises; "" when it raises none."""
    try:
        run()
    except kind as error:
        return str(error)
    return ""


def cache_of(model, batch_size=1, max_seq_len=None):
    """A KVCache of the model's own sizes."""
    return create_kv_cache(batch_size, max_seq_len or model.max_seq_len, model.num_layers, *stored_heads(model))


def plain_logits(model, tokens):
    """The oracle of every cached pass: logits (T, V) of one whole text, run without a cache."""
    with no_grad():
        return model(np.array([tokens])).numpy()[0]

# %% [markdown]
"""
## 1. What does one more row cost?

Lesson 17 ended with a suspicion: when a model decodes, each weight is read from memory for two operations, and the
processor waits. If so, a pass over five rows, which reads the same weights once, should cost little more than a pass
over one.

*Predict, before you run the cell:* five rows take how many times as long as one? And seventeen?
"""

# %% nbgrader={"grade": false, "grade_id": "24-measure-rows", "locked": true, "schema_version": 3, "solution": false, "task": false}
def show_row_costs(widths=(128, 512), rows=(1, 2, 3, 5, 9, 17), prompt_len=32):
    """Milliseconds of one pass over T new tokens, on a cache that holds a prompt."""
    print("   width  weights  " + "".join(f"{f'T = {count}':>10}" for count in rows))
    for width in widths:
        model = random_gpt(256, width, 6, 8, 64, num_kv_heads=8)
        cache, ids = cache_of(model), np.ones((1, prompt_len), int)

        def one_pass(count, model=model, cache=cache):
            with cache.attached_to(model):
                model.head(model.hidden(np.ones((1, count), int)))
            cache.rollback(count)

        with no_grad():
            model(ids, cache=cache)
            seconds = [measure_latency(one_pass, count) for count in rows]
        size = sum(parameter.data.nbytes for parameter in model.parameters()) / 2**20
        print(f"{width:>8} {size:>5.0f} MiB" + "".join(f"{1e3 * s:>7.2f} ms" for s in seconds))
        print(" " * 18 + "".join(f"{s / seconds[0]:>9.1f}x" for s in seconds))


if __name__ == "__main__":
    show_row_costs()

# %% [markdown]
"""
Read the last line from left to right. The second row is dear: one row is a vector times a matrix, two are a product
of matrices, for which the BLAS under NumPy first copies the weights into blocks of its own. After that the suspicion
holds: the rows up to the seventeenth cost little.
"""

# %% [markdown]
"""
So there are rows at a discount. What shall they hold?

* **Other texts** (part A). Follow several beginnings at once, one per row: beam search.
* **Guesses** (part B). A cheap model guesses the next tokens, the dear one checks all of them in one pass. Part C does
  it for sampled text.
"""

# %% [markdown]
"""
# Part A: beams

## 2. The best of all continuations

Greedy decoding takes the best next token, and cannot know that a less likely one opens a better text. Two texts
(beams) so far, three tokens in the vocabulary; each cell is the probability of text *and* token:

                    token 0   token 1   token 2
    beam 0   0.5      0.15      0.15      0.20
    beam 1   0.4      0.36      0.02      0.02

Greedy follows beam 0, and gets 0.20. The best two of all six cells are 0.36 (beam 1, token 0) and 0.20 (beam 0, token
2): both become beams.
"""

# %% [markdown]
"""
Products of many probabilities vanish, so we add their logarithms: `scores` (B,) are those of the texts. Find the best
`count` cells of the whole table. A cell's number in the flat table is `parent * V + token`.
"""

# %% nbgrader={"grade": false, "grade_id": "24-continuations", "locked": false, "schema_version": 3, "solution": true, "task": false}
#| export
def log_probabilities(logits):
    """The logarithm of each next token's probability: logits (B, V) -> (B, V), float64.

    >>> np.exp(log_probabilities(np.log([[1.0, 2.0, 5.0]]))).round(3)
    array([[0.125, 0.25 , 0.625]])
    """
    logits = logits.astype(np.float64)
    logits = logits - logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def best_continuations(scores, logits, count):
    """The best `count` of all B * V continuations, best first: their scores, parents (beams) and tokens, (count,) each.

    scores (B,): the log-probability of each beam, -inf for none. logits (B, V). Ties: the first beam, the first token.
    """
    ### BEGIN SOLUTION
    totals = scores[:, None] + log_probabilities(logits)
    best = np.argsort(-totals, axis=None, kind="stable")[:count]
    parents, tokens = np.divmod(best, totals.shape[1])
    return totals.ravel()[best], parents, tokens
    ### END SOLUTION

# %% nbgrader={"grade": true, "grade_id": "24-continuations-test", "locked": true, "points": 4, "schema_version": 3, "solution": false, "task": false}
def test_unit_continuations():
    """Oracle: the picture; then a sort of all continuations in plain Python."""
    given = np.array([[0.3, 0.3, 0.4], [0.9, 0.05, 0.05]])
    scores, parents, tokens = best_continuations(np.log([0.5, 0.4]), np.log(given) + 7, 2)
    assert len(scores) == len(parents) == len(tokens) == 2, f"got {len(scores)} continuations, expected 2, of all beams"
    assert scores.max() <= 0, f"scores {scores.round(2)} are above 0: are raw logits added? log_probabilities first"
    got = list(zip(parents.tolist(), tokens.tolist()))
    assert got != [(0, 1), (2, 0)], "parents and tokens are exchanged: the flat number is parent * V + token"
    assert got == [(1, 0), (0, 2)], (
        f"got (beam, token) {got}, expected [(1, 0), (0, 2)]: the best of all six cells, not of each row")
    assert np.allclose(np.exp(scores), [0.36, 0.2]), (
        f"the texts have probabilities {np.exp(scores).round(3)}, expected [0.36, 0.2]: the logarithms are added")
    ### BEGIN HIDDEN TESTS
    rng = np.random.default_rng(0)
    before, logits = np.array([-1.0, -np.inf, -2.5]), rng.standard_normal((3, 5)).astype(np.float32)
    table = np.log(np.exp(logits.astype(float)) / np.exp(logits.astype(float)).sum(-1, keepdims=True))
    expected = sorted(((before[b] + table[b, v], b, v) for b in (0, 2) for v in range(5)), reverse=True)[:7]
    scores, parents, tokens = best_continuations(before, logits, 7)
    assert np.allclose(scores, [score for score, *_ in expected]), f"seven of three beams: scores {scores.round(3)}"
    assert list(zip(parents.tolist(), tokens.tolist())) == [(b, v) for _, b, v in expected], "seven of three beams"
    ### END HIDDEN TESTS


if __name__ == "__main__":
    test_unit_continuations()

# %% [markdown]
"""
## 3. The cache of the right parent

Row 0 now goes on with what was beam 1, and row 1 with what was beam 0. The text moves, and so must everything that was
remembered about it:

    texts    row 0   a b          parents [1, 0]     row 0   a c 0
             row 1   a c          tokens  [0, 2]     row 1   a b 2
    cache    row 0   keys a b                        row 0   keys a c
             row 1   keys a c                        row 1   keys a b

A cache that stays behind raises no error: each beam goes on, remembering the other's text. `cache.reorder(rows)` of
lesson 17 is all it takes.
"""

# %% nbgrader={"grade": false, "grade_id": "24-follow", "locked": false, "schema_version": 3, "solution": true, "task": false}
#| export
def follow(ids, parents, tokens, cache=None):
    """The texts (B, T + 1): each parent's ids and its new token. The rows of the cache move with them.

    ids (B, T), parents and tokens (B,). Without a cache only the texts move.
    """
    ### BEGIN SOLUTION
    if cache is not None:
        cache.reorder(parents)
    return np.concatenate([ids[parents], tokens[:, None]], axis=1)
    ### END SOLUTION

# %% nbgrader={"grade": true, "grade_id": "24-follow-test", "locked": true, "points": 3, "schema_version": 3, "solution": false, "task": false}
def test_unit_follow(parents=(1, 0), seed=0):
    """Oracles: the picture, and the model run on the whole texts without a cache."""
    got = follow(np.array([[7, 8], [7, 9]]), np.array([1, 0]), np.array([0, 2]))
    assert got.shape == (2, 3), f"two texts of 2 tokens and one more each: got shape {got.shape}, expected (2, 3)"
    assert got.tolist() == [[7, 9, 0], [7, 8, 2]], (
        f"texts: got {got.tolist()}, expected [[7, 9, 0], [7, 8, 2]]; each parent's text, then the new token")
    model, rng = random_gpt(seed=seed), np.random.default_rng(seed)
    ids, parents = rng.integers(0, 64, (len(parents), 5)), np.array(parents)
    cache = cache_of(model, batch_size=len(parents))
    with no_grad():
        model(ids, cache=cache)
        texts = follow(ids, parents, np.arange(len(parents)), cache)
        logits = model(texts[:, -1:], cache=cache).numpy()[:, 0]
    for row, text in enumerate(texts):
        error = np.abs(logits[row] - plain_logits(model, text)[-1]).max()
        assert error < 1e-3, (
            f"row {row}: with the cache, its logits are off by {error:.2f} from its own text: it remembers the text of "
            "another beam. Was the cache reordered by parents?")


if __name__ == "__main__":
    test_unit_follow()

### BEGIN HIDDEN TESTS
if __name__ == "__main__":
    test_unit_follow(parents=(2, 2, 0), seed=3)
### END HIDDEN TESTS

# %% [markdown]
"""
## 4. Beams that end

A beam that meets a stop token is finished. It must not go on, nor take the place of one that does. So we ask for more
candidates than beams, and part them. Two beams, stop token 9, candidates best first:

    rank   0    1    2    3        of the best 2, those that stop are finished:   rank 0    (rank 3 is no beam)
    token  9    4    5    9        the best 2 of those that do not, live on:      ranks 1, 2
"""

# %% [markdown]
"""
How many candidates? Each beam brings one for each stop token, so beam_width * (1 + stop tokens) always leave
beam_width that live. A score of -inf means that there is no such text, so it cannot be finished.
"""

# %% nbgrader={"grade": false, "grade_id": "24-ends", "locked": false, "schema_version": 3, "solution": true, "task": false}
#| export
def part_candidates(scores, tokens, beam_width, stops):
    """Ranks (two lists) that finish, and ranks that live on; candidates come best first.

    Finished: those of the best beam_width whose token is in the set `stops`. Alive: the best beam_width of the others.
    """
    ### BEGIN SOLUTION
    finished = [i for i in range(beam_width) if tokens[i] in stops and scores[i] > -np.inf]
    alive = [i for i in range(len(tokens)) if tokens[i] not in stops][:beam_width]
    return finished, alive
    ### END SOLUTION

# %% nbgrader={"grade": true, "grade_id": "24-ends-test", "locked": true, "points": 3, "schema_version": 3, "solution": false, "task": false}
def test_unit_ends():
    """Oracle: the picture."""
    scores, tokens = np.log([0.4, 0.3, 0.2, 0.1]), np.array([9, 4, 5, 9])
    finished, alive = part_candidates(scores, tokens, 2, {9})
    assert 0 not in alive, f"alive: got {alive}; rank 0 has met its stop token and must not go on"
    assert alive == [1, 2], f"alive: got {alive}, expected [1, 2]: the best two that go on, or the beams die out"
    assert 3 not in finished, f"finished: got {finished}; rank 3 is not among the best two, it is no beam"
    assert finished == [0], f"finished: got {finished}, expected [0]"
    finished, alive = part_candidates(scores, tokens, 2, set())
    assert (finished, alive) == ([], [0, 1]), f"no stop token: got {finished} and {alive}, expected [] and [0, 1]"
    ### BEGIN HIDDEN TESTS
    scores = np.array([-1, -2, -np.inf, -np.inf, -np.inf, -np.inf])
    got = part_candidates(scores, np.array([1, 3, 3, 0, 2, 1]), 3, {3, 1})
    assert got == ([0, 1], [3, 4]), f"three beams, stop tokens 1 and 3: got {got}, expected ([0, 1], [3, 4])"
    ### END HIDDEN TESTS


if __name__ == "__main__":
    test_unit_ends()

# %% [markdown]
"""
Now the search, given. First, what it runs: the prompt is read once, into row 0 (`n_new` is 0 for the others), and then
every row becomes row 0. In a paged cache they share its blocks from now on.
"""

# %%
#| export
class Beam(NamedTuple):
    """One text of a beam search.

    ids: the prompt and its new tokens, in the form of the prompt; the last is a stop token if it met one. log_prob:
    the log-probability of the new tokens. score: what texts are ranked by, log_prob / new tokens ** length_penalty.
    """

    ids: Any
    log_prob: float
    score: float


def stop_set(stop_token):
    """None, one id or several, as a set."""
    return set() if stop_token is None else set(np.ravel(stop_token).tolist())


def next_logits(model, ids, cache=None):
    """Logits (B, V) of what follows ids (B, T): of the whole texts, or on a cache of what it lacks of them.

    An empty cache is given a prompt, alike in all rows: it is read into row 0, and the others become copies of that.
    """
    if cache is None:
        return model.head(model.hidden(ids)[:, -1]).numpy()
    batch_size, seq_len = ids.shape
    if cache.seq_pos:
        with cache.attached_to(model):
            return model.head(model.hidden(ids[:, cache.seq_pos :])[:, -1]).numpy()
    with cache.attached_to(model, n_new=[seq_len] + [0] * (batch_size - 1)):
        last = model.hidden(ids)[:1, -1]  # (1, E)
    cache.reorder([0] * batch_size)
    return np.repeat(model.head(last).numpy(), batch_size, axis=0)

# %% [markdown]
"""
When is it over? A log-probability only falls as a text grows: as soon as there are as many finished texts as beams, and
no living one can overtake them.

Long texts have small probabilities. `length_penalty` a ranks by log-probability / length ** a, as Hugging Face's
`generate` does (a form of Wu et al. 2016, arXiv:1609.08144, section 7); 0 ranks by probability.
"""

# %%
#| export
def beam_search(model, prompt, beam_width, max_new_tokens, *, cache=None, stop_token=None, length_penalty=0.0):
    """The texts that a search with beam_width beams finds most probable, best first: a list of at most that many Beams.

    prompt: ids (P,) or (1, P), list or array. cache: any cache with batch_size = beam_width (given or enabled; reset
    if it holds tokens); without one, every round runs the whole texts, with the same result. stop_token: an id, or
    several. length_penalty: 0 or more. A width of 1 is greedy decoding. ValueError before any work for what does not
    fit; a cache that cannot reorder its rows says so.

    >>> best, *others = beam_search(random_gpt(), [1, 2, 3], beam_width=4, max_new_tokens=5)
    >>> len(best.ids), len(others), best.log_prob >= others[0].log_prob
    (8, 3, True)
    """
    cache = getattr(model, "_kv_cache", None) if cache is None else cache
    ids = check_beams(model, prompt, beam_width, max_new_tokens, cache, length_penalty)
    with evaluating(model):
        found = search(model, ids, beam_width, max_new_tokens, cache, stop_set(stop_token), length_penalty)
    return [beam._replace(ids=like_prompt(np.array([beam.ids], ids.dtype), prompt)) for beam in found]


def check_beams(model, prompt, beam_width, max_new_tokens, cache, length_penalty):
    """The prompt as ids (1, P), or a ValueError that says what does not fit."""
    beam_width, ids = whole_number("beam_width", beam_width), check_prompt(prompt, max_new_tokens, model.max_seq_len)
    if len(ids) != 1:
        raise ValueError(f"beam search takes one prompt, got {len(ids)}: each needs all rows of the batch")
    if not 0 <= length_penalty < math.inf:
        raise ValueError(f"length_penalty is 0 or positive, got {length_penalty}")
    if cache is not None and cache.batch_size != beam_width:
        raise ValueError(f"each beam needs a row: beam_width={beam_width}, the cache has batch_size={cache.batch_size}")
    check_capacity(cache, ids.shape[1], max_new_tokens)
    return ids

# %%
#| export
def search(model, ids, beam_width, max_new_tokens, cache, stops, length_penalty):
    """The loop of `beam_search`, on ids (1, P)."""
    if cache is not None and max_new_tokens and cache.seq_pos:
        cache.reset()  # it still holds another text
    live, finished = np.repeat(ids, beam_width, axis=0), []
    scores = np.array([0.0] + [-np.inf] * (beam_width - 1))  # the rows are alike: one of them counts
    for length in range(1, max_new_tokens + 1):
        logits = next_logits(model, live, cache)
        scores, parents, tokens = best_continuations(scores, logits, beam_width * (1 + len(stops)))
        ended, alive = part_candidates(scores, tokens, beam_width, stops)
        texts = follow(live, parents[ended], tokens[ended])
        finished = ranked(finished, texts, scores[ended], length, length_penalty)[:beam_width]
        bound = scores[alive[0]] / max_new_tokens**length_penalty if alive else -np.inf
        if not alive or len(finished) == beam_width and finished[-1].score >= bound:
            return finished
        live, scores = follow(live, parents[alive], tokens[alive], cache), scores[alive]
    return ranked(finished, live, scores, max_new_tokens, length_penalty)[:beam_width]


def ranked(beams, texts, scores, length, length_penalty):
    """The beams and these texts (N, T) of `length` new tokens, best first; what scores -inf is no text."""
    penalty = max(length, 1) ** length_penalty
    new = [Beam(text, float(score), float(score) / penalty) for text, score in zip(texts, scores) if score > -np.inf]
    return sorted(beams + new, key=lambda beam: -beam.score)

# %% [markdown]
"""
A check without a hole. In a small world every text can be tried: with 5 tokens there are 125 texts of length 3, and a
search with 25 beams must find the best of them.
"""

# %% nbgrader={"grade": true, "grade_id": "24-beam-search-test", "locked": true, "points": 4, "schema_version": 3, "solution": false, "task": false}
def every_text(model, prompt, length, stops):
    """All (log-probability, text) of up to `length` new tokens, where a stop token ends a text; float64, no search."""
    texts, ended = [(0.0, list(prompt))], []
    for _ in range(length):
        longer = []
        for log_prob, text in texts:
            logits = plain_logits(model, text)[-1].astype(np.float64)
            longer += [(log_prob + logits[v] - np.log(np.exp(logits).sum()), [*text, v]) for v in range(len(logits))]
        ended += [pair for pair in longer if pair[1][-1] in stops]
        texts = [pair for pair in longer if pair[1][-1] not in stops]
    return sorted(ended + texts, reverse=True)


def test_unit_beam_search(seed=0, prompt=(1, 2), stop=3):
    """Oracles: all texts there are, without a search and without a cache; greedy decoding for one beam."""
    model, prompt = random_gpt(vocab_size=5, seed=seed), list(prompt)
    for stops in ((), (stop,)):
        best = every_text(model, prompt, 3, stops)
        for cache in (None, cache_of(model, batch_size=25)):
            beams = beam_search(model, prompt, 25, 3, cache=cache, stop_token=stops or None)
            how = f"stop tokens {list(stops)}, {'with' if cache else 'without'} a cache"
            assert len(beams) == 25, f"{how}: got {len(beams)} texts, expected 25"
            got, (log_prob, text) = beams[0], best[0]
            assert got.ids == text, f"{how}: got {got.ids}, the most probable of all texts is {text}"
            assert abs(got.log_prob - log_prob) < 1e-4, f"{how}: log_prob {got.log_prob:.4f}, expected {log_prob:.4f}"
    greedy = model.generate(prompt, 6)
    for cache in (None, cache_of(model)):
        got = beam_search(model, prompt, 1, 6, cache=cache)[0].ids
        assert got == greedy, f"one beam: got {got}, greedy decoding says {greedy}"


if __name__ == "__main__":
    test_unit_beam_search()

### BEGIN HIDDEN TESTS
if __name__ == "__main__":
    test_unit_beam_search(seed=7, prompt=(4, 0, 2), stop=1)
### END HIDDEN TESTS

# %% [markdown]
"""
Now on a model that has read something: the demo's GPT, trained on Python's documentation. *Predict:* does a wider
beam always find a more probable text? And is the most probable text the best one?
"""

# %% nbgrader={"grade": false, "grade_id": "24-measure-beams", "locked": true, "schema_version": 3, "solution": false, "task": false}
def show_beams(prompt="If the expression is", max_new_tokens=24, widths=(1, 2, 4, 8)):
    """Log-probability and text for several widths; milliseconds per new token, with a cache and without."""
    from tinytorch.demo.language import load

    model, tokenizer, _ = load()
    ids = tokenizer.encode(prompt)
    print("beams   log-prob   with a cache   without   text")
    for width in widths:
        ms = []
        for cache in (cache_of(model, width, len(ids) + max_new_tokens), None):
            def run(width=width, cache=cache):
                return beam_search(model, ids, width, max_new_tokens, cache=cache)[0]

            ms.append(1e3 * measure_latency(run, warmup=1, repeats=3) / max_new_tokens)
        best = run()
        print(f"{width:>5} {best.log_prob:>10.2f} {ms[0]:>11.2f} ms {ms[1]:>6.2f} ms   {tokenizer.decode(best.ids)!r}")


if __name__ == "__main__":
    show_beams()

# %% [markdown]
"""
Four beams of one prompt hold four copies of its keys, and each `reorder` copies the whole cache. In a paged cache
(lesson 23) the beams share blocks, and only a block that two of them write is copied. *Predict* for a prompt of 64
tokens, 4 beams, 16 new tokens and blocks of 16: how many slots does each cache need?
"""

# %% nbgrader={"grade": false, "grade_id": "24-measure-fork", "locked": true, "schema_version": 3, "solution": false, "task": false}
def show_forks(beam_width=4, prompt_len=64, max_new_tokens=16, block_size=16):
    """The same search on contiguous rows and on forks of one pool: slots that hold tokens, and the texts."""
    from tinytorch.generation.paged import paged_kv_cache

    model, prompt = random_gpt(256, 128, 4, 4, 128, 4), [i % 256 for i in range(prompt_len)]
    sizes = (beam_width, prompt_len + max_new_tokens, model.num_layers, *stored_heads(model))
    rows, forks = create_kv_cache(*sizes), paged_kv_cache(*sizes, block_size=block_size)
    beams = [beam_search(model, prompt, beam_width, max_new_tokens, cache=cache) for cache in (rows, forks)]
    blocks = forks.pool.num_blocks - forks.pool.num_free()
    print(f"contiguous: {beam_width} rows of {rows.seq_pos} tokens, {sum(rows.seq_lens)} slots")
    print(f"paged:      {blocks} blocks of {block_size}, {blocks * block_size} slots")
    print("same texts:", [beam.ids for beam in beams[0]] == [beam.ids for beam in beams[1]])


if __name__ == "__main__":
    show_forks()

# %% [markdown]
"""
*Look back.* Is the most probable text the best one? (Holtzman et al., *The Curious Case of Neural Text Degeneration*,
2020, arXiv:1904.09751, found that beams repeat themselves, where people write what is less probable.) Can a wider beam
find a less probable text? (Yes: a beam that would have won can be pushed out early by better beginnings.)
"""

# %% [markdown]
"""
# Part B: guesses

## 5. Guess, then check

Decoding is serial: token 7 waits for token 6. *Checking* is not: one pass over six guesses shows what the model would
have said after each. So a cheap model, the **draft**, guesses k tokens, and the dear one, the **target**, checks them:

    text so far              the cat
    draft guesses (k = 4)            sat  on  my   mat
    target says, one pass            sat  on  the  big  .
    agreed                           sat  on
    kept                             sat  on  the

The pass ran five rows: the newest token of the text and the four guesses. Each row says what follows it. Two guesses
agree; at the third the target's own word is there already, for free. What it says after `my` belongs to another text.
"""

# %% [markdown]
"""
So each pass yields from 1 to k + 1 tokens, and every one is what the target would have said. *Predict:* the passes of the target for 12 new tokens with k = 3, if the draft is always right, and if it is never.
"""

# %% nbgrader={"grade": false, "grade_id": "24-predict-passes", "locked": false, "schema_version": 3, "solution": true, "task": false}
# predicted_passes_right = ...
# predicted_passes_wrong = ...
### BEGIN SOLUTION
predicted_passes_right = 3
predicted_passes_wrong = 12
### END SOLUTION

# %% nbgrader={"grade": true, "grade_id": "24-predict-passes-test", "locked": true, "points": 1, "schema_version": 3, "solution": false, "task": false}
def test_unit_predict_passes():
    """Oracle: counting, round by round."""
    for got, agreed, name in ((predicted_passes_right, 3, "always right"), (predicted_passes_wrong, 0, "never right")):
        written, passes = 0, 0
        while written < 12:
            written, passes = written + agreed + 1, passes + 1
        assert got == passes, (
            f"draft {name}: got {got} passes, expected {passes}: each writes {agreed} + 1 tokens, for the target's own "
            "word comes for free")


if __name__ == "__main__":
    test_unit_predict_passes()

# %% [markdown]
"""
## 6. Run what the cache lacks

Both models have a cache of their own, and need the same: run the tokens that the cache lacks, and say what follows the
last few. The target asks for k + 1 answers at once; the draft for one, k times.

How many tokens does a cache lack? Do not count, ask: `cache.seq_pos` are there. The draft is the trap. It never runs
its last guess, for nobody asks what follows; if that is accepted, it lacks *two* tokens in the next round.
"""

# %% [markdown]
"""
Within `with cache.attached_to(model):`, `model.hidden(ids)` (1, T) -> (1, T, E) runs a pass and commits it;
`model.head(...)` makes logits. Only the last `count` positions need the head.
"""

# %% nbgrader={"grade": false, "grade_id": "24-run", "locked": false, "schema_version": 3, "solution": true, "task": false}
#| export
def run_new(model, cache, tokens, count=1):
    """Run what the cache lacks of `tokens`, a list: logits (count, V) of what follows each of the last `count`.

    The cache then holds all of `tokens`.
    """
    ### BEGIN SOLUTION
    new = np.array([tokens[cache.seq_pos :]])  # (1, T)
    with cache.attached_to(model):
        return model.head(model.hidden(new)[:, -count:]).numpy()[0]
    ### END SOLUTION

# %% nbgrader={"grade": true, "grade_id": "24-run-test", "locked": true, "points": 3, "schema_version": 3, "solution": false, "task": false}
def test_unit_run(lengths=(4, 5, 7, 10), counts=(1, 1, 2, 3), seed=0):
    """Oracle: the whole text, run without a cache."""
    model, tokens = random_gpt(seed=seed), np.random.default_rng(seed).integers(0, 64, max(lengths)).tolist()
    cache, expected = cache_of(model), plain_logits(model, tokens)
    for length, count in zip(lengths, counts):
        held = cache.seq_pos
        with no_grad():
            got = run_new(model, cache, tokens[:length], count)
        assert cache.seq_pos == length, (
            f"the cache held {held} of {length} tokens, and now {cache.seq_pos}: run what it lacks, all of it, once")
        assert got.shape == (count, 64), f"count {count}: got shape {got.shape}, expected ({count}, 64)"
        error = np.abs(got - expected[length - count : length]).max()
        assert error < 1e-3, (
            f"{length - held} new tokens, count {count}: logits off by {error:.2f}; these follow the *last* tokens")


if __name__ == "__main__":
    test_unit_run()

### BEGIN HIDDEN TESTS
if __name__ == "__main__":
    test_unit_run(lengths=(1, 6, 8), counts=(1, 5, 2), seed=5)
### END HIDDEN TESTS

# %% [markdown]
"""
## 7. What is kept

`choices` are the target's words after each row, one more than there are guesses:

    proposals    sat  on  my   mat            choices    sat  on  the  big  .

Keep the longest prefix on which both agree, and the target's next word. Only a *prefix*: agreement further on is by
chance, for there the target was shown a text that will not be written.
"""

# %% nbgrader={"grade": false, "grade_id": "24-accept", "locked": false, "schema_version": 3, "solution": true, "task": false}
#| export
def accept_greedy(choices, proposals):
    """The tokens to keep: the proposals up to the first that the target would not choose, and its own there.

    choices: the target's token after the text and after each proposal, len(proposals) + 1 of them; both are lists.

    >>> accept_greedy([5, 6, 7], proposals=[5, 9])
    [5, 6]
    """
    ### BEGIN SOLUTION
    agreed = 0
    while agreed < len(proposals) and choices[agreed] == proposals[agreed]:
        agreed += 1
    return choices[: agreed + 1]
    ### END SOLUTION

# %% nbgrader={"grade": true, "grade_id": "24-accept-test", "locked": true, "points": 3, "schema_version": 3, "solution": false, "task": false}
def test_unit_accept():
    """Oracle: the picture, word by word."""
    choices = ["sat", "on", "the", "big", "."]
    got = list(accept_greedy(choices, ["sat", "on", "my", "mat"]))
    assert got != ["sat", "on"], "got sat on: the target's own word comes for free, and is kept too"
    assert got != ["sat", "on", "."], "got sat on . : that word follows `mat`, which will not be written"
    assert len(got) < 5, f"got {got}: some tokens are kept twice"
    assert got == ["sat", "on", "the"], f"got {got}, expected sat on the"
    got = list(accept_greedy(choices, ["sat", "on", "the", "big"]))
    assert got == choices, f"all four agree: got {got}, expected {choices}, five words out of one pass"
    got = list(accept_greedy(choices, ["lay", "on", "the", "big"]))
    assert got == ["sat"], f"the first is wrong: got {got}, expected ['sat']; agreement further on is by chance"
    ### BEGIN HIDDEN TESTS
    assert list(accept_greedy([3], [])) == [3], "no proposals: the target's word alone, as in plain decoding"
    assert list(accept_greedy([4, 4, 4, 4], [4, 4, 5])) == [4, 4, 4], "two of three agree: expected three tokens"
    assert list(accept_greedy([1, 2, 3, 4], [9, 9, 3])) == [1], "agreement at the end alone counts for nothing"
    ### END HIDDEN TESTS


if __name__ == "__main__":
    test_unit_accept()

# %% [markdown]
"""
## 8. What is forgotten

After a round both caches may hold tokens that will never be text. The picture again: 2 tokens of text, 4 proposals, 3
kept (sat on the). The newest token of a text is in no cache, so before the round both held `the`:

    ran by the target    cat  sat  on | my  mat        5 rows, the first 3 are text: forget 2
    ran by the draft     cat  sat  on | my             4 rows, the first 3 are text: forget 1
    now the text is      the cat sat on the            and both caches hold `the cat sat on`

The target ran proposals + 1 tokens, the draft one less; the first `kept` of them are text. If all five are kept, the
target forgets nothing. And the draft, which ran only four? It cannot forget -1 tokens: it stays one behind.
"""

# %% nbgrader={"grade": false, "grade_id": "24-forget", "locked": false, "schema_version": 3, "solution": true, "task": false}
#| export
def forget_rejected(draft_cache, target_cache, proposed, kept):
    """Roll both caches back to what is text. proposed: the guesses of the round; kept: its tokens, 1 to proposed + 1."""
    ### BEGIN SOLUTION
    target_cache.rollback(proposed + 1 - kept)
    draft_cache.rollback(max(proposed - kept, 0))
    ### END SOLUTION

# %% nbgrader={"grade": true, "grade_id": "24-forget-test", "locked": true, "points": 4, "schema_version": 3, "solution": false, "task": false}
def filled(length):
    """A cache of one small layer that holds `length` tokens."""
    cache = create_kv_cache(1, 16, 1, 1, 2)
    cache.update(0, np.ones((1, 1, length, 2)), np.ones((1, 1, length, 2)))
    cache.advance()
    return cache


def test_unit_forget(before=1, rounds=((4, 3), (4, 1), (4, 4), (4, 5), (0, 1))):
    """Oracle: the rows of the picture as lists; text and what ran begin alike."""
    for proposed, kept in rounds:
        target, draft = filled(before + proposed + 1), filled(before + max(proposed, 0))
        lengths = (before + min(proposed + 1, kept), before + min(proposed, kept))
        message = error_of(lambda: forget_rejected(draft, target, proposed, kept))
        how = f"{proposed} proposed, {kept} kept"
        assert not message, f"{how}: {message}. If all are kept, the draft has nothing to forget"
        assert target.seq_pos >= lengths[0], f"{how}: the target's cache holds {target.seq_pos}, expected {lengths[0]}"
        assert target.seq_pos == lengths[0], (
            f"{how}: the target's cache holds {target.seq_pos} tokens, expected {lengths[0]}: rejected ones stayed")
        assert draft.seq_pos <= lengths[1], (
            f"{how}: the draft's cache holds {draft.seq_pos} tokens, expected {lengths[1]}: rejected ones stayed")
        assert draft.seq_pos == lengths[1], (
            f"{how}: the draft's cache holds {draft.seq_pos} tokens, expected {lengths[1]}: it forgot one that is text")


if __name__ == "__main__":
    test_unit_forget()

### BEGIN HIDDEN TESTS
if __name__ == "__main__":
    test_unit_forget(before=3, rounds=((1, 1), (1, 2), (7, 2), (7, 8), (2, 2)))
### END HIDDEN TESTS

# %% [markdown]
"""
The loop, given: propose, check, keep, forget. A round never proposes more than can still be kept, so it stops at
`max_new_tokens` by itself, and no cache needs more room than in plain decoding. How a token is chosen, and which are
kept, is asked of a *rule*: here `Greedy`, in part C `Sampled`.
"""

# %%
#| export
class Greedy:
    """The rule of temperature 0: the most probable token, and proposals that agree with it."""

    def guess(self, logits):
        """The next token after logits (1, V), and the probabilities that it was drawn from: none."""
        return int(logits.argmax()), None

    def keep(self, logits, proposals, drawn_from):
        """The tokens to keep, by the target's logits (n + 1, V)."""
        return accept_greedy(logits.argmax(axis=-1).tolist(), proposals)


class Round(NamedTuple):
    """One round: tokens that the draft proposed, how many of the kept ones are its own, and the kept tokens."""

    proposed: int
    accepted: int
    kept: list


def one_round(draft, target, caches, tokens, count, rule, stops):
    """Propose `count` tokens, check them in one pass, keep what holds, forget the rest: a Round."""
    proposals, drawn_from = [], []
    for _ in range(count):
        token, probabilities = rule.guess(run_new(draft, caches[0], tokens + proposals))
        proposals, drawn_from = [*proposals, token], [*drawn_from, probabilities]
    kept = rule.keep(run_new(target, caches[1], tokens + proposals, count + 1), proposals, drawn_from)
    accepted = len(kept) - 1
    stop = next((i for i, token in enumerate(kept) if token in stops), accepted)
    kept = kept[: stop + 1]
    forget_rejected(*caches, count, len(kept))
    return Round(count, min(accepted, len(kept)), kept)

# %%
#| export
def speculative_generate(draft, target, prompt, max_new_tokens, k=4, *, temperature=0.0, top_k=None, rng=None,
                         stop_token=None, draft_cache=None, target_cache=None, on_round=None):
    """The text that target.generate would write, in fewer of its passes: the draft guesses k tokens, the target checks.

    Greedy at temperature 0: the very same tokens, whatever the draft (where the target's two best logits differ by
    more than rounding). Else drawn from exactly the target's distribution (Leviathan et al. 2023, arXiv:2211.17192;
    Chen et al. 2023, arXiv:2302.01318), though with other draws than target.generate with the same rng.

    prompt: ids (P,) or (1, P); list in, list out. The text ends at a stop_token (an id, or several). Caches: given,
    else the models' enabled ones, else made for the call; reset if they hold tokens. After every round the target's
    holds all but the newest token, the draft's that or one less (a last round without guesses leaves it as it is);
    on_round, if given, is then called with the Round.
    ValueError before any work for what does not fit; a cache that cannot roll back (a window that has forgotten) says
    so in the round that needs it.

    >>> model = random_gpt()
    >>> speculative_generate(model, model, [1, 2, 3], 6) == model.generate([1, 2, 3], 6)
    True
    """
    ids = check_speculation(draft, target, prompt, max_new_tokens, k, temperature, top_k)
    tokens, stops, end = ids[0].tolist(), stop_set(stop_token), ids.shape[1] + max_new_tokens
    caches = both_caches(draft, target, draft_cache, target_cache, ids.shape[1], max_new_tokens)
    rule = Sampled(temperature, top_k, default_rng() if rng is None else rng) if temperature else Greedy()
    with evaluating(draft), evaluating(target):
        while len(tokens) < end:
            done = one_round(draft, target, caches, tokens, min(k, end - len(tokens) - 1), rule, stops)
            tokens += done.kept
            if on_round is not None:
                on_round(done)
            if tokens[-1] in stops:
                break
    return like_prompt(np.array([tokens], ids.dtype), prompt)

# %%
#| export
def check_speculation(draft, target, prompt, max_new_tokens, k, temperature, top_k):
    """The prompt as ids (1, P), or a ValueError that says what does not fit."""
    whole_number("k", k)
    check_sampling(temperature, top_k)
    if draft.vocab_size != target.vocab_size:
        raise ValueError(f"the draft has {draft.vocab_size} tokens, the target {target.vocab_size}: they must share one "
                         "vocabulary, or a guess means another word to each")
    ids = check_prompt(prompt, max_new_tokens, min(draft.max_seq_len, target.max_seq_len))
    if len(ids) != 1:
        raise ValueError(f"speculation takes one prompt, got {len(ids)}: rows accept different numbers of guesses, and "
                         "each round would wait for the slowest")
    return ids


def both_caches(draft, target, draft_cache, target_cache, prompt_len, max_new_tokens):
    """The two caches, empty and checked against their models; ValueError for one that does not fit."""
    def cache_for(model, cache, taken=None):
        enabled = getattr(model, "_kv_cache", None)
        cache = enabled if cache is None and enabled is not taken else cache
        if cache is None:
            cache = create_kv_cache(1, prompt_len + max_new_tokens, model.num_layers, *stored_heads(model))
        if cache.batch_size != 1:
            raise ValueError(f"speculation writes one text, the cache has batch_size={cache.batch_size}")
        check_capacity(cache, prompt_len, max_new_tokens)
        with cache.attached_to(model):
            return cache  # its layers and heads are the model's

    target_cache = cache_for(target, target_cache)
    draft_cache = cache_for(draft, draft_cache, taken=target_cache)
    if draft_cache is target_cache:
        raise ValueError("draft and target need a cache each: the keys of one mean nothing to the other")
    for cache in (draft_cache, target_cache):
        if max_new_tokens and cache.seq_pos:
            cache.reset()  # it still holds another text
    return draft_cache, target_cache

# %% [markdown]
"""
Does it hold? For every draft: the target itself (all is accepted), one that never agrees (its logits are the target's,
turned round), and an unrelated one. And after every round, both caches must hold the text, and nothing but the text.
"""

# %% nbgrader={"grade": true, "grade_id": "24-greedy-test", "locked": true, "points": 5, "schema_version": 3, "solution": false, "task": false}
def contrary(model):
    """A model with the same parts that finds the least probable token the best."""
    other = copy.copy(model)
    other.head = lambda x: -model.head(x)
    return other


def check_caches(draft, target, caches, text, done):
    """Oracle: fresh caches, into which the text was read in one pass."""
    full = bool(done.proposed) and len(done.kept) > done.proposed  # then the draft never ran its last guess
    for name, model, cache, lacks in (("draft", draft, caches[0], 1 + full), ("target", target, caches[1], 1)):
        fresh, run = cache_of(model), name == "target" or done.proposed
        assert len(text) - cache.seq_pos == lacks or not run, (
            f"after a round that kept {len(done.kept)} of {done.proposed} guesses and one, the text has {len(text)} tokens "
            f"and the {name}'s cache {cache.seq_pos}, expected {len(text) - lacks}")
        with no_grad():
            model(np.array([text[: cache.seq_pos]]), cache=fresh)
        for layer in range(model.num_layers):
            error = np.abs(cache.get(layer)[0].numpy() - fresh.get(layer)[0].numpy()).max()
            assert error < 1e-3, f"the {name}'s cache, layer {layer}: these are not the keys of the text ({error:.2f})"


def test_unit_greedy(seed=0, prompt=(1, 2, 3), most=17):
    """Oracle: target.generate, without a cache."""
    target, prompt = random_gpt(max_seq_len=len(prompt) + most, seed=seed), list(prompt)
    drafts = {"the target itself": target, "always wrong": contrary(target),
              "unrelated": random_gpt(embed_dim=16, num_layers=1, seed=seed + 1)}
    for (name, draft), k in [(pair, k) for pair in drafts.items() for k in (1, 4, 30)]:
        text, rounds, caches = list(prompt), [], (cache_of(draft), cache_of(target))

        def look(done, text=text, rounds=rounds, caches=caches, draft=draft):
            text += done.kept
            rounds.append(done)
            check_caches(draft, target, caches, text, done)

        got = speculative_generate(draft, target, prompt, most, k, on_round=look,
                                   draft_cache=caches[0], target_cache=caches[1])
        expected = target.generate(prompt, most)
        how = f"draft {name}, k = {k}"
        assert got == text == expected, f"{how}: got {got}, the target says {expected}"
        accepted, proposed = sum(done.accepted for done in rounds), sum(done.proposed for done in rounds)
        if draft is target:
            assert accepted == proposed, f"{how}: {accepted} of {proposed} accepted, expected all"
        if name == "always wrong":
            assert accepted == 0 and len(rounds) == most, f"{how}: {accepted} accepted in {len(rounds)} rounds"


if __name__ == "__main__":
    test_unit_greedy()

### BEGIN HIDDEN TESTS
if __name__ == "__main__":
    test_unit_greedy(seed=5, prompt=(9,), most=12)
### END HIDDEN TESTS

# %% [markdown]
"""
## 9. How many tokens from one pass?

Let each guess be accepted with probability a, independently. The first token of a round is certain, the second needs
one agreement (a), the third two (a * a), up to token k + 1:

    tokens per pass = 1 + a + a**2 + ... + a**k = (1 - a**(k + 1)) / (1 - a)

(Leviathan et al. 2023, section 3.1, equation 1.) *Predict*, to two digits: k = 4 guesses, each accepted with
probability 0.8. And with endless guesses, k without bound?
"""

# %% nbgrader={"grade": false, "grade_id": "24-predict-tokens", "locked": false, "schema_version": 3, "solution": true, "task": false}
# predicted_tokens_4 = ...
# predicted_tokens_endless = ...
### BEGIN SOLUTION
predicted_tokens_4 = 3.36
predicted_tokens_endless = 5
### END SOLUTION

# %% nbgrader={"grade": true, "grade_id": "24-predict-tokens-test", "locked": true, "points": 1, "schema_version": 3, "solution": false, "task": false}
def test_unit_predict_tokens():
    """Oracle: 100,000 rounds of throwing a coin for each guess, kept up to the first that fails."""
    rng = np.random.default_rng(0)
    for got, k in ((predicted_tokens_4, 4), (predicted_tokens_endless, 100)):
        agreed = rng.random((100_000, k)) < 0.8
        tokens = 1 + np.cumprod(agreed, axis=1).sum(axis=1).mean()
        mistake = "; the target's own token counts, too" if abs(got + 1 - tokens) < 0.03 else (
            "; what comes after a rejected guess does not count" if abs(got - 1 - 0.8 * k) < 0.03 else "")
        assert abs(got - tokens) < 0.03, f"k = {k}: got {got}, thrown coins give {tokens:.2f} tokens per pass{mistake}"


if __name__ == "__main__":
    test_unit_predict_tokens()

# %% [markdown]
"""
Now real passes and seconds. A draft can be had for nothing: the target's own **first layers**, under its norm and head.
To have any acceptance that we like, we scale what the later layers of a random target add, by `strength`. *Predict:* at which acceptance does speculation begin to pay on your machine?
"""

# %%
#| export
def first_layers(model, num_layers):
    """A draft that costs no memory: the model's own first layers, under its norm and head; all parts are shared."""
    if whole_number("num_layers", num_layers) > model.num_layers:
        raise ValueError(f"the model has {model.num_layers} layers, {num_layers} were asked for")
    draft = copy.copy(model)
    draft.blocks, draft.num_layers = model.blocks[:num_layers], num_layers
    draft._kv_cache = None  # an enabled cache is the whole model's
    return draft


def expected_tokens(acceptance, k):
    """Tokens per pass of the target if each of k guesses is accepted with this probability, independently.

    >>> round(expected_tokens(0.8, k=4), 4), expected_tokens(1, k=4)
    (3.3616, 5)
    """
    return sum(acceptance**i for i in range(k + 1))

# %% nbgrader={"grade": false, "grade_id": "24-measure-speed", "locked": true, "schema_version": 3, "solution": false, "task": false}
def refining_gpt(strength, embed_dim=512, num_layers=6):
    """A random GPT whose layers after the first add only `strength` times what they would."""
    model = random_gpt(256, embed_dim, num_layers, 8, 128, num_kv_heads=8)
    for block in model.blocks[1:]:
        for part in (block.attention.out_proj, block.mlp.down_proj):
            part.weight.data *= strength
            part.bias.data *= strength
    return model


def chance_of_agreement(rounds):
    """Accepted guesses per guess that was judged (none is, after the first that was rejected)."""
    accepted = sum(done.accepted for done in rounds)
    return accepted / max(1, accepted + sum(done.accepted < done.proposed for done in rounds))


def compare(draft, target, prompts, max_new_tokens, k):
    """Acceptance, tokens per pass and predicted ones, milliseconds per token (speculative, plain), same texts?"""
    caches = {"draft_cache": cache_of(draft), "target_cache": cache_of(target)}
    rounds, plain_cache, written = [], cache_of(target), len(prompts) * max_new_tokens

    def guess(on_round=None):
        return [speculative_generate(draft, target, prompt, max_new_tokens, k, on_round=on_round, **caches)
                for prompt in prompts]

    def plain():
        return [target.generate(prompt, max_new_tokens, cache=plain_cache) for prompt in prompts]

    same, a = guess(rounds.append) == plain(), chance_of_agreement(rounds)
    seconds = [[time_calls(run, warmup=0, repeats=1)[0] for run in (guess, plain)] for _ in range(2)]  # in turn
    ms = 1e3 * np.median(seconds, axis=0) / written
    return a, written / len(rounds), expected_tokens(a, k), *ms, same


TABLE_HEAD = "accepted   tokens/pass   predicted   ms/token   plain   speed-up   same text"


def table_row(a, tokens, expected, speculative, plain, same):
    return (f"{a:>8.2f} {tokens:>13.2f} {expected:>11.2f} {speculative:>10.2f} {plain:>7.2f} {plain / speculative:>9.2f}x"
            f"   {same}")


def show_speed(cases=((1, 4), (0.1, 2), (0.1, 4), (0, 4), (0, 8)), max_new_tokens=28):
    """The whole range of acceptance: a target of 6 layers, 512 wide; the draft is its first."""
    print("strength  k   " + TABLE_HEAD)
    for strength, k in cases:
        target = refining_gpt(strength)
        row = table_row(*compare(first_layers(target, 1), target, [[1, 2, 3, 4]], max_new_tokens, k))
        print(f"{strength:>8} {k:>2}   {row}")


if __name__ == "__main__":
    show_speed()

# %% [markdown]
"""
Acceptance decides; the text never changes. A round costs k passes of the draft and one of the target over k + 1 rows,
dearer than one row by section 1. With c the cost of a draft's pass and r that of the long one, both relative to a
plain pass, we gain when tokens per pass > k * c + r. (Leviathan et al., theorem 3.8, with r = 1: on an accelerator the
long pass is as fast as a short one.)
"""

# %% [markdown]
"""
And on real text? The demo's GPT has four layers, 128 wide. *Predict:* which k is best?
"""

# %% nbgrader={"grade": false, "grade_id": "24-measure-demo", "locked": true, "schema_version": 3, "solution": false, "task": false}
def held_out_prompts(tokenizer, count=4, length=32):
    """Prompts from the part of the documentation that the demo's GPT was not trained on."""
    from tinytorch.demo.language import splits, text

    _, ids = splits(tokenizer.encode(text()))
    return [ids[start : start + length].tolist() for start in range(0, len(ids) - length, len(ids) // count)][:count]


def show_demo(max_new_tokens=32):
    """Drafts of 1 and 2 of the demo's 4 layers, two k; then one text, what the draft gave in brackets."""
    from tinytorch.demo.language import load

    target, tokenizer, _ = load()
    prompts = held_out_prompts(tokenizer)
    print("layers  k   " + TABLE_HEAD)
    for layers, k in ((1, 2), (1, 4), (2, 2), (2, 4)):
        print(f"{layers:>6} {k:>2}   " + table_row(*compare(first_layers(target, layers), target, prompts, max_new_tokens, k)))
    rounds = []
    speculative_generate(first_layers(target, 2), target, prompts[3], max_new_tokens, on_round=rounds.append)
    print("\n" + tokenizer.decode(prompts[3]), end="")
    for done in rounds:
        guessed, own = tokenizer.decode(done.kept[: done.accepted]), tokenizer.decode(done.kept[done.accepted :])
        print((f"[{guessed}]" if guessed else "") + own, end="")
    print()


if __name__ == "__main__":
    show_demo()

# %% [markdown]
"""
In brackets stands what the draft guessed right. Read the speed-ups as printed: below 1.00x, speculation loses. In a model
so small a pass is mostly calls into NumPy, not weights, and a draft of one layer in four is hardly small.

*Look back.* Why can a bad draft never spoil the text, only the time? (Every kept token is the target's choice after
kept tokens.) Why is k = 30 a bad idea even for a good draft? (Look at the sum in section 9: 0.8**30.)
"""

# %% [markdown]
"""
# Part C: guesses and chance

## 10. What the draft left over

When we sample, the target has no one token in mind, but a distribution p; and the draft has drawn its guess from
another, q. Can guesses from q make text that is distributed as p, exactly? Three tokens:

    token        0     1     2
    p          0.1   0.2   0.7     what the target wants
    q          0.6   0.3   0.1     how often the draft proposes it
    min(p, q)  0.1   0.2   0.1     what may pass: never more than p wants, never more than q offers

So accept a guess x with probability min(1, p[x] / q[x]): token 0 passes in 1 of 6 cases, token 2 always. That hands
out 0.1, 0.2 and 0.1; the other 0.6 of all rounds are rejections.
"""

# %% [markdown]
"""
What does p still want?

    max(0, p - q)    0     0   0.6      -> divided by its sum:  0  0  1

Only token 2 was offered too rarely. A rejected guess is replaced by a draw from this **residual**, and all sums up: 0.1,
0.2, 0.1 + 0.6 * 1 = 0.7. To draw from p again would be wrong: what was accepted has had its share.
"""

# %% nbgrader={"grade": false, "grade_id": "24-residual", "locked": false, "schema_version": 3, "solution": true, "task": false}
#| export
def residual(p, q):
    """What p wants beyond what q offers, as probabilities: max(0, p - q), normalised. p, q, result (V,).

    Where nothing is left (p <= q everywhere, by rounding) it is p itself.
    """
    ### BEGIN SOLUTION
    rest = np.maximum(p - q, 0)
    return rest / rest.sum() if rest.any() else p
    ### END SOLUTION

# %% nbgrader={"grade": true, "grade_id": "24-residual-test", "locked": true, "points": 3, "schema_version": 3, "solution": false, "task": false}
def test_unit_residual(p=(0.1, 0.2, 0.7), q=(0.6, 0.3, 0.1)):
    """Oracle: the sum of the picture. What is accepted and what is put in place of the rejected must make p."""
    p, q = np.array(p), np.array(q)
    got = residual(p, q)
    assert got.shape == p.shape, f"got shape {got.shape}, expected {p.shape}"
    assert not np.allclose(got, p), f"got {got}, that is p itself: what was accepted has had its share already"
    assert (got >= 0).all(), f"got {got.round(2)}: a probability below 0; what q offers in excess counts as 0"
    assert abs(got.sum() - 1) < 1e-9, f"got {got.round(2)}, which sums to {got.sum():.2f}: divide by the sum"
    passed = np.minimum(p, q)
    total = passed + (1 - passed.sum()) * got
    assert np.allclose(total, p), f"accepted + replaced = {total.round(2)}, expected p = {p}"
    same = residual(p, p.copy())
    assert np.allclose(same, p), f"p equals q: nothing is left, expected p itself, got {same}"
    ### BEGIN HIDDEN TESTS
    rng = np.random.default_rng(0)
    for p, q in rng.dirichlet(np.ones(6), (20, 2)):
        passed, rest = np.minimum(p, q), residual(p, q)
        assert np.allclose(passed + (1 - passed.sum()) * rest, p), f"p {p}, q {q}: accepted + replaced is not p"
    ### END HIDDEN TESTS


if __name__ == "__main__":
    test_unit_residual()

# %% [markdown]
"""
## 11. Accept or draw again

In order: accept each guess with probability p / q. The first that is rejected is replaced by a draw from the residual,
and ends the round, for the later guesses followed another text. If all are accepted, the target adds a token of its
own, drawn from its last row. `rng.random()` is uniform between 0 and 1, `draw(probabilities, rng)` gives a token.
"""

# %% nbgrader={"grade": false, "grade_id": "24-sample", "locked": false, "schema_version": 3, "solution": true, "task": false}
#| export
def draw(probabilities, rng):
    """One token id, drawn from probabilities (V,) that sum to 1."""
    return int(rng.choice(len(probabilities), p=probabilities))


def accept_sampled(p, q, proposals, rng):
    """The tokens to keep, distributed as if drawn from the target one by one: a list of 1 to n + 1.

    p (n + 1, V): the target's probabilities after the text and after each proposal. q: n rows (V,) from which the n
    proposals were drawn. Leviathan et al. 2023, algorithm 1.
    """
    ### BEGIN SOLUTION
    for i, token in enumerate(proposals):
        if rng.random() >= p[i][token] / q[i][token]:
            return [*proposals[:i], draw(residual(p[i], q[i]), rng)]
    return [*proposals, draw(p[len(proposals)], rng)]
    ### END SOLUTION

# %% nbgrader={"grade": true, "grade_id": "24-sample-test", "locked": true, "points": 5, "schema_version": 3, "solution": false, "task": false}
def first_two(target, draft, rng):
    """Two tokens of a text: row v of the tables (V, V) says what follows token v; the text begins after token 0."""
    proposals = []
    for _ in range(2):
        proposals.append(draw(draft[[0, *proposals][-1]], rng))
    before = [0, *proposals]
    kept = accept_sampled(target[before], draft[before[:2]], proposals, rng)
    return kept[:2] if len(kept) > 1 else [*kept, draw(target[kept[-1]], rng)]  # the next round, without a draft


def test_unit_sample(seed=0, draws=20_000):
    """Oracles: rounds that leave nothing to chance; then the exact probability of each pair of tokens, p * p."""
    one, rng = np.eye(4), np.random.default_rng(seed)
    got = accept_sampled(one[[1, 2, 3]], one[[1, 2]], [1, 2], rng)
    assert got == [1, 2, 3], f"both guesses are certain: got {got}, expected [1, 2, 3], with a token of the target's own"
    got = accept_sampled(one[[1, 3, 0]], one[[1, 2]], [1, 2], rng)
    assert got == [1, 3], f"the second guess is impossible: got {got}, expected [1, 3], its replacement ends the round"
    target = np.array([[0.1, 0.2, 0.7], [0.5, 0.25, 0.25], [0.3, 0.6, 0.1]])
    draft = np.array([[0.6, 0.3, 0.1], [0.1, 0.1, 0.8], [0.3, 0.3, 0.4]])
    counts = np.zeros((3, 3))
    for _ in range(draws):
        counts[tuple(first_two(target, draft, rng))] += 1
    first, p, q = counts.sum(axis=1) / draws, target[0], draft[0]
    kept = np.minimum(p, q)
    looks_like = [(np.abs(first - wrong).sum() / 2, text) for wrong, text in (
        (q, "these are the draft's: is every guess accepted?"),
        (kept + (1 - kept.sum()) * p, "were rejected guesses drawn from p again? The residual takes their place"),
        (p, "it is the second token that is wrong"))]
    off = np.abs(counts / draws - p[:, None] * target).sum() / 2  # total variation
    assert off < 0.03, (
        f"{draws} texts: first tokens {first.round(3)}, expected {p}; pairs are off by {off:.3f}: {min(looks_like)[1]}")


if __name__ == "__main__":
    test_unit_sample()

### BEGIN HIDDEN TESTS
if __name__ == "__main__":
    test_unit_sample(seed=3)
### END HIDDEN TESTS

# %% [markdown]
"""
As a rule for the loop of part B it is two lines. Then a whole model: *predict*, at which temperature are more guesses
accepted, 0, 0.5 or 2? A guess passes with probability sum(min(p, q)), the overlap of both distributions; greedy
decoding asks only whether their peaks agree.
"""

# %%
#| export
class Sampled:
    """The rule of a temperature above 0: drawn from the draft, accepted so that the target's distribution comes out."""

    def __init__(self, temperature, top_k, rng):
        self.temperature, self.top_k, self.rng = temperature, top_k, rng

    def guess(self, logits):
        """The next token after logits (1, V), and the probabilities that it was drawn from."""
        probabilities = next_probabilities(logits, self.temperature, self.top_k)[0]
        return draw(probabilities, self.rng), probabilities

    def keep(self, logits, proposals, drawn_from):
        """The tokens to keep, by the target's logits (n + 1, V)."""
        return accept_sampled(next_probabilities(logits, self.temperature, self.top_k), drawn_from, proposals, self.rng)

# %% nbgrader={"grade": false, "grade_id": "24-measure-sampled", "locked": true, "schema_version": 3, "solution": false, "task": false}
def show_temperatures(temperatures=(0, 0.5, 1, 2), max_new_tokens=32):
    """Acceptance by temperature, on the demo's GPT with its first two layers as the draft."""
    from tinytorch.demo.language import load

    target, tokenizer, _ = load()
    draft, rng = first_layers(target, 2), np.random.default_rng(0)
    for temperature in temperatures:
        rounds = []
        for prompt in held_out_prompts(tokenizer):
            text = speculative_generate(draft, target, prompt, max_new_tokens, temperature=temperature, rng=rng,
                                        on_round=rounds.append)
        tokens = sum(len(done.kept) for done in rounds)
        print(f"temperature {temperature:<4} accepted {chance_of_agreement(rounds):.2f}, {tokens / len(rounds):.2f} tokens "
              f"per pass   {tokenizer.decode(text[len(prompt) :])[:60]!r}")


if __name__ == "__main__":
    show_temperatures()

# %% [markdown]
"""
*Look back.* Does a text equal that of plain sampling with the same seed? (No: the random numbers answer other
questions. Only the distribution is the same.) What are acceptance and residual when p and q are one-hot? (0 or 1, and
p: greedy decoding, part B, is the limit.)

## 12. The end
"""

# %% nbgrader={"grade": true, "grade_id": "24-module-test", "locked": true, "points": 4, "schema_version": 3, "solution": false, "task": false}
def test_scenario():
    """Ends, refusals and a whole model's distribution. Oracles: target.generate, and all texts there are."""
    target, draft = random_gpt(max_seq_len=24), random_gpt(embed_dim=16, num_layers=1, seed=1)
    plain = target.generate([1, 2, 3], 12)
    for stop in set(plain[3:]):
        expected = target.generate([1, 2, 3], 12, stop_token=stop)
        for guesser in (draft, target):
            got = speculative_generate(guesser, target, [1, 2, 3], 12, k=5, stop_token=stop)
            assert got == expected, f"stop token {stop}: got {got}, expected {expected}"
    got = speculative_generate(draft, target, np.array([[1, 2, 3]]), 12)
    assert isinstance(got, np.ndarray) and got.tolist() == [plain], f"array in, array out: got {got!r}"
    before = cache_of(draft)
    for wrong in (dict(k=0), dict(temperature=-1), dict(draft_cache=cache_of(draft, max_seq_len=13)),
                  dict(draft=random_gpt(vocab_size=63)), dict(target_cache=before, draft_cache=before)):
        call = {"draft": draft, "target": target, "prompt": [1, 2, 3], "max_new_tokens": 12, **wrong}
        assert error_of(lambda call=call: speculative_generate(**call)), f"{list(wrong)}: got no ValueError"
    tiny, other = random_gpt(4, 8, 1, 2, 8, seed=2), random_gpt(4, 8, 1, 2, 8, seed=3)
    p = next_probabilities(plain_logits(tiny, [0]), temperature=2.0)[0]
    rng, counts = np.random.default_rng(0), np.zeros(4)
    for _ in range(1500):
        counts[speculative_generate(other, tiny, [0], 2, temperature=2.0, rng=rng)[1]] += 1
    off = np.abs(counts / 1500 - p).sum() / 2
    assert off < 0.05, f"1500 texts: first tokens {(counts / 1500).round(3)}, the target says {p.round(3)}"


def test_module():
    """Every check of this lesson, then the story."""
    for check in (
        test_unit_continuations, test_unit_follow, test_unit_ends, test_unit_beam_search, test_unit_predict_passes,
        test_unit_run, test_unit_accept, test_unit_forget, test_unit_greedy, test_unit_predict_tokens,
        test_unit_residual, test_unit_sample, test_scenario,
    ):
        check()
        print(f"{check.__name__:<26} holds")


if __name__ == "__main__":
    test_module()

# %% [markdown]
"""
**In five lines.** A pass over a few rows costs less than as many passes. Beams spend rows on other texts: the best of
all continuations, and a cache that moves with its beam. Speculation spends them on guesses: the longest prefix on
which both agree, one token for free, and two caches rolled back. A bad draft costs time, never text. Sampled, what is
accepted and the residual add up to the target's distribution.
"""

# %% [markdown]
"""
**Exercises.** (1) Prompt look-up: a draft without a model, which finds the last two tokens earlier in the text and
proposes what followed them. What is q when a guess is certain? (2) Let k follow the acceptance: one more after a full
round, one less after a rejection. (3) `beam_search` with `length_penalty` 0, 1 and 2 and a stop token: what happens to
the lengths?
"""

# %% [markdown]
"""
**A design note.** Where do guesses come from? Guessing and checking in blocks is Stern et al. 2018 (arXiv:1811.03115);
with a separate small model, Leviathan et al. report 2 to 3 times the speed on T5-XXL, Chen et al. 2 to 2.5 times on
Chinchilla 70B (both in the abstract). But a second model must be trained, loaded and kept in step.

So *Medusa* (Cai et al. 2024, arXiv:2401.10774) puts extra heads on the target, which guess from its last hidden state,
and checks a tree of guesses; *EAGLE* (Li et al. 2024, arXiv:2401.15077) guesses the hidden states themselves with one
layer. Prompt look-up (Saxena 2023, *prompt-lookup-decoding*) copies from the text itself.
"""

# %% [markdown]
"""
**What breaks next.** A batch. Rows accept different numbers of guesses, and a server that is full has no rows to give
away: when 64 texts share a pass, the weights are already read for 64. Speculation is for the few who wait, not for
the many.
"""
