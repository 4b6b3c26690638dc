"""Lesson 24 against everything before it.

Oracles: all texts there are, a beam search in plain Python, decoding without a cache, the target's exact distribution.
"""

import copy
import itertools
import math

import numpy as np
import pytest

from tinytorch.core.autograd import no_grad
from tinytorch.generation import speculative
from tinytorch.generation.cache_compression import HeavyHitterKVCache, OffloadedKVCache, SlidingWindowKVCache
from tinytorch.generation.kv_cache import create_kv_cache, disable_kv_cache, enable_kv_cache
from tinytorch.generation.paged import paged_kv_cache
from tinytorch.generation.speculative import (
    Beam,
    Round,
    beam_search,
    expected_tokens,
    first_layers,
    speculative_generate,
)
from tinytorch.models.transformer import GPT


# ---- the oracles and what they are asked about
def lively_gpt(vocab_size=13, embed_dim=16, num_layers=2, max_seq_len=24, seed=0, loud=0.3):
    """A GPT whose every parameter is different and large enough to matter, in eval mode; the head is untied."""
    rng = np.random.default_rng(seed)
    model = GPT(vocab_size, embed_dim, num_layers, 4, max_seq_len, num_kv_heads=2, tie_weights=False, rng=rng)
    for parameter in model.parameters():
        noise = loud * rng.standard_normal(parameter.shape)
        parameter.data = (noise if parameter.ndim > 1 else parameter.data + noise).astype(np.float32)
    return model.eval()


def logits_after(model, text):
    """Logits (V,) of what follows a whole text, in float64, without a cache."""
    with no_grad():
        return model(np.array([text])).numpy()[0, -1].astype(np.float64)


def log_softmax(logits):
    shifted = [x - max(logits) for x in logits]
    return [x - math.log(sum(math.exp(y) for y in shifted)) for x in shifted]


def every_text(model, prompt, length, stops=()):
    """All (log-probability, text), best first, of up to `length` new tokens where a stop token ends a text."""
    texts, ended = [(0.0, list(prompt))], []
    for _ in range(length):
        longer = [(score + more, [*text, v]) for score, text in texts
                  for v, more in enumerate(log_softmax(logits_after(model, text)))]
        ended += [pair for pair in longer if pair[1][-1] in stops]
        texts = [pair for pair in longer if pair[1][-1] not in stops]
    return sorted(ended + texts, reverse=True)


def slow_beam_search(model, prompt, width, length, stops=(), penalty=0.0):
    """Beam search over lists of (score, text), which never ends early: (ranked score, log-probability, text)."""
    live, finished = [(0.0, list(prompt))], []
    for step in range(1, length + 1):
        candidates = sorted(((score + more, [*text, v]) for score, text in live
                             for v, more in enumerate(log_softmax(logits_after(model, text)))), reverse=True)
        finished += [(score / step**penalty, score, text) for score, text in candidates[:width] if text[-1] in stops]
        live = [pair for pair in candidates if pair[1][-1] not in stops][:width]
    finished += [(score / length**penalty, score, text) for score, text in live]
    return sorted(finished, reverse=True)[:width]


def cache_for(model, batch_size=1, factory=create_kv_cache, max_seq_len=None, **options):
    heads, dim = model.num_kv_heads, model.embed_dim // model.num_heads
    return factory(batch_size, max_seq_len or model.max_seq_len, model.num_layers, heads, dim, **options)


def paged(*sizes):
    return paged_kv_cache(*sizes, block_size=3)


def growing(*sizes):
    return create_kv_cache(*sizes, grow=True)


def window(*sizes):
    """As long as the longest text here, with room for what is taken back."""
    return SlidingWindowKVCache(*sizes, window=24, spare=8)


FACTORIES = {"plain": create_kv_cache, "growing": growing, "paged": paged, "offloaded": OffloadedKVCache,
             "window": window}
each_cache = pytest.mark.parametrize("factory", FACTORIES.values(), ids=FACTORIES)


def rows_run(model, run):
    """Token rows per row of the batch that pass through the model during run(), pass by pass."""
    counted, embedding = [], model.token_embedding

    def counting(ids):
        counted.append(np.asarray(ids).shape[-1])
        return embedding(ids)

    model.token_embedding = counting
    try:
        run()
    finally:
        model.token_embedding = embedding
    return counted


def agreeing(model, p, seed=0):
    """A draft with the model's own parts that finds its least probable token the best in 1 - p of all cases."""
    draft, rng = copy.copy(model), np.random.default_rng(seed)

    def head(x):
        logits = model.head(x)
        return logits if rng.random() < p else -logits

    draft.head = head
    return draft


def texts_of(beams):
    return [list(beam.ids) for beam in beams]


def assert_same_beams(beams, expected):
    """Texts and log-probabilities, in order."""
    assert len(beams) == len(expected) > 0 and all(isinstance(beam, Beam) for beam in beams)
    assert texts_of(beams) == [text for *_, text in expected]
    np.testing.assert_allclose([beam.log_prob for beam in beams], [pair[-2] for pair in expected], atol=2e-5)


class TestBeamSearch:
    @each_cache
    @pytest.mark.parametrize("stops", [(), (2,), (0, 3)])
    @pytest.mark.parametrize("vocab_size, length", [(4, 3)])
    def test_a_wide_beam_finds_the_best_of_all_texts(self, factory, stops, vocab_size, length):
        model = lively_gpt(vocab_size, seed=vocab_size)
        width = vocab_size ** (length - 1)
        expected = every_text(model, [1, 3], length, stops)[:width]
        for cache in (None, cache_for(model, width, factory)):
            beams = beam_search(model, [1, 3], width, length, cache=cache, stop_token=stops or None)
            assert_same_beams(beams, expected)

    @each_cache
    @pytest.mark.parametrize("width", [1, 2, 3, 5])
    @pytest.mark.parametrize("stops, penalty", [((), 0.0), ((4,), 0.0), ((4, 7), 1.0), ((1, 2, 3, 4, 5), 0.6)])
    def test_equals_a_beam_search_in_plain_python(self, factory, width, stops, penalty):
        model = lively_gpt(seed=width)
        expected = slow_beam_search(model, [1, 2, 3], width, 7, stops, penalty)
        for cache in (None, cache_for(model, width, factory)):
            beams = beam_search(model, [1, 2, 3], width, 7, cache=cache, stop_token=stops, length_penalty=penalty)
            assert_same_beams(beams, expected)
            np.testing.assert_allclose([beam.score for beam in beams], [pair[0] for pair in expected], atol=2e-5)

    def test_a_wide_beam_may_find_what_greedy_decoding_misses(self):
        found = 0
        for seed in range(8):
            model = lively_gpt(seed=seed)
            one, four = (beam_search(model, [1], width, 6)[0] for width in (1, 4))
            assert one.ids == model.generate([1], 6)
            found += four.log_prob > one.log_prob + 1e-6
        assert found >= 3

    def test_a_length_penalty_prefers_longer_texts(self):
        lengths = {penalty: [] for penalty in (0.0, 3.0)}
        for seed, (penalty, seen) in itertools.product(range(6), lengths.items()):
            best = beam_search(lively_gpt(seed=seed), [1], 3, 8, stop_token=[2, 3, 4], length_penalty=penalty)[0]
            assert best.score == pytest.approx(best.log_prob / (len(best.ids) - 1) ** penalty)
            seen.append(len(best.ids))
        assert sum(lengths[3.0]) > sum(lengths[0.0])

    @pytest.mark.parametrize("form", [[1, 2], (1, 2), [[1, 2]], np.array([1, 2]), np.array([[1, 2]], np.int16)])
    def test_the_texts_have_the_form_of_the_prompt(self, form):
        model = lively_gpt()
        expected = texts_of(beam_search(model, [1, 2], 2, 3))
        beams = beam_search(model, form, 2, 3)
        for beam, text in zip(beams, expected):
            assert isinstance(beam.ids, np.ndarray if isinstance(form, np.ndarray) else list)
            assert np.shape(beam.ids) == (*np.shape(form)[:-1], 5)
            assert np.ravel(beam.ids).tolist() == text

    def test_ends(self):
        model = lively_gpt(max_seq_len=8)
        assert beam_search(model, [1, 2], 3, 0) == [Beam([1, 2], 0.0, 0.0)]
        assert beam_search(model, [1, 2], 3, 0, length_penalty=1) == [Beam([1, 2], 0.0, 0.0)]
        full = beam_search(model, [1, 2], 3, 6, cache=cache_for(model, 3, max_seq_len=7))
        assert [len(beam.ids) for beam in full] == [8, 8, 8]
        at_once = beam_search(model, [1, 2], 3, 6, stop_token=range(13), cache=cache_for(model, 3))
        assert_same_beams(at_once, every_text(model, [1, 2], 1)[:3])
        tiny = lively_gpt(vocab_size=2)
        assert_same_beams(beam_search(tiny, [1], 16, 3), every_text(tiny, [1], 3))  # there are only eight
        assert_same_beams(beam_search(tiny, [1], 16, 3, cache=cache_for(tiny, 16)), every_text(tiny, [1], 3))

    def test_a_search_ends_early_when_nothing_alive_can_overtake(self):
        model = lively_gpt()
        best = [text[-1] for _, text in every_text(model, [1, 2], 1)]
        rows = rows_run(model, lambda: beam_search(model, [1, 2], 2, 9, stop_token=best[:8], cache=cache_for(model, 2)))
        assert len(rows) < 9

    @each_cache
    def test_only_what_a_cache_lacks_is_run(self, factory):
        model = lively_gpt()
        cache = cache_for(model, 3, factory)
        assert rows_run(model, lambda: beam_search(model, [1, 2, 3, 4], 3, 5, cache=cache)) == [4, 1, 1, 1, 1]
        assert rows_run(model, lambda: beam_search(model, [1, 2, 3, 4], 3, 3)) == [4, 5, 6]

    def test_beams_share_the_blocks_of_their_prompt_and_leak_none(self):
        model, prompt = lively_gpt(), list(range(12))
        cache = cache_for(model, 4, paged)
        pool, used = cache.pool, []
        beam_search(model, prompt, 4, 1, cache=cache)
        assert pool.num_blocks - pool.num_free() == 4, "a prompt of 12 tokens in blocks of 3, once for four beams"
        for _ in range(20):
            beam_search(model, prompt, 4, 8, cache=cache)
            used.append(pool.num_blocks - pool.num_free())
        assert len(set(used)) == 1 and used[0] < 4 * 7
        cache.reset()
        assert pool.num_free() == pool.num_blocks

    def test_a_cache_that_holds_another_text_is_reset(self):
        model = lively_gpt()
        cache, expected = cache_for(model, 3), beam_search(model, [5, 6], 3, 4)
        beam_search(model, [1, 2, 3], 3, 6, cache=cache)
        assert_same_beams(beam_search(model, [5, 6], 3, 4, cache=cache), [(b.log_prob, b.ids) for b in expected])

    def test_an_enabled_cache_is_used_and_stays_enabled(self):
        model = lively_gpt()
        expected, cache = texts_of(beam_search(model, [1, 2], 3, 4)), enable_kv_cache(model, batch_size=3)
        assert texts_of(beam_search(model, [1, 2], 3, 4)) == expected
        assert cache.seq_pos > 0 and model._kv_cache is cache
        cache.reset()
        model(np.array([[1], [2], [3]]))
        assert cache.seq_lens == [1, 1, 1]

    def test_training_mode_comes_back_and_no_gradient_is_recorded(self):
        model = lively_gpt()
        expected = texts_of(beam_search(model, [1, 2], 2, 4))
        model.train()
        assert texts_of(beam_search(model, [1, 2], 2, 4, cache=cache_for(model, 2))) == expected
        assert model.training and model.blocks[0].attention.training

    @pytest.mark.parametrize("wrong, says", [
        (dict(beam_width=0), "beam_width"), (dict(beam_width=True), "beam_width"), (dict(beam_width=2.0), "beam_width"),
        (dict(prompt=[[1, 2], [3, 4]]), "one prompt"), (dict(prompt=[]), "token"),
        (dict(max_new_tokens=-1), "max_new_tokens"), (dict(max_new_tokens=23), "max_seq_len"),
        (dict(length_penalty=-0.5), "length_penalty"), (dict(length_penalty=math.nan), "length_penalty"),
        (dict(beam_width=3), "batch_size=2"), (dict(max_new_tokens=8), "room for 8"),
    ])
    def test_what_does_not_fit_is_refused_before_any_work(self, wrong, says):
        model = lively_gpt()
        call = {"prompt": [1, 2], "beam_width": 2, "max_new_tokens": 4} | wrong

        def run():
            with pytest.raises(ValueError, match=says):
                beam_search(model, cache=cache_for(model, 2, max_seq_len=8), **call)

        assert rows_run(model, run) == []


class TestGreedySpeculation:
    @each_cache
    @pytest.mark.parametrize("k", [1, 3, 4, 40])
    @pytest.mark.parametrize("p", [0.0, 0.5, 0.9, 1.0])
    def test_equals_the_target_at_every_acceptance_rate(self, factory, k, p):
        """And after every round both caches hold the text, checked against fresh caches that have read it."""
        target = lively_gpt(seed=1)
        draft, text, rounds = agreeing(target, p, seed=k), [1, 2, 3], []
        caches = [cache_for(model, 1, factory, max_seq_len=23) for model in (draft, target)]

        def look(done):
            text.extend(done.kept)
            rounds.append(done)
            full = done.proposed and len(done.kept) == done.proposed + 1
            assert caches[1].seq_lens == [len(text) - 1]
            assert not done.proposed or caches[0].seq_lens == [len(text) - 1 - full]
            for cache in caches:
                fresh = cache_for(target)
                target(np.array([text[: cache.seq_pos]]), cache=fresh)
                for layer in range(2):
                    for mine, read in zip(cache.get(layer), fresh.get(layer)):
                        assert mine.shape == read.shape == (1, 2, cache.seq_pos, 4)
                        np.testing.assert_allclose(mine.data, read.data, atol=1e-5)

        with no_grad():
            got = speculative_generate(draft, target, [1, 2, 3], 21, k, on_round=look,
                                       draft_cache=caches[0], target_cache=caches[1])
        assert got == text == target.generate([1, 2, 3], 21)
        assert all(isinstance(done, Round) and 0 <= done.accepted <= done.proposed <= k for done in rounds)
        assert all(len(done.kept) == done.accepted + 1 for done in rounds)
        if p == 1:
            assert len(rounds) == math.ceil(21 / (k + 1))
        if p == 0:
            assert len(rounds) == 21 and not any(done.accepted for done in rounds)

    def test_unrelated_drafts(self):
        target, accepted = lively_gpt(), 0
        for seed in range(6):
            draft, rounds = lively_gpt(embed_dim=8, num_layers=1, max_seq_len=50, seed=seed + 9), []
            got = speculative_generate(draft, target, [4, seed], 20, on_round=rounds.append)
            assert got == target.generate([4, seed], 20)
            accepted += sum(done.accepted for done in rounds)
        assert accepted > 0

    @pytest.mark.parametrize("most", range(9))
    @pytest.mark.parametrize("k", [1, 3, 4, 7])
    def test_max_new_tokens_inside_a_round(self, most, k):
        target = lively_gpt(max_seq_len=3 + most)  # reached exactly
        cache = cache_for(target, max_seq_len=max(1, 2 + most))  # the last token is never run
        got = speculative_generate(target, target, [1, 2, 3], most, k, target_cache=cache)
        assert len(got) == 3 + most and got == target.generate([1, 2, 3], most)
        assert cache.seq_pos == (2 + most if most else 0)

    @pytest.mark.parametrize("p", [0.0, 0.6, 1.0])
    @pytest.mark.parametrize("k", [1, 4, 9])
    def test_a_stop_token_ends_the_text_wherever_it_stands(self, p, k):
        target = lively_gpt(seed=2)
        plain = target.generate([1, 2, 3], 20)
        places = set()
        for stop in set(plain[3:]):
            expected, cache, draft_cache = plain[: plain.index(stop, 3) + 1], cache_for(target), cache_for(target)
            got = speculative_generate(agreeing(target, p), target, [1, 2, 3], 20, k, stop_token=stop,
                                       target_cache=cache, draft_cache=draft_cache)
            assert got == expected == target.generate([1, 2, 3], 20, stop_token=stop)
            assert cache.seq_pos == len(got) - 1 and draft_cache.seq_pos <= len(got) - 1
            places.add((len(got) - 3) % (k + 1))
        assert len(places) > min(k, 3) - 1
        several = speculative_generate(target, target, [1, 2, 3], 20, k, stop_token=list(set(plain[6:])))
        assert several == target.generate([1, 2, 3], 20, stop_token=list(set(plain[6:])))

    def test_a_stop_token_in_the_prompt_stops_nothing(self):
        target = lively_gpt(seed=2)
        first = target.generate([1, 2], 1)[-1]
        stop = next(v for v in range(13) if v != first)
        assert len(speculative_generate(target, target, [1, stop], 1, stop_token=stop)) == 3

    @pytest.mark.parametrize("form", [[1, 2], (1, 2), [[1, 2]], np.array([1, 2]), np.array([[1, 2]], np.uint8)])
    def test_the_text_has_the_form_of_the_prompt(self, form):
        target = lively_gpt()
        got, expected = speculative_generate(target, target, form, 5), target.generate(form, 5)
        assert type(got) is type(expected) and np.shape(got) == np.shape(expected)
        np.testing.assert_array_equal(got, expected)

    @pytest.mark.parametrize("p, theirs", [(1, [3, 1, 1, 2, 1, 1, 2, 1, 1]), (0, [3, 1, 1, 1, 1, 1, 1, 1, 1])])
    def test_rows_that_are_run(self, p, theirs):
        """k + 1 per round in the target; the draft catches up by one token, or by two if all its guesses were kept."""
        target = lively_gpt()
        draft, drafted = agreeing(target, p), []

        def run():
            drafted.extend(rows_run(draft, lambda: speculative_generate(draft, target, [1, 2, 3], 12, 3)))

        assert rows_run(target, run)[:3] == [3 + 3, 4, 4]
        assert drafted[:9] == theirs

    def test_caches_given_enabled_or_made(self):
        target, draft = lively_gpt(), lively_gpt(seed=5)
        expected = target.generate([1, 2], 9)
        enabled = enable_kv_cache(target)
        assert speculative_generate(draft, target, [1, 2], 9) == expected
        assert enabled.seq_pos == 10 and target._kv_cache is enabled
        assert speculative_generate(target, target, [1, 2], 9) == expected, "the enabled cache serves one of the two"
        draft_cache = enable_kv_cache(draft)
        assert speculative_generate(draft, target, [1, 2], 9) == expected and draft_cache.seq_pos >= 9
        assert speculative_generate(draft, target, [1, 2], 9) == expected, "caches that hold a text are reset"
        disable_kv_cache(target)
        given = cache_for(target)
        given_text = speculative_generate(draft, target, [7], 3, target_cache=given)
        assert given_text == target.generate([7], 3) and given.seq_pos == 3

    def test_first_layers_share_their_parts_with_the_target(self):
        target = lively_gpt(num_layers=3)
        draft = first_layers(target, 1)
        assert draft.num_layers == 1 and draft.blocks[0] is target.blocks[0] and len(target.blocks) == 3
        shallow = lively_gpt(num_layers=1)
        state = target.state_dict()
        shallow.load_state_dict({name: state[name] for name in shallow.state_dict()})
        np.testing.assert_allclose(logits_after(draft, [1, 2, 3]), logits_after(shallow, [1, 2, 3]), atol=1e-6)
        expected = target.generate([1, 2], 12)
        assert speculative_generate(draft, target, [1, 2], 12) == expected
        cache = enable_kv_cache(target)
        assert speculative_generate(draft, target, [1, 2], 12) == expected
        assert speculative_generate(first_layers(target, 2), target, [1, 2], 12) == expected
        assert target._kv_cache is cache
        for bad in (0, 4, True):
            with pytest.raises(ValueError):
                first_layers(target, bad)

    def test_training_mode_comes_back(self):
        target, draft = lively_gpt(), lively_gpt(seed=5)
        expected = target.generate([1, 2], 9)
        target.train()
        assert speculative_generate(draft, target, [1, 2], 9) == expected
        assert target.training and target.blocks[1].mlp.training and not draft.training

    @pytest.mark.parametrize("k, sinks", [(1, 0), (4, 0), (4, 2)])
    def test_a_window_with_spare_slots_writes_what_it_writes_token_by_token(self, k, sinks):
        target = lively_gpt()

        def short_window():
            return SlidingWindowKVCache(1, 24, 2, 2, 4, window=5, sinks=sinks, spare=k)

        expected = target.generate([1, 2, 3], 20, cache=short_window())
        assert expected != target.generate([1, 2, 3], 20), "the window must matter"
        for p in (0.0, 0.6, 1.0):
            got = speculative_generate(agreeing(target, p), target, [1, 2, 3], 20, k, target_cache=short_window())
            assert got == expected

    @pytest.mark.parametrize("cache, error, says", [
        (lambda: SlidingWindowKVCache(1, 24, 2, 2, 4, window=3), ValueError, "the window has let them go"),
        (lambda: HeavyHitterKVCache(1, 24, 2, 2, 4, budget=6), NotImplementedError, "drove out is gone"),
    ])
    def test_a_cache_that_cannot_roll_back_says_why(self, cache, error, says):
        target = lively_gpt()
        for name in ("target_cache", "draft_cache"):
            with pytest.raises(error, match=says):
                speculative_generate(agreeing(target, 0), target, [1, 2], 20, **{name: cache()})

    @pytest.mark.parametrize("wrong, says", [
        (dict(k=0), "k must"), (dict(k=-1), "k must"), (dict(k=2.0), "k must"), (dict(k=True), "k must"),
        (dict(temperature=-1), "temperature"), (dict(temperature=math.nan), "temperature"), (dict(top_k=0), "top_k"),
        (dict(draft=lively_gpt(vocab_size=12)), "12 tokens, the target 13"), (dict(prompt=[[1], [2]]), "one prompt"),
        (dict(prompt=[]), "token"), (dict(max_new_tokens=-1), "max_new_tokens"),
        (dict(max_new_tokens=1.5), "max_new_tokens"), (dict(max_new_tokens=23), "max_seq_len=24"),
        (dict(draft=lively_gpt(max_seq_len=8)), "max_seq_len=8"),
        (dict(target_cache=cache_for(lively_gpt(), max_seq_len=9)), "room for 9"),
        (dict(draft_cache=cache_for(lively_gpt(), max_seq_len=9)), "room for 9"),
        (dict(target_cache=cache_for(lively_gpt(), 2)), "batch_size=2"),
        (dict(target_cache=cache_for(lively_gpt(num_layers=3))), "2 blocks, the cache 3"),
        (dict(draft_cache=cache_for(lively_gpt(num_layers=3))), "2 blocks, the cache 3"),
    ])
    def test_what_does_not_fit_is_refused_before_any_work(self, wrong, says):
        target = lively_gpt()
        call = {"draft": lively_gpt(seed=3), "target": target, "prompt": [1, 2], "max_new_tokens": 9} | wrong

        def run():
            with pytest.raises(ValueError, match=says):
                speculative_generate(**call)

        drafted = []
        checked = rows_run(target, lambda: drafted.extend(rows_run(call["draft"], run)))
        assert checked == drafted == []

    def test_one_cache_for_both_is_refused(self):
        target = lively_gpt()
        cache = cache_for(target)
        with pytest.raises(ValueError, match="a cache each"):
            speculative_generate(target, target, [1], 4, draft_cache=cache, target_cache=cache)


def total_variation(counts, exact):
    return np.abs(np.asarray(counts) / np.sum(counts) - exact).sum() / 2


def exact_pairs(model, prompt):
    """The probability of each pair of next tokens, (V, V), from whole texts without a cache; float64."""
    first = np.exp(log_softmax(logits_after(model, prompt)))
    return np.array([p * np.exp(log_softmax(logits_after(model, [*prompt, v]))) for v, p in enumerate(first)])


def count_pairs(draft, target, texts):
    counts, rng = np.zeros((4, 4)), np.random.default_rng(7)
    for _ in range(texts):
        text = speculative_generate(draft, target, [1, 2], 2, temperature=1.0, rng=rng)
        counts[tuple(text[2:])] += 1
    return counts


class TestSampledSpeculation:
    """Statistically, on whole models. tests/property has the exact distribution, over every path of chance."""

    def pair(self):
        """A target and a draft of four tokens that disagree."""
        return (lively_gpt(4, 8, 1, 6, seed=seed, loud=0.6) for seed in (8, 1))

    def test_pairs_of_tokens_have_the_probability_that_the_target_gives_them(self, monkeypatch):
        """And the bound is one that wrong forms break by far."""
        target, draft = self.pair()
        exact = exact_pairs(target, [1, 2])
        assert total_variation(count_pairs(draft, target, 1500), exact) < 0.06
        monkeypatch.setattr(speculative, "residual", lambda p, q: p)
        assert total_variation(count_pairs(draft, target, 500), exact) > 0.18, "rejected ones drawn from p again"
        monkeypatch.setattr(speculative, "accept_sampled", lambda p, q, guesses, rng: [*guesses, 0])
        assert total_variation(count_pairs(draft, target, 500), exact) > 0.18, "every guess accepted"

    def test_equal_seeds_give_equal_texts_and_other_seeds_others(self):
        target, draft = lively_gpt(seed=1), lively_gpt(seed=2)

        def text(seed):
            return speculative_generate(draft, target, [1], 20, temperature=2.0, rng=np.random.default_rng(seed))

        assert text(0) == text(0) and len({tuple(text(seed)) for seed in range(5)}) == 5

    def test_a_draft_that_is_the_target_is_always_accepted(self):
        target, rounds = lively_gpt(), []
        for seed in range(5):
            speculative_generate(target, target, [1], 20, temperature=1.5, rng=np.random.default_rng(seed),
                                 on_round=rounds.append)
        # in one row or in five the logits differ by rounding, so that one in a million is rejected
        assert all(done.accepted == done.proposed for done in rounds) and len(rounds) == 5 * 4

    def test_top_k_of_one_is_greedy_decoding(self):
        target, draft = lively_gpt(), lively_gpt(seed=2)
        got = speculative_generate(draft, target, [1, 2], 20, temperature=1.0, top_k=1, rng=np.random.default_rng(0))
        assert got == target.generate([1, 2], 20)

    def test_sampled_text_stops_at_its_stop_token_and_at_the_end(self):
        target, draft = lively_gpt(seed=1), lively_gpt(seed=2)
        for seed in range(20):
            cache = cache_for(target)
            text = speculative_generate(draft, target, [1], 23, temperature=3.0, rng=np.random.default_rng(seed),
                                        stop_token=[4, 5], target_cache=cache)
            assert cache.seq_pos == len(text) - 1 and not {4, 5} & set(text[1:-1])
            assert len(text) == 24 or text[-1] in (4, 5)

    def test_acceptance_is_the_overlap_of_both_distributions(self):
        target, draft = self.pair()
        rounds, rng = [], np.random.default_rng(0)
        for _ in range(800):
            speculative_generate(draft, target, [1, 2], 2, k=1, temperature=1.0, rng=rng, on_round=rounds.append)
        first = [done.accepted for done in rounds if done.proposed]
        overlap = np.minimum(exact_pairs(target, [1, 2]).sum(1), exact_pairs(draft, [1, 2]).sum(1)).sum()
        assert len(first) == 800 and abs(np.mean(first) - overlap) < 0.05


def test_expected_tokens_is_the_geometric_sum():
    for a, k in itertools.product((0.0, 0.3, 0.8, 0.99), (1, 4, 9)):
        assert expected_tokens(a, k) == pytest.approx((1 - a ** (k + 1)) / (1 - a))
    assert expected_tokens(1, 7) == 8
