"""Eviction by received attention against plain lists of tokens, and against attention over everything."""

import itertools

import numpy as np
import pytest

from tinytorch.core.tensor import Tensor
from tinytorch.generation.cache_compression import HeavyHitterKVCache, attention_received
from tinytorch.generation.kv_cache import CacheStateError, KVCache, enable_kv_cache, prefill, random_gpt


class ListModel:
    """One layer and row: a list of [position, key, value, score]; a token that goes is deleted from it."""

    def __init__(self, budget, recent):
        self.budget, self.recent, self.tokens, self.length = budget, recent, [], 0

    def commit(self, keys, values, seen):
        """keys and values: lists of (H, D) arrays; seen: position -> attention received in this pass."""
        for key, value in zip(keys, values):
            self.tokens.append([self.length, key, value, 0.0])
            self.length += 1
        for token in self.tokens:
            token[3] += seen.get(token[0], 0.0)
        while len(self.tokens) > self.budget:
            older = self.tokens[: -self.recent]
            worst = min(token[3] for token in older)
            self.tokens.remove([token for token in older if token[3] == worst][-1])  # in a tie, the younger one


def pass_of(cache, models, rng, n_new, seq_len, layers):
    """One pass with random weights, on the cache and on models[layer][row]."""
    B, H, D = cache.batch_size, cache.num_heads, cache.head_dim
    skipped = set(range(cache.num_layers)) - set(layers)
    for layer in range(cache.num_layers):
        chunk = rng.standard_normal((2, B, H, seq_len, D)) * (layer not in skipped)
        weights, pos = rng.random((B, 3, seq_len, 0)), None
        if layer not in skipped:
            view = cache.update(layer, *chunk, n_new=n_new)
            pos = view.pos
            weights = rng.random((B, 3, seq_len, pos.shape[1])) * (pos >= 0)[:, None, None]
            cache.observe(layer, Tensor(weights, dtype=np.float64) if rng.random() < 0.5 else weights)
        for row, model in enumerate(models[layer]):
            seen = {}
            for s in range(weights.shape[3]):
                seen[int(pos[row, s])] = sum(weights[row, h, t, s] for h in range(3) for t in range(n_new[row]))
            model.commit(*(list(part[row].swapaxes(0, 1)[: n_new[row]]) for part in chunk), seen)
    cache.advance()


def assert_equal_to(cache, models):
    for layer, rows in enumerate(models):
        places, scores, (key, value) = cache.residents(layer), cache.scores(layer), cache.get(layer)
        longest = max(len(model.tokens) for model in rows)
        assert places.shape == scores.shape == (cache.batch_size, longest) and key.shape[2] == longest
        for row, model in enumerate(rows):
            count = len(model.tokens)
            assert places[row].tolist() == [token[0] for token in model.tokens] + [-1] * (longest - count)
            np.testing.assert_allclose(scores[row, :count], [token[3] for token in model.tokens], rtol=1e-12)
            assert not scores[row, count:].any()
            for part, index in ((key, 1), (value, 2)):
                assert not part.data[row, :, count:].any()
                for s, token in enumerate(model.tokens):
                    np.testing.assert_array_equal(part.data[row, :, s], token[index])
    assert cache.seq_lens == [model.length for model in models[0]]


class TestAgainstLists:
    @pytest.mark.parametrize("budget, recent", [(1, 1), (4, 1), (6, 3), (5, 5), (40, 2)])
    @pytest.mark.parametrize("seed", range(4))
    def test_who_stays_with_which_score_in_every_layer_and_row(self, budget, recent, seed):
        rng = np.random.default_rng(seed)
        cache = HeavyHitterKVCache(3, None, 2, 2, 3, budget, recent, dtype=np.float64)
        models = [[ListModel(budget, recent) for _ in range(3)] for _ in range(2)]
        for step in range(25):
            seq_len = int(rng.choice([1, 1, 1, 2, 9]))
            layers = [int(rng.integers(2))] if step % 6 == 5 else [0, 1]
            pass_of(cache, models, rng, rng.integers(0, seq_len + 1, 3).tolist(), seq_len, layers)
            assert_equal_to(cache, models)
            if step == 12:
                cache.truncate([0, cache.seq_lens[1], cache.seq_lens[2]])
                for rows in models:
                    rows[0] = ListModel(budget, recent)
                assert_equal_to(cache, models)
        if budget == 6:
            held = [[token[0] for token in model.tokens] for rows in models for model in rows]
            assert held[:3] != held[3:], "each layer chooses for itself"
            assert any(tokens != list(range(tokens[0], tokens[0] + len(tokens))) for tokens in held)

    def test_rows_and_scores_go_together(self):
        rng = np.random.default_rng(0)
        cache = HeavyHitterKVCache(2, None, 1, 1, 2, 4, 1, dtype=np.float64)
        models = [[ListModel(4, 1), ListModel(4, 1)]]
        pass_of(cache, models, rng, [7, 2], 7, [0])
        cache.reorder([1, 0])
        twin, models[0] = cache.clone(), models[0][::-1]
        assert_equal_to(cache, models)
        assert_equal_to(twin, models)
        pass_of(cache, models, rng, [3, 1], 3, [0])
        assert_equal_to(cache, models)
        assert twin.seq_lens == [2, 7], "the clone has scores and tokens of its own"


class TestAgainstFullAttention:
    @pytest.mark.parametrize("chunk", [1, 3, 12])
    @pytest.mark.parametrize("budget", [12, 30])
    def test_a_budget_for_the_whole_text_is_the_full_cache(self, budget, chunk):
        model, ids = random_gpt(), np.random.default_rng(1).integers(0, 64, (2, 12))
        full = KVCache(2, 64, 3, 2, 8)
        expected = prefill(model, ids, full, chunk=chunk).data
        cache = enable_kv_cache(model, factory=HeavyHitterKVCache, batch_size=2, budget=budget)
        got = np.concatenate([model(ids[:, t : t + chunk]).data for t in range(0, 12, chunk)], axis=1)
        assert got.shape == expected.shape == (2, 12, 64)
        np.testing.assert_allclose(got, expected, rtol=0, atol=2e-5)
        for layer, part in itertools.product(range(3), range(2)):
            np.testing.assert_allclose(cache.get(layer)[part].data, full.get(layer)[part].data, atol=2e-5)
        np.testing.assert_allclose(cache.scores(1).sum(axis=1), 12 * 4, rtol=1e-5, err_msg="1 per query and head")

    def test_generate_under_a_small_budget_keeps_its_memory_and_says_the_same_each_time(self):
        model = random_gpt()
        cache = enable_kv_cache(model, factory=HeavyHitterKVCache, budget=6, recent=2)
        nbytes, first = cache.nbytes, model.generate([1, 2, 3, 4], 40)
        assert first == model.generate([1, 2, 3, 4], 40) and len(first) == 44
        assert cache.nbytes == nbytes and cache.seq_lens == [43]
        for layer in range(3):
            assert cache.residents(layer).shape == (1, 6) and cache.residents(layer)[0, -2:].tolist() == [41, 42]

    @pytest.mark.parametrize("hit", [0, 3, 17])
    @pytest.mark.parametrize("chunks", [[1] * 60, [40] + [1] * 20, [20] * 3])
    def test_a_planted_key_is_never_evicted_and_the_newest_never_at_once(self, hit, chunks):
        cache = HeavyHitterKVCache(1, None, 1, 1, 1, budget=5, recent=2)
        start = 0
        for count in chunks:
            key = np.arange(start, start + count, dtype=np.float32)[None, None, :, None]
            view = cache.update(0, key, key)
            planted = view.pos[0] == hit
            weights = np.full((1, 1, count, view.pos.shape[1]), 1e-3, np.float32)
            weights[0, 0, :, planted] = 1
            cache.observe(0, weights)
            cache.advance()
            start += count
            held = cache.residents()[0].tolist()
            newest = list(range(max(0, start - 2), start))
            assert held[-len(newest):] == newest
            assert hit in held or start <= hit
        assert len(held) == 5 and hit in cache.get(0)[0].data


class TestWhatIsObserved:
    def start(self, **options):
        cache = HeavyHitterKVCache(1, None, 2, 1, 2, budget=4, **options)
        view = cache.update(0, np.ones((1, 1, 2, 2)), np.ones((1, 1, 2, 2)))
        return cache, view

    def test_a_pass_that_nobody_observed_is_not_committed(self):
        cache, _ = self.start()
        cache.update(1, np.ones((1, 1, 2, 2)), np.ones((1, 1, 2, 2)))
        cache.observe(1, np.full((1, 1, 2, 2), 0.5))
        with pytest.raises(CacheStateError, match=r"layers \[0\].*observe.*self\.attend"):
            cache.advance()
        assert cache.seq_lens == [0] and cache.pending_layers == [0, 1]
        cache.observe(0, np.full((1, 3, 2, 2), 0.5))
        cache.advance()
        assert cache.seq_lens == [2] and cache.scores(0).tolist() == [[3, 3]] and cache.scores(1).tolist() == [[1, 1]]

    def test_attention_that_does_not_report_is_told_so(self):
        model = random_gpt()
        cache = enable_kv_cache(model, factory=HeavyHitterKVCache, budget=4)
        for block in model.blocks:
            block.attention.attend = block.attention.part.attend  # goes past the stand-in
        with pytest.raises(CacheStateError, match="CachedAttention"):
            model(np.array([[1, 2]]))
        assert cache.seq_lens == [0]

    @pytest.mark.parametrize("weights", [
        np.ones((1, 1, 2, 3)), np.ones((1, 1, 1, 2)), np.ones((2, 1, 2, 2)), np.ones((1, 2, 2)), np.ones(()),
        np.full((1, 1, 2, 2), np.nan), np.full((1, 1, 2, 2), np.inf), np.ones((1, 1, 2, 2), bool),
        np.array([[[["a", "b"]] * 2]]),
    ], ids=repr)
    def test_weights_of_another_view_are_refused(self, weights):
        cache, _ = self.start()
        with pytest.raises(ValueError, match="weights"):
            cache.observe(0, weights)
        with pytest.raises(CacheStateError):
            cache.advance()
        cache.observe(0, np.ones((1, 1, 2, 2)))
        cache.advance()
        assert cache.scores().tolist() == [[2, 2]]

    def test_it_is_said_once_and_between_update_and_advance(self):
        cache, _ = self.start()
        with pytest.raises(CacheStateError, match="observe"):
            cache.observe(1, np.ones((1, 1, 2, 2)))
        cache.observe(0, np.ones((1, 1, 2, 2)))
        with pytest.raises(CacheStateError, match="once"):
            cache.observe(0, np.ones((1, 1, 2, 2)))
        cache.advance()
        with pytest.raises(CacheStateError):
            cache.observe(0, np.ones((1, 1, 2, 2)))

    def test_what_was_observed_of_a_failed_pass_is_forgotten(self):
        cache, _ = self.start()
        cache.observe(0, np.ones((1, 1, 2, 2)))
        cache.abandon()
        cache.update(0, np.ones((1, 1, 2, 2)), np.ones((1, 1, 2, 2)))
        with pytest.raises(CacheStateError, match="observe"):
            cache.advance()
        cache.observe(0, np.full((1, 1, 2, 2), 0.25))
        cache.advance()
        assert cache.scores().tolist() == [[0.5, 0.5]]

    def test_padding_queries_say_nothing(self):
        weights = np.ones((2, 3, 4, 5), np.float32)
        assert attention_received(weights, [4, 1]).tolist() == [[12.0] * 5, [3.0] * 5]
        assert attention_received(weights, [0, 2]).tolist() == [[0.0] * 5, [6.0] * 5]

    def test_a_slot_that_is_taken_has_its_new_tokens_score(self):
        cache = HeavyHitterKVCache(1, None, 1, 1, 1, budget=2, recent=1)
        for token, row in enumerate([[5.0], [0.0, 1.0], [0.0, 0.0, 0.5], [0.0, 0.0, 9.0]]):
            cache.update(0, np.full((1, 1, 1, 1), token), np.full((1, 1, 1, 1), token))
            cache.observe(0, np.array(row)[None, None, None])
            cache.advance()
        assert cache.residents().tolist() == [[0, 3]] and cache.scores().tolist() == [[5.0, 9.0]]


class TestTheWayBack:
    def test_a_part_of_a_row_cannot_be_forgotten_and_nothing_changes(self):
        cache = HeavyHitterKVCache(2, None, 1, 1, 1, budget=9)
        cache.update(0, np.ones((2, 1, 3, 1)), np.ones((2, 1, 3, 1)), n_new=[3, 2])
        cache.observe(0, np.ones((2, 1, 3, 3)))
        cache.advance()
        cache.update(0, np.ones((2, 1, 1, 1)), np.ones((2, 1, 1, 1)))
        for call in (lambda: cache.rollback(1), lambda: cache.truncate([3, 1]), lambda: cache.rollback([3, 1])):
            with pytest.raises(NotImplementedError, match=r"scores.*clone\(\).*SlidingWindowKVCache"):
                call()
        assert cache.seq_lens == [3, 2] and cache.pending_layers == [0]
        assert cache.scores().tolist() == [[3, 3, 3], [2, 2, 0]]
        cache.rollback(0)
        assert cache.pending_layers == [] and cache.residents().tolist() == [[0, 1, 2], [0, 1, -1]]
        cache.rollback([3, 0])
        assert cache.seq_lens == [0, 2] and cache.scores().tolist() == [[0, 0], [2, 2]]

    def test_speculation_works_on_clones(self):
        model = random_gpt()
        cache = HeavyHitterKVCache(1, None, 3, 2, 8, budget=4)
        model(np.array([[1, 2, 3, 4, 5, 6]]), cache=cache)
        attempt = cache.clone()
        model(np.array([[7, 8]]), cache=attempt)
        fresh = HeavyHitterKVCache(1, None, 3, 2, 8, budget=4)
        model(np.array([[1, 2, 3, 4, 5, 6]]), cache=fresh)
        got, expected = (model(np.array([[9]]), cache=each).data for each in (cache, fresh))
        np.testing.assert_array_equal(got, expected)
        assert attempt.seq_lens == [8] and cache.seq_lens == [7]


@pytest.mark.parametrize("options, name", [
    ({"budget": 0}, "budget"), ({"budget": 2.0}, "budget"), ({"budget": 4, "recent": 5}, "recent"),
    ({"budget": 4, "recent": 0}, "recent"), ({"budget": 4, "recent": True}, "recent")])
def test_budget_and_recent_are_whole_numbers_that_fit(options, name):
    with pytest.raises(ValueError, match=name):
        HeavyHitterKVCache(1, None, 1, 1, 1, **options)


def test_half_of_the_budget_is_recent_unless_told():
    assert [HeavyHitterKVCache(1, None, 1, 1, 1, budget=budget).recent for budget in (1, 2, 7)] == [1, 1, 3]
