"""The KV cache against plain Python lists: every operation in any order, bitwise; all chunkings; all sizes."""

import itertools

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tinytorch.generation.kv_cache import (
    CacheStateError,
    KVCache,
    KVCacheConfig,
    LayerKVCache,
    create_kv_cache,
    memory_analysis,
    prefill,
)
from tinytorch.models.transformer import GPT

S, L, H, D = 7, 2, 2, 2


class CacheAgainstLists(RuleBasedStateMachine):
    """The model: for each layer and row a list of (key, value), each of shape (H, D); and the open pass."""

    @initialize(batch_size=st.integers(1, 3), dtype=st.sampled_from([np.float16, np.float32]), strict=st.booleans())
    def start(self, batch_size, dtype, strict):
        self.B, self.dtype, self.strict = batch_size, dtype, strict
        self.cache = KVCache(batch_size, S, L, H, D, dtype=dtype, strict=strict)
        self.nbytes = self.cache.nbytes
        self.stored = [[[] for _ in range(batch_size)] for _ in range(L)]
        self.drop()
        self.count = 0

    def drop(self):
        self.open, self.failed = {}, set()  # layer -> (n_new, T, keys, values); layers that were refused

    def lengths(self):
        return [len(row) for row in self.stored[0]]

    def chunk(self, seq_len):
        """Numbers that were never used before (and are exact in float16)."""
        shape = (2, self.B, H, seq_len, D)
        numbers = (self.count + 1 + np.arange(np.prod(shape))) % 2000 + 1
        self.count += int(np.prod(shape))
        return numbers.reshape(shape).astype(self.dtype)

    def expected(self, layer, rows):
        """What `rows` of tokens look like as arrays padded with zeros, key and value (B, H, longest, D)."""
        arrays = np.zeros((2, self.B, H, max(len(row) for row in rows), D), self.dtype)
        for b, row in enumerate(rows):
            for s, token in enumerate(row):
                arrays[:, b, :, s] = token
        return arrays

    def with_pending(self, layer):
        n_new, _, keys, values = self.open[layer]
        return [
            row + [(keys[b, :, t], values[b, :, t]) for t in range(n_new[b])]
            for b, row in enumerate(self.stored[layer])
        ]

    @rule(data=st.data(), layer=st.integers(0, L - 1))
    def update(self, data, layer):
        """A valid update: it joins the open pass, or opens one (after a failure, a written layer starts anew)."""
        restart = self.failed and layer in self.open
        if layer in self.open and not restart:
            return
        if restart:
            self.drop()
        if self.open:
            n_new, seq_len, _, _ = next(iter(self.open.values()))
        else:
            free = [S - length for length in self.lengths()]
            seq_len = data.draw(st.integers(1, 3))
            n_new = [data.draw(st.integers(0, min(seq_len, room))) for room in free]
        keys, values = self.chunk(seq_len)
        plain = all(count == seq_len for count in n_new) and data.draw(st.booleans())
        view = self.cache.update(layer, keys.copy(), values.copy(), n_new=None if plain else n_new)
        self.open[layer] = (n_new, seq_len, keys, values)
        self.failed.discard(layer)
        rows = self.with_pending(layer)
        key, value = self.expected(layer, rows)
        assert view.key.shape == key.shape and view.value.shape == value.shape
        np.testing.assert_array_equal(view.key.data, key)
        np.testing.assert_array_equal(view.value.data, value)
        longest = max(len(row) for row in rows)
        assert view.pos.tolist() == [[s if s < len(row) else -1 for s in range(longest)] for row in rows]

    @precondition(lambda self: self.open and not self.failed)
    @rule(data=st.data())
    def update_out_of_order(self, data):
        layer = data.draw(st.sampled_from(sorted(self.open)))
        n_new, seq_len, _, _ = self.open[layer]
        with pytest.raises(CacheStateError):
            self.cache.update(layer, *self.chunk(seq_len), n_new=n_new)
        others = [other for other in range(L) if other not in self.open]
        if others:
            with pytest.raises(CacheStateError):
                self.cache.update(others[0], *self.chunk(seq_len + 1), n_new=n_new)

    @rule(
        layer=st.integers(0, L - 1),
        kind=st.sampled_from(["nan", "rank", "batch", "heads", "dim", "length", "n_new"]),
    )
    def update_that_does_not_fit(self, layer, kind):
        keys, values = self.chunk(2)
        n_new = None
        if kind == "nan":
            values[-1, -1, -1, -1] = np.nan
        elif kind == "n_new":
            n_new = [3] * self.B
        elif kind == "rank":
            keys = keys[0]
        else:
            axis = {"batch": 0, "heads": 1, "length": 2, "dim": 3}[kind]
            keys = np.concatenate([keys, keys], axis=axis)
        with pytest.raises(ValueError):
            self.cache.update(layer, keys, values, n_new=n_new)
        self.failed |= {layer} if self.open else set()

    @rule(layer=st.integers(0, L - 1))
    def update_without_room(self, layer):
        with pytest.raises(ValueError, match="max_seq_len"):
            self.cache.update(layer, *self.chunk(S + 1 - min(self.lengths())))
        self.failed |= {layer} if self.open else set()

    @rule()
    def advance(self):
        if not self.open or (self.strict and len(self.open) < L):
            with pytest.raises(CacheStateError):
                self.cache.advance()
            return
        n_new = next(iter(self.open.values()))[0]
        zeros = (np.zeros((H, D)), np.zeros((H, D)))
        self.stored = [
            self.with_pending(layer) if layer in self.open
            else [row + [zeros] * n for row, n in zip(self.stored[layer], n_new)]
            for layer in range(L)
        ]
        self.cache.advance()
        self.drop()

    @rule()
    def abandon(self):
        self.cache.abandon()
        self.drop()

    @rule(data=st.data(), by_length=st.booleans())
    def forget(self, data, by_length):
        lengths = self.lengths()
        kept = [data.draw(st.integers(0, length)) for length in lengths]
        if by_length:
            self.cache.truncate(kept)
        else:
            self.cache.rollback([length - keep for length, keep in zip(lengths, kept)])
        self.stored = [[row[:keep] for row, keep in zip(layer, kept)] for layer in self.stored]
        self.drop()

    @rule(row=st.integers(0, 2))
    def forget_what_is_not_there(self, row):
        row %= self.B
        n = [0] * self.B
        n[row] = self.lengths()[row] + 1
        with pytest.raises(ValueError):
            self.cache.rollback(n)
        with pytest.raises(ValueError):
            self.cache.truncate([length + count for length, count in zip(self.lengths(), n)])

    @rule(data=st.data())
    def reorder(self, data):
        rows = [data.draw(st.integers(0, self.B - 1)) for _ in range(self.B)]
        self.cache.reorder(rows)
        self.stored = [[list(layer[row]) for row in rows] for layer in self.stored]
        self.drop()

    @rule(keep_clone=st.booleans())
    def clone(self, keep_clone):
        twin = self.cache.clone()
        if keep_clone:
            self.cache, twin = twin, self.cache
            self.drop()
        twin.reset()
        for layer in range(L):
            twin.update(layer, *self.chunk(1))
        twin.advance()

    @rule()
    def reset(self):
        self.cache.reset()
        self.stored = [[[] for _ in range(self.B)] for _ in range(L)]
        self.drop()

    @invariant()
    def everything_committed_is_what_the_lists_say(self):
        lengths = self.lengths()
        assert self.cache.seq_lens == lengths and self.cache.seq_pos == max(lengths)
        assert self.cache.nbytes == self.nbytes and self.cache.pending_layers == sorted(self.open)
        assert self.cache.positions(2).tolist() == [[length, length + 1] for length in lengths]
        for layer in range(L):
            key, value = self.cache.get(layer)
            expected = self.expected(layer, self.stored[layer])
            assert key.shape == value.shape == expected.shape[1:] and key.dtype == self.dtype
            np.testing.assert_array_equal(key.data, expected[0])
            np.testing.assert_array_equal(value.data, expected[1])

    @invariant()
    def what_is_no_token_is_zero(self):
        for layer, row in itertools.product(range(L), range(self.B)):
            pending = self.open[layer][0][row] if layer in self.open else 0
            beyond = self.cache._store[layer, :, row, :, self.lengths()[row] + pending :]
            assert beyond.shape[2] == S - self.lengths()[row] - pending and not beyond.any()


TestCacheAgainstLists = CacheAgainstLists.TestCase
TestCacheAgainstLists.settings = settings(
    max_examples=120, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
)


# ---- the model, cut into chunks in every possible way


def slow_attention(query, key, value):
    """Causal attention, one query at a time over a loop of its keys; no mask."""
    B, heads, T, dim = query.shape
    output = np.zeros((B, T, heads, dim))
    for b, h, t in np.ndindex(B, heads, T):
        shared = h // (heads // key.shape[1])
        scores = [sum(query[b, h, t, d] * key[b, shared, s, d] for d in range(dim)) for s in range(t + 1)]
        weights = [np.exp(score / dim**0.5) for score in scores]
        for s, weight in enumerate(weights):
            output[b, t, h] += weight / sum(weights) * value[b, shared, s]
    return output.reshape(B, T, heads * dim)


def slow_gpt(model, ids):
    """Logits (B, T, V) in float64, from the weights alone."""
    w = {name: array.astype(np.float64) for name, array in model.state_dict().items()}
    heads, shared, dim = model.num_heads, model.num_kv_heads, model.embed_dim // model.num_heads

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(x, name):
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * w[f"{name}.weight"] + w[f"{name}.bias"]

    x = w["token_embedding.weight"][ids] + w["position_embedding.weight"][: ids.shape[1]]
    for i in range(model.num_layers):
        packed = linear(norm(x, f"blocks.{i}.norm1"), f"blocks.{i}.attention.qkv_proj")
        packed = packed.reshape(*ids.shape, heads + 2 * shared, dim).swapaxes(1, 2)
        mixed = slow_attention(packed[:, :heads], packed[:, heads:-shared], packed[:, -shared:])
        x = x + linear(mixed, f"blocks.{i}.attention.out_proj")
        h = linear(norm(x, f"blocks.{i}.norm2"), f"blocks.{i}.mlp.up_proj")
        h = 0.5 * h * (1 + np.tanh((2 / np.pi) ** 0.5 * (h + 0.044715 * h**3)))
        x = x + linear(h, f"blocks.{i}.mlp.down_proj")
    return norm(x, "norm") @ w["head.weight"].T


def random_model(kv_heads, dtype, seed=0):
    rng = np.random.default_rng(seed)
    model = GPT(11, 16, 2, 4, 16, num_kv_heads=kv_heads, tie_weights=False, rng=rng)
    for parameter in model.parameters():
        noise = 0.3 * rng.standard_normal(parameter.shape)
        parameter.data = (noise if parameter.ndim > 1 else parameter.data + noise).astype(dtype)
    return model.eval()


def chunkings(total):
    """Every way to cut `total` tokens into chunks: 2 ** (total - 1) of them."""
    for cuts in itertools.product([False, True], repeat=total - 1):
        edges = [0, *(i + 1 for i, cut in enumerate(cuts) if cut), total]
        yield list(zip(edges, edges[1:]))


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("dtype, atol", [(np.float32, 3e-5), (np.float64, 1e-11)], ids=["float32", "float64"])
def test_every_chunking_gives_the_same_logits_at_every_position(batch_size, kv_heads, dtype, atol):
    model, ids = random_model(kv_heads, dtype), np.random.default_rng(1).integers(0, 11, (batch_size, 6))
    expected = slow_gpt(model, ids)
    cache = KVCache(batch_size, 16, 2, kv_heads, 4, dtype=dtype)
    tried = 0
    for chunks in chunkings(6):
        cache.reset()
        got = np.concatenate([model(ids[:, a:b], cache=cache).data for a, b in chunks], axis=1)
        assert got.shape == expected.shape == (batch_size, 6, 11) and got.dtype == dtype
        np.testing.assert_allclose(got, expected, atol=atol, err_msg=f"chunks {chunks}")
        assert cache.seq_lens == [6] * batch_size
        tried += 1
    assert tried == 32


@settings(max_examples=25, deadline=None)
@given(data=st.data(), chunk=st.integers(1, 9), kv_heads=st.sampled_from([1, 2, 4]), batch_size=st.integers(1, 4))
def test_ragged_rows_in_any_chunks_equal_their_own_runs(data, chunk, kv_heads, batch_size):
    lengths = [data.draw(st.integers(1, 8)) for _ in range(batch_size)]
    model, rng = random_model(kv_heads, np.float32, seed=kv_heads), np.random.default_rng(sum(lengths))
    ids = rng.integers(0, 11, (batch_size, max(lengths) + data.draw(st.integers(0, 2))))
    cache = KVCache(batch_size, 16, 2, kv_heads, 4)
    logits = prefill(model, ids, cache, chunk=chunk, n_new=lengths).data
    step = model(np.full((batch_size, 1), 5), cache=cache).data
    assert logits.shape == (*ids.shape, 11) and step.shape == (batch_size, 1, 11)
    for row, length in enumerate(lengths):
        alone = slow_gpt(model, np.append(ids[row, :length], 5)[None])[0]
        np.testing.assert_allclose(logits[row, :length], alone[:-1], atol=1e-4)
        np.testing.assert_allclose(step[row, 0], alone[-1], atol=1e-4)
    assert cache.seq_lens == [length + 1 for length in lengths]


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.tuples(*[st.integers(1, 5)] * 3, st.integers(1, 40), st.integers(1, 16)),
    dtype=st.sampled_from([np.float16, np.float32, np.float64]),
)
def test_predicted_bytes_equal_measured_bytes(sizes, dtype):
    batch_size, layers, heads, tokens, dim = sizes
    config = KVCacheConfig(layers, tokens, heads, dim, batch_size, dtype)
    cache = KVCache.from_config(config)
    other = create_kv_cache(batch_size, tokens, layers, heads, dim, dtype=dtype)
    expected = 2 * batch_size * layers * heads * tokens * dim * np.dtype(dtype).itemsize
    assert config.calculate_size() == cache.nbytes == other.nbytes == expected
    analysed = memory_analysis(layers, heads * 3, dim, batch_size, tokens, num_kv_heads=heads, dtype=dtype)
    assert analysed["total_bytes"] == expected and analysed["total_GB"] == expected / 1e9
    usage = cache.get_memory_usage()
    assert usage["total_bytes"] == expected and usage["total_mb"] == expected / 2**20
    assert usage["cache_tensors"] == 2 * layers


@settings(max_examples=40, deadline=None)
@given(data=st.data(), batch_size=st.integers(1, 3))
def test_a_layer_cache_against_lists(data, batch_size):
    cache, rows, count = LayerKVCache(batch_size, 9, H, D), [[] for _ in range(batch_size)], 0
    for _ in range(data.draw(st.integers(1, 5))):
        seq_len = data.draw(st.integers(1, 4))
        n_new = [data.draw(st.integers(0, seq_len)) for _ in rows]
        keys = np.arange(batch_size * H * seq_len * D, dtype=np.float32).reshape(batch_size, H, seq_len, D) + count
        count += keys.size
        if any(len(row) + n > 9 for row, n in zip(rows, n_new)):
            with pytest.raises(ValueError, match="max_seq_len"):
                cache.update(keys, -keys, n_new=n_new)
        else:
            cache.update(keys, -keys, n_new=n_new)
            rows = [row + [keys[b, :, t] for t in range(n)] for b, (row, n) in enumerate(zip(rows, n_new))]
        if data.draw(st.booleans()):
            kept = [data.draw(st.integers(0, len(row))) for row in rows]
            cache.seq_lens = kept
            rows = [row[:keep] for row, keep in zip(rows, kept)]
        assert cache.seq_lens == [len(row) for row in rows]
        for b, row in enumerate(rows):
            key, value = cache.get_kv(b)
            assert key.shape == value.shape == (H, len(row), D)
            for t, token in enumerate(row):
                np.testing.assert_array_equal(key[:, t], token)
                np.testing.assert_array_equal(value[:, t], -token)
