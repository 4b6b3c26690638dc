"""Speculative decoding: guess with a small model, check with the large one; and beams that move their cache along.

Lesson 24_speculative_decoding. Built from src/24_speculative_decoding/24_speculative_decoding.py by `tito dev build`: change it there, not here.
"""

__all__ = [
    "log_probabilities",
    "best_continuations",
    "follow",
    "part_candidates",
    "Beam",
    "stop_set",
    "next_logits",
    "beam_search",
    "check_beams",
    "search",
    "ranked",
    "run_new",
    "accept_greedy",
    "forget_rejected",
    "Greedy",
    "Round",
    "one_round",
    "speculative_generate",
    "check_speculation",
    "both_caches",
    "first_layers",
    "expected_tokens",
    "residual",
    "draw",
    "accept_sampled",
    "Sampled",
]


# %% cell 2
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


# %% cell 10 (24-continuations)
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
    totals = scores[:, None] + log_probabilities(logits)
    best = np.argsort(-totals, axis=None, kind="stable")[:count]
    parents, tokens = np.divmod(best, totals.shape[1])
    return totals.ravel()[best], parents, tokens


# %% cell 13 (24-follow)
def follow(ids, parents, tokens, cache=None):
    """The texts (B, T + 1): each parent's ids and its new token. The rows of the cache move with them.

    ids (B, T), parents and tokens (B,). Without a cache only the texts move.
    """
    if cache is not None:
        cache.reorder(parents)
    return np.concatenate([ids[parents], tokens[:, None]], axis=1)


# %% cell 17 (24-ends)
def part_candidates(scores, tokens, beam_width, stops):
    """Ranks (two lists) that finish, and ranks that live on; candidates come best first.

    Finished: those of the best beam_width whose token is in the set `stops`. Alive: the best beam_width of the others.
    """
    finished = [i for i in range(beam_width) if tokens[i] in stops and scores[i] > -np.inf]
    alive = [i for i in range(len(tokens)) if tokens[i] not in stops][:beam_width]
    return finished, alive


# %% cell 20
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


# %% cell 22
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


# %% cell 23
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


# %% cell 37 (24-run)
def run_new(model, cache, tokens, count=1):
    """Run what the cache lacks of `tokens`, a list: logits (count, V) of what follows each of the last `count`.

    The cache then holds all of `tokens`.
    """
    new = np.array([tokens[cache.seq_pos :]])  # (1, T)
    with cache.attached_to(model):
        return model.head(model.hidden(new)[:, -count:]).numpy()[0]


# %% cell 40 (24-accept)
def accept_greedy(choices, proposals):
    """The tokens to keep: the proposals up to the first that the target would not choose, and its own there.

    choices: the target's token after the text and after each proposal, len(proposals) + 1 of them; both are lists.

    >>> accept_greedy([5, 6, 7], proposals=[5, 9])
    [5, 6]
    """
    agreed = 0
    while agreed < len(proposals) and choices[agreed] == proposals[agreed]:
        agreed += 1
    return choices[: agreed + 1]


# %% cell 43 (24-forget)
def forget_rejected(draft_cache, target_cache, proposed, kept):
    """Roll both caches back to what is text. proposed: the guesses of the round; kept: its tokens, 1 to proposed + 1."""
    target_cache.rollback(proposed + 1 - kept)
    draft_cache.rollback(max(proposed - kept, 0))


# %% cell 46
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


# %% cell 47
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


# %% cell 48
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


# %% cell 55
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


# %% cell 63 (24-residual)
def residual(p, q):
    """What p wants beyond what q offers, as probabilities: max(0, p - q), normalised. p, q, result (V,).

    Where nothing is left (p <= q everywhere, by rounding) it is p itself.
    """
    rest = np.maximum(p - q, 0)
    return rest / rest.sum() if rest.any() else p


# %% cell 66 (24-sample)
def draw(probabilities, rng):
    """One token id, drawn from probabilities (V,) that sum to 1."""
    return int(rng.choice(len(probabilities), p=probabilities))


def accept_sampled(p, q, proposals, rng):
    """The tokens to keep, distributed as if drawn from the target one by one: a list of 1 to n + 1.

    p (n + 1, V): the target's probabilities after the text and after each proposal. q: n rows (V,) from which the n
    proposals were drawn. Leviathan et al. 2023, algorithm 1.
    """
    for i, token in enumerate(proposals):
        if rng.random() >= p[i][token] / q[i][token]:
            return [*proposals[:i], draw(residual(p[i], q[i]), rng)]
    return [*proposals, draw(p[len(proposals)], rng)]


# %% cell 69
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
