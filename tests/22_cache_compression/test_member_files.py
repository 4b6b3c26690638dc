"""Files of caches that forget or compress: they go on bit by bit; arrays that no passes lead to change nothing.

Oracles: the cache that was never saved, and one fault at a time in a good file. What holds for every member of the
family, these too, is tested in lesson 23's contract.
"""

import numpy as np
import pytest

from tinytorch.core.training import load_checkpoint, save_checkpoint
from tinytorch.generation.cache_compression import (
    HeavyHitterKVCache,
    QuantizedModelKVCache,
    SlidingWindowKVCache,
    load_cache,
    save_cache,
)
from tinytorch.generation.kv_cache import KVCache, enable_kv_cache, prefill, random_gpt

SIZES = (2, 40, 3, 2, 8)  # what random_gpt() stores, for two rows
KINDS = {
    "window": (SlidingWindowKVCache, {"window": 4, "sinks": 2, "spare": 1}),
    "eviction": (HeavyHitterKVCache, {"budget": 6, "recent": 2}),
    "quantised": (QuantizedModelKVCache, {"bits": 4, "key_axis": "channel", "group_size": 4}),
    "quantised, per token": (QuantizedModelKVCache, {"bits": 2, "group_size": 8}),
}
kinds = pytest.mark.parametrize("kind", KINDS)


def make(kind, **options):
    factory, own = KINDS[kind]
    return factory(*SIZES, **{**own, **options})


def read(kind, seed=0, lengths=(11, 4)):
    """A cache that a model has filled; the shorter row is shorter than a window or a budget."""
    cache, ids = make(kind), np.random.default_rng(seed).integers(0, 64, (2, max(lengths)))
    prefill(random_gpt(), ids, cache, chunk=3, n_new=list(lengths))
    return cache


def content(cache):
    """All that it holds, and its lengths."""
    return {name: array.tobytes() for name, array in cache._arrays().items()}, cache.seq_lens, cache.pending_layers


@pytest.fixture
def path(tmp_path):
    return tmp_path / "chat.safetensors"


@kinds
def test_a_model_goes_on_bit_by_bit_for_a_long_time(kind, path):
    model, ids, cache = random_gpt(), np.random.default_rng(1).integers(0, 64, (2, 24)), read(kind)
    save_cache(cache, path)
    loaded = load_cache(path, read(kind, seed=2, lengths=(3, 9)))
    for start, stop in ((0, 1), (1, 6), *((t, t + 1) for t in range(6, 24))):
        got, expected = (model(ids[:, start:stop], cache=each).numpy() for each in (loaded, cache))
        assert got.shape == (2, stop - start, 64)
        np.testing.assert_array_equal(got, expected)
    assert content(loaded) == content(cache) and loaded.seq_lens == [35, 28]


def test_scores_go_on_too(path):
    save_cache(cache := read("eviction"), path)
    loaded = load_cache(path, make("eviction"))
    for layer in range(3):
        assert cache.scores(layer).max() > 0
        np.testing.assert_array_equal(loaded.scores(layer), cache.scores(layer))
        np.testing.assert_array_equal(loaded.residents(layer), cache.residents(layer))


def test_generation_from_a_file_that_an_enabled_model_loads(path):
    model, prompt = random_gpt(), np.arange(12).reshape(2, 6)
    save_cache(read("quantised"), path)
    cache = enable_kv_cache(model, cache=load_cache(path, make("quantised")))
    assert np.isfinite(model(prompt[:, :1]).numpy()).all() and cache.seq_lens == [12, 5]


@pytest.mark.parametrize("kind, options", [
    ("window", {"window": 5}), ("window", {"sinks": 1, "window": 5}), ("window", {"window": 5, "spare": 0}),
    ("window", {"renumber": True}), ("eviction", {"recent": 3}), ("eviction", {"budget": 7}),
    ("quantised", {"bits": 8}), ("quantised", {"key_axis": "token"}), ("quantised", {"group_size": 8}),
    ("quantised, per token", {"bits": 4}), ("window", {"dtype": np.float16}),
])
def test_other_options_are_refused_and_both_are_named(kind, options, path):
    save_cache(make(kind, **options), path)
    cache = read(kind)
    before, (name, value) = content(cache), next(iter(options.items()))
    words = "float16" if name == "dtype" else f"{name}={value!r}.*{name}={KINDS[kind][1].get(name, False)!r}"
    with pytest.raises(ValueError, match=f"chat.safetensors does not fit.*{words}"):
        load_cache(path, cache)
    assert content(cache) == before


@kinds
def test_files_do_not_go_from_or_to_a_cache_that_keeps_tokens_and_a_new_cache_must_be_given(kind, path):
    cache, plain = read(kind), KVCache(*SIZES)
    before = content(cache)
    save_cache(plain, path)
    with pytest.raises(ValueError, match=f"tokens as they came.*{type(cache).__name__}"):
        load_cache(path, cache)
    save_cache(cache, path)
    with pytest.raises(ValueError, match=f"{type(cache).__name__}.*tokens as they came"):
        load_cache(path, plain)
    with pytest.raises(ValueError, match=f"{type(cache).__name__}.*load_cache"):
        load_cache(path)
    assert content(cache) == before and plain.seq_lens == [0, 0]


@pytest.mark.parametrize("into", [11, 64, None])
def test_a_window_takes_a_file_of_another_max_seq_len_if_the_tokens_fit(into, path):
    save_cache(cache := read("window"), path)
    loaded = load_cache(path, SlidingWindowKVCache(2, into, *SIZES[2:], **KINDS["window"][1]))
    assert content(loaded) == content(cache) and loaded.capacity == into
    with pytest.raises(ValueError, match="11 tokens.*max_seq_len=10"):
        load_cache(path, SlidingWindowKVCache(2, 10, *SIZES[2:], **KINDS["window"][1]))


def put(name, where, value):
    """A fault: another value in one place of one array."""
    def change(state):
        state[name][where] = value

    return name, change


# Row 0 has 11 tokens: slots 0 and 1 hold the sinks, slots 2 to 6 positions 7 8 9 10 6. Row 1 has 4: slots 0 to 3.
FAULTS = {
    "window": {
        "a position twice": put("positions", (slice(None), 0, 2), 8),
        "a sink in the ring": put("positions", (slice(None), 0, 2), 0),
        "a token in another's slot": put("positions", (slice(None), 0, slice(2, 4)), [8, 7]),
        "a position that is not stored yet": put("positions", (slice(None), 1, 4), 4),
        "a position below -1": put("positions", (slice(None), 1, 5), -5),
        "a visible token is missing": put("positions", (slice(None), 0, 5), -1),
        "a sink is missing": put("positions", (slice(None), 0, 1), -1),
        "layers differ": put("positions", (1, 0, 6), -1),
        "a number without a token": put("store", (0, 1, 1, 0, 6, 0), 1.0),
        "a longer row": put("lengths", 1, 9), "a shorter row": put("lengths", 0, 10),
        "no tokens, says the file": put("lengths", slice(None), 0), "more than max_seq_len": put("lengths", 0, 41),
        "inf": put("store", (2, 1, 0, 1, 3, 7), np.inf),
    },
    "eviction": {
        "a position twice": put("positions", (0, 0, slice(0, 2)), 3),
        "the newest is gone": put("positions", (2, 0), np.arange(6)),
        "a position that is not stored yet": put("positions", (0, 1, 0), 4),
        "a position below -1": put("positions", (0, 1, 5), -2),
        "fewer tokens than there is room for": put("positions", (1, 1, 3), -1),
        "a number without a token": put("store", (0, 0, 1, 0, 5, 0), 1.0),
        "a longer row": put("lengths", 1, 5), "a shorter row": put("lengths", 0, 10),
        "a score that is not a number": put("scores", (0, 0, 0), np.nan),
    },
    "quantised": {
        "codes beyond the length": put("2.key.codes", (1, 0, 1, 3), 1),
        "a scale beyond the length": put("0.value.scale", (1, 1, 4, 0), 0.5),
        "a low beyond the length": put("0.value.low", (1, 1, 4, 0), 0.5),
        "a token that waits beyond the length": put("1.key.waiting", (1, 0, 0, 0), 1.0),
        "a scale of inf": put("0.key.scale", (0, 0, 0, 0), np.inf),
        "a low of NaN": put("1.value.low", (0, 0, 0, 0), np.nan),
        "a shorter row": put("lengths", 0, 9), "more than max_seq_len": put("lengths", 0, 41),
        "below zero": put("lengths", 1, -1),
    },
}


@pytest.mark.parametrize("kind, fault", [(kind, fault) for kind, faults in FAULTS.items() for fault in faults])
def test_arrays_that_no_passes_lead_to_are_refused_and_the_cache_as_before(kind, fault, path):
    save_cache(read(kind), path)
    state, metadata = load_checkpoint(path)
    name, change = FAULTS[kind][fault]
    change(state)
    save_checkpoint(path, state, metadata)
    cache = read(kind, seed=2, lengths=(7, 8))
    cache.update(1, *np.ones((2, 2, 2, 1, 8)))
    before = content(cache)
    with pytest.raises(ValueError, match="chat.safetensors does not fit"):
        load_cache(path, cache)
    assert content(cache) == before and before[2] == [1]


@kinds
def test_a_load_that_is_interrupted_leaves_the_cache_as_it_was(kind, path, monkeypatch):
    save_cache(read(kind), path)
    cache, right, calls = read(kind, seed=2, lengths=(7, 8)), KINDS[kind][0]._replace, []
    before = content(cache)

    def stop_once(self, arrays, lengths):
        calls.append(lengths)
        if len(calls) == 1:
            next(iter(self._arrays().values()))[...] = 1
            raise KeyboardInterrupt
        right(self, arrays, lengths)

    monkeypatch.setattr(KINDS[kind][0], "_replace", stop_once)
    with pytest.raises(KeyboardInterrupt):
        load_cache(path, cache)
    assert content(cache) == before and len(calls) == 2


@kinds
def test_ctrl_c_in_a_commit_ends_the_forward_pass_and_the_cache_says_so_until_reset(kind, monkeypatch):
    model, ids, cache, right = random_gpt(), np.arange(12).reshape(2, 6), read(kind), KINDS[kind][0]._take_in

    def take_in(self, layer_idx, *chunk):
        if layer_idx == 1:
            raise KeyboardInterrupt
        right(self, layer_idx, *chunk)

    with monkeypatch.context() as patch:
        patch.setattr(KINDS[kind][0], "_take_in", take_in)
        with pytest.raises(KeyboardInterrupt):
            model(ids, cache=cache)
    for call in (lambda: model(ids, cache=cache), lambda: cache.get(0), cache.clone, lambda: save_cache(cache, "none")):
        with pytest.raises(ValueError, match=r"interrupted.*reset\(\)"):
            call()
    cache.reset()
    np.testing.assert_array_equal(model(ids, cache=cache).numpy(), model(ids, cache=make(kind)).numpy())
