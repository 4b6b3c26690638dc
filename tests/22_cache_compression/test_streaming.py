"""A Llama that streams on a renumbered window, against a loop that keeps plain keys in lists and turns them anew."""

import copy

import numpy as np
import pytest

from tinytorch.core.autograd import no_grad
from tinytorch.generation.cache_compression import SlidingWindowKVCache, load_cache, save_cache
from tinytorch.generation.kv_cache import enable_kv_cache, prefill
from tinytorch.models.llama import Llama

V, L, H, H_KV, D, THETA, EPS, LONGEST = 17, 2, 4, 2, 6, 300.0, 1e-5, 64


def streaming_llama(seed=0, **options):
    """A Llama in evaluation mode whose weights are large enough that one wrong key shows."""
    sizes = dict(vocab_size=V, embed_dim=16, num_layers=L, num_heads=H, max_seq_len=LONGEST, num_kv_heads=H_KV,
                 head_dim=D, hidden_dim=20, rope_theta=THETA, norm_eps=EPS, attention_bias=True)
    model = Llama(**sizes, **{"keys_before_rotation": True, **options}, rng=np.random.default_rng(seed))
    rng = np.random.default_rng(seed + 1)
    for parameter in model.parameters():
        parameter.data += 0.3 * rng.standard_normal(parameter.shape, dtype=np.float32)
    return model.eval()


def turn(head, place):
    """One head's numbers (D,), turned: halves are pairs."""
    arrows = head[: D // 2] + 1j * head[D // 2 :]
    arrows = arrows * np.exp(1j * place * THETA ** (-2 * np.arange(D // 2) / D))
    return np.concatenate([arrows.real, arrows.imag])


class Stream:
    """The oracle, one row: float64, loops, and for each layer a list of (plain keys, values), (H_kv, D) each."""

    def __init__(self, model, window, sinks):
        self.weights = {name: array.astype(np.float64) for name, array in model.state_dict().items()}
        self.window, self.sinks, self.lists = window, sinks, [[] for _ in range(L)]

    def linear(self, x, name):
        return x @ self.weights[f"{name}.weight"].T + self.weights.get(f"{name}.bias", 0)

    def norm(self, x, name):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + EPS) * self.weights[f"{name}.weight"]

    def run(self, ids):
        """Logits (T, V) of one pass; places are counted when it begins, in the list of those that are still seen."""
        x = self.weights["token_embedding.weight"][ids]
        for layer, name in enumerate(f"blocks.{i}" for i in range(L)):
            packed = self.linear(self.norm(x, f"{name}.norm1"), f"{name}.attention.qkv_proj").reshape(len(ids), -1, D)
            mixed = self.attend(self.lists[layer], packed)
            x = x + self.linear(mixed.reshape(len(ids), H * D), f"{name}.attention.out_proj")
            seen = self.norm(x, f"{name}.norm2")
            gate, up = (self.linear(seen, f"{name}.mlp.{part}_proj") for part in ("gate", "up"))
            x = x + self.linear(gate / (1 + np.exp(-gate)) * up, f"{name}.mlp.down_proj")
        return self.linear(self.norm(x, "norm"), "head")

    def attend(self, stored, packed):
        start, mixed = len(stored), np.zeros((len(packed), H, D))
        stored += [(part[H : H + H_KV], part[H + H_KV :]) for part in packed]
        held = [p for p in range(len(stored)) if p < self.sinks or p > start - self.window]
        for t, h in np.ndindex(len(packed), H):
            now = start + t
            looked_at = [p for p in held if p <= now and (p < self.sinks or p > now - self.window)]
            query = turn(packed[t, h], held.index(now))
            shared = h // (H // H_KV)
            scores = [query @ turn(stored[p][0][shared], held.index(p)) / D**0.5 for p in looked_at]
            weights = np.exp(scores - np.max(scores))
            mixed[t, h] = weights / weights.sum() @ [stored[p][1][shared] for p in looked_at]
        return mixed

    def cut(self, length):
        for stored in self.lists:
            del stored[length:]


class Both:
    """A model on a cache of B rows, beside one oracle for each row; `run` compares every logit."""

    def __init__(self, window, sinks, batch_size=2, **options):
        self.model = streaming_llama()
        self.cache = SlidingWindowKVCache(batch_size, None, L, H_KV, D, window, sinks, renumber=True, **options)
        self.rows = [Stream(self.model, window, sinks) for _ in range(batch_size)]
        self.rng = np.random.default_rng(window)

    def run(self, seq_len, n_new=None):
        ids = self.rng.integers(0, V, (len(self.rows), seq_len))
        lengths = [len(row.lists[0]) for row in self.rows]
        counts = [seq_len] * len(self.rows) if n_new is None else n_new
        with no_grad():
            got = prefill(self.model, ids, self.cache, n_new=n_new).numpy()
        assert got.shape == (len(self.rows), seq_len, V)
        assert self.cache.seq_lens == [length + count for length, count in zip(lengths, counts)]
        for row, count in enumerate(counts):
            if count:
                expected = self.rows[row].run(ids[row, :count])
                np.testing.assert_allclose(got[row, :count], expected, rtol=0, atol=1e-4, err_msg=f"row {row}")


@pytest.mark.parametrize("sinks", [0, 1, 4])
@pytest.mark.parametrize("window", [1, 3, 6])
class TestAgainstLists:
    def test_token_by_token_far_beyond_the_table(self, window, sinks):
        both = Both(window, sinks, batch_size=1)
        for _ in range(LONGEST + 12):
            both.run(1)

    def test_ragged_prompts_in_chunks_then_tokens(self, window, sinks):
        both = Both(window, sinks, batch_size=3)
        for chunk in ([7, 2, 1], [5, 0, 1], [1, 1, 1], [4, 9, 2], [1, 1, 1], [1, 1, 1]):
            both.run(max(chunk), chunk)

    def test_on_after_a_rollback(self, window, sinks):
        both = Both(window, sinks, spare=3)
        for steps in ((20, [4, 2]), (6, [0, 4]), (5, [1, 0])):
            for _ in range(steps[0]):
                both.run(1)
            both.cache.rollback(steps[1])
            for row, length in zip(both.rows, both.cache.seq_lens):
                row.cut(length)
        both.run(3)

    def test_on_after_reorder_and_from_a_file(self, window, sinks, tmp_path):
        both = Both(window, sinks, batch_size=3)
        both.run(15, [15, 4, 9])
        both.cache.reorder([2, 0, 2])
        both.rows = [copy.deepcopy(both.rows[row]) for row in (2, 0, 2)]
        both.run(1)
        save_cache(both.cache, tmp_path / "stream")
        both.cache = load_cache(tmp_path / "stream", Both(window, sinks, batch_size=3).cache)
        both.run(1)
        both.cache = both.cache.clone()
        both.run(4, [4, 1, 2])


class TestTheStream:
    def test_1000_tokens_in_constant_memory_at_positions_that_stay_small(self):
        model, window, sinks, seen = streaming_llama(), 20, 4, []
        cache = enable_kv_cache(model, factory=SlidingWindowKVCache, max_seq_len=None, window=window, sinks=sinks,
                                renumber=True)
        nbytes, rotary, plain = cache.nbytes, model.position_embedding.part, model.position_embedding.part.rotate
        rotary.rotate = lambda x, positions=None: seen.append(np.max(positions)) or plain(x, positions)
        cache.check_model(model)  # the watched one
        ids = np.random.default_rng(0).integers(0, V, (1, 1000))
        with no_grad():
            for t in range(0, 1000, 5):
                model(ids[:, t : t + 5])
        assert cache.seq_lens == [1000] and cache.nbytes == nbytes == 2 * L * H_KV * D * 4 * (window + sinks)
        assert len(seen) == 200 * L * 2, "queries and keys, of every layer and pass"
        assert max(seen) < window + sinks + 5 and len(rotary.table) <= LONGEST

    def test_absolute_positions_end_at_the_table(self):
        model = streaming_llama(keys_before_rotation=False)
        cache = enable_kv_cache(model, factory=SlidingWindowKVCache, max_seq_len=None, window=5)
        prefill(model, np.zeros((1, LONGEST), int), cache, chunk=8)
        with pytest.raises(ValueError, match="max_seq_len"):
            model([[1]])
        assert cache.seq_lens == [LONGEST]

    def test_a_window_as_long_as_the_text_is_the_plain_model(self):
        model, plain = streaming_llama(), streaming_llama(keys_before_rotation=False)
        ids = np.random.default_rng(3).integers(0, V, (2, 30))
        expected = plain(ids).numpy()
        np.testing.assert_array_equal(model(ids).numpy(), expected, err_msg="without a cache")
        np.testing.assert_array_equal(streaming_llama().train()(ids).numpy(), plain.train()(ids).numpy())
        cache = SlidingWindowKVCache(2, None, L, H_KV, D, 30, renumber=True)
        np.testing.assert_allclose(prefill(model, ids, cache, chunk=7).numpy(), expected, rtol=0, atol=1e-4)
        model.load_state_dict(plain.state_dict())  # the same names

    def test_a_pass_of_nothing_but_padding_stores_nothing(self):
        both = Both(window=3, sinks=1)
        for n_new in ([0, 0], [2, 0], [0, 0], [1, 2]):
            both.run(2, n_new)

    @pytest.mark.parametrize("dtype, atol", [(np.float64, 1e-4), (np.float16, 0.05)])
    def test_other_types(self, dtype, atol):
        model, ids = streaming_llama(), np.random.default_rng(4).integers(0, V, 20)
        cache = SlidingWindowKVCache(1, None, L, H_KV, D, 4, 2, renumber=True, dtype=dtype)
        oracle = Stream(model, 4, 2)
        for token in ids:
            got = model([[token]], cache=cache).numpy()
            assert got.shape == (1, 1, V)
            np.testing.assert_allclose(got[0], oracle.run(np.array([token])), rtol=0, atol=atol)

    def test_a_second_cache_reads_by_its_own_model(self):
        model, ids = streaming_llama(), np.arange(12)[None] % V
        enable_kv_cache(model, factory=SlidingWindowKVCache, max_seq_len=None, window=4, renumber=True)
        first = model(ids).numpy()
        other = SlidingWindowKVCache(1, None, L, H_KV, D, 4, renumber=True)
        np.testing.assert_array_equal(model(ids, cache=other).numpy(), first)


def test_a_renumbered_window_refuses_a_llama_that_turns_first():
    cache = SlidingWindowKVCache(1, None, L, H_KV, D, 4, renumber=True)
    with pytest.raises(ValueError, match="keys_before_rotation=True"):
        enable_kv_cache(streaming_llama(keys_before_rotation=False), cache=cache)
