"""Lesson 21 against everything before it: each part and its gradients, the model, its training, its cache."""

import math

import numpy as np
import pytest

from tinytorch.core.attention import MultiHeadAttention
from tinytorch.core.autograd import check_gradients, no_grad
from tinytorch.core.losses import cross_entropy
from tinytorch.core.optimizers import AdamW
from tinytorch.core.tensor import Tensor, apply
from tinytorch.generation.kv_cache import (
    KVCache,
    analyze_kvcache_speedup,
    disable_kv_cache,
    enable_kv_cache,
    generation_flops,
    prefill,
)
from tinytorch.models.llama import (
    Llama,
    LlamaAttention,
    RMSNorm,
    RotaryEmbedding,
    SwiGLU,
    repeat_heads,
    rms_norm_array,
    rotary_frequencies,
    rotary_table,
    rotate_array,
    scaled_frequencies,
    swiglu_array,
)
from tinytorch.models.transformer import GPT
from tinytorch.profiling.profiler import Profiler

SCALING = dict(factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16)
OPTIONS = [
    {},
    {"head_dim": 6, "rope_theta": 300.0},
    {"attention_bias": True, "tie_weights": True, "num_kv_heads": 1},
    {"rope_scaling": SCALING, "out_bias": True, "num_kv_heads": 4, "norm_eps": 1e-2},
    {"window": 3}, {"window": 1}, {"window": 30},
]


def small_llama(seed=0, **options):
    """A Llama in evaluation mode whose weights are large enough that every token matters."""
    sizes = dict(vocab_size=11, embed_dim=16, num_layers=3, num_heads=4, max_seq_len=24, num_kv_heads=2, hidden_dim=20)
    model, rng = Llama(**{**sizes, **options}, rng=np.random.default_rng(seed)), np.random.default_rng(seed + 1)
    for parameter in model.parameters():
        parameter.data += 0.2 * rng.standard_normal(parameter.shape, dtype=np.float32)
    return model.eval()


def turn(head, position, frequencies):
    """One head's numbers as Python complex numbers, each turned on its own; halves are pairs."""
    half = len(head) // 2
    arrows = [complex(a, b) * (math.cos(position * f) + 1j * math.sin(position * f))
              for a, b, f in zip(head[:half], head[half:], frequencies)]
    return np.array([arrow.real for arrow in arrows] + [arrow.imag for arrow in arrows])


def frequencies_of(model):
    """Su et al., equation 15, and the three cases of Llama 3.1, in Python floats."""
    rotary, D, found = model.position_embedding, model.head_dim, []
    scaling = SCALING if model.has_scaling else None
    for i in range(D // 2):
        f = 1 / rotary.theta ** (2 * i / D)
        if scaling:
            turns = 16 * f / (2 * math.pi)
            share = min(max((turns - 1) / 3, 0), 1)
            f = share * f + (1 - share) * f / 4
        found.append(f)
    return found


def llama_in_numpy(model, ids):
    """Logits (T, V) of one sequence in float64, token by token and head by head, from the state_dict alone."""
    w = {name: value.astype(np.float64) for name, value in model.state_dict().items()}
    H, H_kv, D, frequencies = model.num_heads, model.num_kv_heads, model.head_dim, frequencies_of(model)

    def norm(x, name):
        return x / math.sqrt(np.mean(x**2) + model.norm.eps) * w[name + ".weight"]

    def linear(x, name):
        return w[name + ".weight"] @ x + w.get(name + ".bias", 0)

    past, logits = [[] for _ in range(model.num_layers)], []
    for t, token in enumerate(ids):
        x = w["token_embedding.weight"][token]
        for layer in range(model.num_layers):
            name = f"blocks.{layer}."
            heads = linear(norm(x, name + "norm1"), name + "attention.qkv_proj").reshape(-1, D)
            turned = [turn(head, t, frequencies) for head in heads[: H + H_kv]]
            past[layer].append((turned[H:], heads[H + H_kv :]))
            past[layer] = past[layer][-(model.window or len(past[layer])) :]
            mixed = []
            for h in range(H):
                shared = h // (H // H_kv)
                scores = np.exp([turned[h] @ keys[shared] / math.sqrt(D) for keys, _ in past[layer]])
                mixed.append(sum(p * values[shared] for p, (_, values) in zip(scores / scores.sum(), past[layer])))
            x = x + linear(np.concatenate(mixed), name + "attention.out_proj")
            seen = norm(x, name + "norm2")
            gate, up = linear(seen, name + "mlp.gate_proj"), linear(seen, name + "mlp.up_proj")
            x = x + linear(gate / (1 + np.exp(-gate)) * up, name + "mlp.down_proj")
        logits.append(w.get("head.weight", w["token_embedding.weight"]) @ norm(x, "norm"))
    return np.array(logits)


def models():
    for options in OPTIONS:
        model = small_llama(**options)
        model.has_scaling = "rope_scaling" in options
        yield options, model


class TestParts:
    def test_every_operation_against_central_differences(self):
        rng = np.random.default_rng(0)
        x, weight = rng.standard_normal((2, 3, 6)), rng.standard_normal(6)
        check_gradients(lambda x, w: apply(rms_norm_array, x, w, eps=1e-3), x, weight)
        check_gradients(lambda gate, up: apply(swiglu_array, gate, up), 4 * x, x[::-1] + 1)
        table = rotary_table([3, 0, 70], rotary_frequencies(6))
        check_gradients(lambda x: apply(rotate_array, x, cos=table[:, 0], sin=table[:, 1]), x[None])

    def test_float32_stays_and_inputs_are_left_alone(self):
        rng = np.random.default_rng(1)
        x, gate = rng.standard_normal((2, 1, 2, 3, 4), dtype=np.float32)
        table, copies = rotary_table([1, 2, 3], rotary_frequencies(4)), (x.copy(), gate.copy())
        results = (rms_norm_array(x, np.ones(4, np.float32)), swiglu_array(gate, x),
                   rotate_array(x, table[:, 0], table[:, 1]))
        assert [(r.dtype, r.shape) for r in results] == [(np.float32, x.shape)] * 3
        assert np.array_equal(x, copies[0]) and np.array_equal(gate, copies[1])

    def test_swiglu_far_out_neither_warns_nor_overflows(self):
        gate = np.array([-1e30, -300, -88.8, 0, 88.8, 300, 1e30], np.float32)
        with np.errstate(all="raise", under="ignore"):
            got = swiglu_array(gate, np.ones(7, np.float32))
        np.testing.assert_allclose(got, np.maximum(gate, 0), atol=1e-6)

    def test_a_turn_keeps_lengths_and_the_way_back_is_exact_enough(self):
        rotary = RotaryEmbedding(8, 200)
        x = Tensor(np.random.default_rng(2).standard_normal((2, 3, 5, 8), dtype=np.float32))
        there = rotary.rotate(x, np.array([[0, 9, 80, 199, 3], [1, 1, 1, 1, 1]]))
        assert there.shape == x.shape
        lengths = [np.linalg.norm(t.numpy(), axis=-1) for t in (x, there)]
        np.testing.assert_allclose(lengths[0], lengths[1], rtol=1e-5)
        np.testing.assert_array_equal(rotary.rotate(x, np.zeros(5, int)).numpy(), x.numpy())

    def test_rows_of_the_table_do_not_depend_on_who_asked_first(self):
        first, second = RotaryEmbedding(4, 10_000), RotaryEmbedding(4, 10_000)
        far = second.rows(np.array([9000]))
        first.rows(np.arange(3))
        np.testing.assert_array_equal(first.rows(np.array([9000])), far)
        np.testing.assert_array_equal(first.rows(np.array([2])), second.rows(np.array([2])))
        assert len(RotaryEmbedding(4, 64).rows(np.array([63, -1]))) == 2, "padding may stand at -1"

    def test_far_positions_are_as_exact_as_float32(self):
        cos = rotary_table([131_071], rotary_frequencies(128, 500_000.0))[0, 0]
        expected = [math.cos(131_071 * 500_000.0 ** (-2 * i / 128)) for i in range(64)]
        np.testing.assert_allclose(cos[:64], expected, atol=1e-7)
        np.testing.assert_array_equal(cos[:64], cos[64:])

    @pytest.mark.parametrize("head_dim", [0, 1, 7])
    def test_odd_heads_are_refused(self, head_dim):
        with pytest.raises(ValueError, match=f"even, got {head_dim}"):
            rotary_frequencies(head_dim)

    @pytest.mark.parametrize("name", SCALING)
    def test_scaling_without_sense_is_refused(self, name):
        wrong = 9.0 if name == "low_freq_factor" else 0
        with pytest.raises(ValueError, match="rope scaling"):
            scaled_frequencies(rotary_frequencies(8), **{**SCALING, name: wrong})

    def test_wrong_widths_and_heads(self):
        with pytest.raises(ValueError, match=r"\(\.\.\., 8\)"):
            RMSNorm(8)(Tensor(np.ones((2, 7))))
        with pytest.raises(ValueError, match="num_kv_heads"):
            small_llama(num_kv_heads=3)
        with pytest.raises(ValueError, match="embed_dim"):
            small_llama(embed_dim=15)

    def test_default_hidden_size_has_the_parameters_of_an_mlp_four_times_wider(self):
        assert sum(p.size for p in SwiGLU(48).parameters()) == 2 * 48 * 4 * 48
        assert [tuple(p.shape) for p in SwiGLU(6, 10).parameters()] == [(10, 6), (10, 6), (6, 10)]

    def test_repeated_heads(self):
        x = np.arange(2 * 3 * 2).reshape(2, 3, 2, 1)
        got = repeat_heads(x, 6)
        assert got.shape == (2, 6, 2, 1)
        for h in range(6):
            np.testing.assert_array_equal(got[:, h], x[:, h // 2])


class TestAttention:
    def test_scores_know_the_distance_only(self):
        attention = LlamaAttention(16, 4, RotaryEmbedding(4, 500), 2, rng=np.random.default_rng(3))
        x = Tensor(np.random.default_rng(4).standard_normal((1, 6, 16), dtype=np.float32))
        found = []
        for start in (0, 7, 400):
            query, key, value = (part.numpy() for part in attention.project(x, start + np.arange(6)))
            found.append(query @ repeat_heads(key, 4).swapaxes(-1, -2))
        assert found[0].shape == (1, 4, 6, 6)
        for scores in found[1:]:
            np.testing.assert_allclose(scores, found[0], atol=1e-4)

    def test_without_positions_they_count_from_zero(self):
        attention = LlamaAttention(16, 4, RotaryEmbedding(4, 50), rng=np.random.default_rng(5))
        x = Tensor(np.random.default_rng(6).standard_normal((2, 3, 16), dtype=np.float32))
        for plain, told in zip(attention.project(x), attention.project(x, np.array([[0, 1, 2]] * 2))):
            np.testing.assert_array_equal(plain.numpy(), told.numpy())
        plain = MultiHeadAttention.project(attention, x)
        np.testing.assert_array_equal(attention.project(x)[2].numpy(), plain[2].numpy())

    def test_a_mask_hides_more(self):
        attention = LlamaAttention(8, 2, RotaryEmbedding(4, 50), rng=np.random.default_rng(7))
        x = np.random.default_rng(8).standard_normal((1, 4, 8)).astype(np.float32)
        hidden = np.ones((4, 4), bool)
        hidden[2:, 0] = False
        changed = x.copy()
        changed[0, 0] += 1
        a, b = (attention(Tensor(each), mask=hidden).numpy() for each in (x, changed))
        np.testing.assert_array_equal(a[:, 2:], b[:, 2:])
        assert (a[:, 1] != b[:, 1]).any()


class TestModel:
    @pytest.mark.parametrize("index", range(len(OPTIONS)))
    def test_against_a_decoder_of_plain_numpy_with_and_without_a_cache(self, index):
        options, model = list(models())[index]
        ids = np.random.default_rng(9).integers(0, 11, (2, 9))
        expected = np.stack([llama_in_numpy(model, row) for row in ids])
        logits = model(ids)
        assert logits.shape == expected.shape == (2, 9, 11) and logits.dtype == np.float32
        np.testing.assert_allclose(logits.numpy(), expected, atol=1e-3, rtol=1e-4, err_msg=f"{options}")
        enable_kv_cache(model, batch_size=2)
        pieces = [model(ids[:, a:b]).numpy() for a, b in ((0, 3), (3, 4), (4, 9))]
        np.testing.assert_allclose(np.concatenate(pieces, axis=1), expected, atol=1e-3, rtol=1e-4, err_msg=f"{options}")

    def test_ragged_rows_and_chunks(self):
        model, rng, lengths = small_llama(), np.random.default_rng(10), [5, 9, 2]
        ids = rng.integers(0, 11, (3, 9))
        cache = KVCache(3, 24, 3, 2, 4)
        got = prefill(model, ids, cache, chunk=4, n_new=lengths).numpy()
        with no_grad(), cache.attached_to(model):
            step = model(np.array([[1], [2], [3]])).numpy()
        for row, length in enumerate(lengths):
            whole = model(np.append(ids[row, :length], row + 1)).numpy()[0]
            np.testing.assert_allclose(got[row, :length], whole[:-1], atol=1e-4)
            np.testing.assert_allclose(step[row, 0], whole[-1], atol=1e-4)

    def test_the_cache_stores_turned_keys_of_the_shared_heads(self):
        model, ids = small_llama(), np.array([[1, 2, 3, 4, 5]])
        cache = enable_kv_cache(model)
        model(ids[:, :3]), model(ids[:, 3:])
        disable_kv_cache(model)
        x = model.blocks[0].norm1(model.token_embedding(ids))
        expected = model.blocks[0].attention.project(x, np.arange(5))[1:]
        for got, part in zip(cache.get(0), expected):
            assert got.shape == part.shape == (1, 2, 5, 4)
            np.testing.assert_allclose(got.numpy(), part.numpy(), atol=1e-5)

    def test_prompts_of_different_length_generate_what_they_generate_alone(self):
        model, prompts = small_llama(), [[1, 2, 3, 4, 5], [6, 7]]
        alone = [model.generate(prompt, 7) for prompt in prompts]
        assert model.generate(prompts, 7) == alone
        enable_kv_cache(model, batch_size=2)
        assert model.generate(prompts, 7) == alone

    def test_heads_wider_than_their_share_are_counted_and_measured_as_they_are(self):
        model, per_head = small_llama(head_dim=6), 2 * 11 * 16
        counted = Profiler().count_flops(model, np.ones((1, 5), int)) - 4 * per_head  # its head runs for every token
        assert generation_flops(model, 5, 1, cached=False) == generation_flops(model, 5, 1, cached=True) == counted > 0
        assert analyze_kvcache_speedup(model, lengths=(5,), max_new_tokens=3, repeats=1)[0]["same_tokens"]

    def test_it_is_a_gpt_with_the_same_door(self):
        model = small_llama()
        assert isinstance(model, GPT) and (model.num_kv_heads, model.head_dim) == (2, 4)
        with pytest.raises(ValueError, match="max_seq_len"):
            model(np.zeros(25, int))
        with pytest.raises(ValueError, match="max_seq_len"):
            model.generate([1] * 20, 5)
        with pytest.raises(ValueError, match="window is 1 or more"):
            small_llama(window=0)
        cache = KVCache(1, 40, 3, 2, 4)
        prefill(model, np.ones((1, 24), int), cache)
        with pytest.raises(ValueError, match="position 24"), no_grad():
            model([[1]], cache=cache)
        assert cache.seq_pos == 24, "a refused pass changed the cache"

    def test_names_are_stable(self):
        """Files of weights are read by these names."""
        block = ["norm1.weight", "attention.qkv_proj.weight", "attention.out_proj.weight", "norm2.weight",
                 "mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight"]
        names = [f"blocks.{i}.{name}" for i in range(3) for name in block]
        assert sorted(small_llama().state_dict()) == sorted(
            ["token_embedding.weight", *names, "norm.weight", "head.weight"])
        biased = small_llama(attention_bias=True, tie_weights=True).state_dict()
        assert sorted(set(biased) - set(names)) == [
            *(f"blocks.{i}.attention.qkv_proj.bias" for i in range(3)), "norm.weight", "token_embedding.weight"]
        behind = small_llama(out_bias=True).state_dict()
        assert [name for name in behind if "bias" in name] == [f"blocks.{i}.attention.out_proj.bias" for i in range(3)]

    def test_a_later_token_leaves_earlier_logits_bitwise(self):
        model, ids = small_llama(), np.arange(8)
        reference = model(ids).numpy()
        for t in range(8):
            changed = ids.copy()
            changed[t] = 10
            logits = model(changed).numpy()
            np.testing.assert_array_equal(logits[:, :t], reference[:, :t])
            assert (logits[:, t:] != reference[:, t:]).any(axis=-1).all(), f"token {t} does not reach every later one"


class TestTraining:
    def test_every_parameter_gets_the_gradient_of_central_differences(self):
        """One entry of every parameter, in float64."""
        model = small_llama(num_layers=2, attention_bias=True, out_bias=True).train()
        for parameter in model.parameters():
            parameter.data = parameter.data.astype(np.float64)
        ids = np.random.default_rng(11).integers(0, 11, (2, 6))

        def loss():
            return cross_entropy(model(ids[:, :-1]), ids[:, 1:])

        loss().backward()
        for name, parameter in model.named_parameters():
            index = tuple(min(1, n - 1) for n in parameter.shape)
            saved, found = parameter.data[index], []
            for step in (1e-6, -1e-6):
                parameter.data[index] = saved + step
                found.append(loss().item())
            parameter.data[index] = saved
            expected, got = (found[0] - found[1]) / 2e-6, parameter.grad.numpy()[index]
            assert abs(got - expected) < 1e-6 + 1e-4 * abs(expected), f"{name}{index}: got {got}, expected {expected}"

    def test_it_learns_a_text_by_heart_with_an_attached_cache(self):
        text = [1, 4, 2, 8, 5, 7, 0, 3]
        ids = np.array([text + text[:1]])
        model = Llama(10, 32, 2, 4, 16, num_kv_heads=2, rng=np.random.default_rng(1))
        cache = enable_kv_cache(model)
        optimizer = AdamW(model.parameters(), lr=1e-2)
        for _ in range(50):
            loss = cross_entropy(model(ids[:, :-1]), ids[:, 1:])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert cache.seq_pos == 0, "training wrote into the cache"
        assert model.generate(text[:1], 7) == text, f"loss {loss.item():.3f}"
        assert cache.seq_pos == 7
