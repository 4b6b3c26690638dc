"""Lesson 12 against everything before it: attention, its gradients and its module, with plain loops as the oracle."""

import math
import tracemalloc
import warnings

import numpy as np
import pytest

from tinytorch.core.attention import (
    MultiHeadAttention,
    attention_weights,
    causal_mask,
    scaled_dot_product_attention,
    visible_mask,
)
from tinytorch.core.autograd import check_gradients, no_grad
from tinytorch.core.layers import Linear, Sequential
from tinytorch.core.losses import mse_loss
from tinytorch.core.tensor import Tensor, apply


def attention_in_loops(query, key, value, visible):
    """Number by number, in Python floats: (B, H, T, D), (B, H_kv, S, D) twice, visible(b, h, t, s) -> (B, H, T, D)."""
    B, H, T, D = query.shape
    H_kv, S = key.shape[1:3]
    output = np.zeros((B, H, T, value.shape[-1]))
    for b, h, t in np.ndindex(B, H, T):
        shared = h // (H // H_kv)
        seen = [s for s in range(S) if visible(b, h, t, s)]
        scores = {}
        for s in seen:
            scores[s] = sum(float(query[b, h, t, d]) * float(key[b, shared, s, d]) for d in range(D)) / math.sqrt(D)
        largest = max(scores.values(), default=0.0)
        total = sum(math.exp(score - largest) for score in scores.values())
        for s in seen:
            for d in range(value.shape[-1]):
                output[b, h, t, d] += math.exp(scores[s] - largest) / total * float(value[b, shared, s, d])
    return output


def draw(*shape, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


class TestAttentionAgainstLoops:
    @pytest.mark.parametrize("num_kv_heads", [4, 2, 1])
    @pytest.mark.parametrize(("seq_len", "num_keys"), [(1, 1), (3, 3), (1, 5), (2, 5)])
    def test_causal(self, num_kv_heads, seq_len, num_keys):
        query, key = draw(2, 4, seq_len, 3), draw(2, num_kv_heads, num_keys, 3, seed=1)
        value = draw(2, num_kv_heads, num_keys, 3, seed=2)
        got = scaled_dot_product_attention(Tensor(query), Tensor(key), Tensor(value), causal_mask(seq_len, num_keys))
        expected = attention_in_loops(query, key, value, lambda b, h, t, s: s <= num_keys - seq_len + t)
        assert got.shape == expected.shape == (2, 4, seq_len, 3)
        assert got.dtype == np.float32
        np.testing.assert_allclose(got.numpy(), expected, atol=1e-5, err_msg="differs from plain loops")

    @pytest.mark.parametrize("shape", [(3, 5), (2, 3, 5), (2, 1, 3, 5), (2, 4, 3, 5), (2, 1, 1, 5)])
    def test_every_shape_of_mask(self, shape):
        query, key, value = draw(2, 4, 3, 6), draw(2, 2, 5, 6, seed=1), draw(2, 2, 5, 6, seed=2)
        mask = np.random.default_rng(3).random(shape) < 0.5
        full = np.broadcast_to(mask[:, None] if mask.ndim == 3 else mask, (2, 4, 3, 5))
        got = scaled_dot_product_attention(Tensor(query), Tensor(key), Tensor(value), mask).numpy()
        expected = attention_in_loops(query, key, value, lambda b, h, t, s: full[b, h, t, s])
        assert got.shape == expected.shape == (2, 4, 3, 6)
        np.testing.assert_allclose(got, expected, atol=1e-5, err_msg=f"mask {shape} differs from plain loops")

    def test_float64_stays_and_agrees_closely(self):
        arrays = [draw(1, 2, 4, 8, seed=i, dtype=np.float64) for i in range(3)]
        got = scaled_dot_product_attention(*(Tensor(a, dtype=np.float64) for a in arrays), causal_mask(4))
        expected = attention_in_loops(*arrays, lambda b, h, t, s: s <= t)
        assert got.dtype == np.float64 and got.shape == expected.shape
        np.testing.assert_allclose(got.numpy(), expected, atol=1e-12)

    def test_a_mask_may_be_a_tensor(self):
        query, mask = Tensor(draw(1, 1, 3, 2)), causal_mask(3)
        got = scaled_dot_product_attention(query, query, query, Tensor(mask)).numpy()
        assert got.shape == (1, 1, 3, 2)
        np.testing.assert_array_equal(got, scaled_dot_product_attention(query, query, query, mask).numpy())


class TestRowsThatSeeNothing:
    def test_zeros_and_no_warning(self):
        query, key, value = draw(1, 2, 3, 4), draw(1, 2, 3, 4, seed=1), draw(1, 2, 3, 4, seed=2)
        mask = np.array([[True, False, False], [False, False, False], [True, True, True]])
        with warnings.catch_warnings(), np.errstate(all="raise", under="ignore"):
            warnings.simplefilter("error")
            got = scaled_dot_product_attention(Tensor(query), Tensor(key), Tensor(value), mask).numpy()
        assert got.shape == (1, 2, 3, 4)
        assert np.isfinite(got).all()
        assert (got[:, :, 1] == 0).all(), "the row that sees nothing is not zero"
        np.testing.assert_array_equal(got[:, :, 0], value[:, :, 0], err_msg="one visible key: its value, exactly")

    def test_its_gradient_is_zero_too(self):
        query = Tensor(draw(1, 1, 2, 4), requires_grad=True)
        key = Tensor(draw(1, 1, 3, 4, seed=1), requires_grad=True)
        mask = np.array([[False, False, False], [True, False, True]])
        scaled_dot_product_attention(query, key, key, mask).sum().backward()
        assert query.grad.shape == (1, 1, 2, 4) and np.isfinite(query.grad.numpy()).all()
        assert (query.grad.numpy()[0, 0, 0] == 0).all(), "a query that sees nothing got a gradient"
        assert (key.grad.numpy()[0, 0, 1] == 0).all(), "a key that nobody sees got a gradient"
        assert (key.grad.numpy()[0, 0, 0] != 0).any()

    def test_large_scores(self):
        query = Tensor(draw(1, 1, 3, 4) * 1e4)
        with np.errstate(over="raise", invalid="raise"):
            weights = attention_weights(query, query, causal_mask(3)).numpy()
        assert weights.shape == (1, 1, 3, 3)
        np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-6)


class TestVisibility:
    def test_positions_not_indices(self):
        """Keys in any order of slots: the table is that of their positions."""
        positions, order = np.array([0, 1, 2, 3, 4]), np.array([3, 0, 4, 2, 1])
        plain = visible_mask([2, 4], positions)
        shuffled = visible_mask([2, 4], positions[order])
        assert plain.shape == shuffled.shape == (2, 5)
        np.testing.assert_array_equal(shuffled, plain[:, order])

    def test_rows_of_different_length(self):
        mask = visible_mask([[1], [3]], [[0, 1, -1, -1], [0, 1, 2, 3]])
        assert mask.shape == (2, 1, 4) and mask.dtype == bool
        assert mask.tolist() == [[[True, True, False, False]], [[True, True, True, True]]]

    @pytest.mark.parametrize(("window", "sinks"), [(1, 0), (2, 0), (3, 1), (9, 0)])
    def test_window(self, window, sinks):
        mask = visible_mask(np.arange(6), np.arange(6), window, sinks)
        assert mask.shape == (6, 6)
        for q, k in np.ndindex(6, 6):
            assert mask[q, k] == (k <= q and (q - k < window or k < sinks)), (q, k)

    def test_fewer_keys_than_queries(self):
        with pytest.raises(ValueError, match="3 queries"):
            causal_mask(3, 2)


class TestGradients:
    @pytest.mark.parametrize("num_kv_heads", [4, 2, 1])
    def test_against_central_differences(self, num_kv_heads):
        shapes = (2, 4, 3, 2), (2, num_kv_heads, 4, 2), (2, num_kv_heads, 4, 2)
        arrays = [draw(*shape, seed=i, dtype=np.float64) for i, shape in enumerate(shapes)]
        mask = causal_mask(3, 4)
        check_gradients(lambda q, k, v: scaled_dot_product_attention(q, k, v, mask), *arrays)

    def test_two_axes_are_enough(self):
        arrays = [draw(3, 4, seed=i, dtype=np.float64) for i in range(3)]
        check_gradients(lambda q, k, v: scaled_dot_product_attention(q, k, v), *arrays)

    def test_split_and_merge(self):
        from tinytorch.core.attention import merge_heads_array, split_heads_array

        packed = draw(2, 3, 12, dtype=np.float64)
        check_gradients(lambda x: apply(split_heads_array, x, first=1, count=2, head_dim=3), packed)
        check_gradients(lambda x: apply(merge_heads_array, x), draw(2, 4, 3, 2, dtype=np.float64))

    def test_whole_module(self):
        """Every parameter's gradient against central differences, one entry each, in float64."""
        module = MultiHeadAttention(8, 4, 2, causal=True, rng=np.random.default_rng(0))
        for parameter in module.parameters():
            parameter.data = parameter.data.astype(np.float64)
        x = Tensor(draw(2, 4, 8, dtype=np.float64), dtype=np.float64)

        def loss():
            return (module(x) * module(x)).sum()

        loss().backward()
        for name, parameter in module.named_parameters():
            index = tuple(n // 2 for n in parameter.shape)
            saved = parameter.data[index]
            parameter.data[index] = saved + 1e-6
            above = loss().item()
            parameter.data[index] = saved - 1e-6
            below = loss().item()
            parameter.data[index] = saved
            expected = (above - below) / 2e-6
            got = parameter.grad.numpy()[index]
            assert abs(got - expected) < 1e-5 * (1 + abs(expected)), f"{name}{index}: got {got}, expected {expected}"


class TestMultiHeadAttention:
    def test_forward_is_the_three_parts(self):
        module = MultiHeadAttention(12, 4, 2, causal=True, rng=np.random.default_rng(1))
        x = Tensor(draw(2, 5, 12))
        query, key, value = module.project(x)
        assert query.shape == (2, 4, 5, 3) and key.shape == value.shape == (2, 2, 5, 3)
        by_parts = module.merge(module.attend(query, key, value, causal_mask(5))).numpy()
        assert by_parts.shape == (2, 5, 12)
        np.testing.assert_array_equal(by_parts, module(x).numpy())

    def test_shared_heads_equal_repeated_weights(self):
        """2 key heads for 4 queries are the same as 4 key heads whose weights are repeated."""
        rng = np.random.default_rng(2)
        shared = MultiHeadAttention(16, 4, 2, causal=True, rng=rng)
        full = MultiHeadAttention(16, 4, causal=True, rng=rng)
        state = shared.state_dict()
        for name in ("qkv_proj.weight", "qkv_proj.bias"):
            heads = state[name].reshape(8, 4, -1)
            heads = np.concatenate([heads[:4], np.repeat(heads[4:6], 2, axis=0), np.repeat(heads[6:], 2, axis=0)])
            state[name] = heads.reshape(48, -1).reshape(full.state_dict()[name].shape)
        full.load_state_dict(state)
        x = Tensor(draw(2, 6, 16))
        a, b = shared(x).numpy(), full(x).numpy()
        assert a.shape == b.shape == (2, 6, 16)
        np.testing.assert_allclose(a, b, atol=1e-5)

    def test_a_later_token_changes_nothing_before_it(self):
        module, x = MultiHeadAttention(8, 2, causal=True, rng=np.random.default_rng(3)), draw(1, 6, 8)
        changed = x.copy()
        changed[0, 4] += 1
        a, b = module(Tensor(x)).numpy(), module(Tensor(changed)).numpy()
        assert a.shape == b.shape == (1, 6, 8)
        np.testing.assert_array_equal(a[:, :4], b[:, :4])
        assert (a[:, 4:] != b[:, 4:]).any(axis=-1).all()

    def test_without_causal_everything_is_seen(self):
        module, x = MultiHeadAttention(8, 2, rng=np.random.default_rng(3)), draw(1, 6, 8)
        changed = x.copy()
        changed[0, 5] += 1
        difference = module(Tensor(x)).numpy() != module(Tensor(changed)).numpy()
        assert difference.shape == (1, 6, 8) and difference.any(axis=-1).all()

    def test_a_given_mask_hides_more(self):
        module, x = MultiHeadAttention(8, 2, causal=True, rng=np.random.default_rng(4)), draw(2, 4, 8)
        padding = np.ones((2, 4, 4), bool)
        padding[1, :, 0] = False  # the second row's first token is padding
        changed = x.copy()
        changed[1, 0] += 1
        a, b = module(Tensor(x), padding).numpy(), module(Tensor(changed), padding).numpy()
        assert a.shape == b.shape == (2, 4, 8)
        np.testing.assert_array_equal(a[1, 1:], b[1, 1:])
        np.testing.assert_array_equal(a[0], module(Tensor(x)).numpy()[0])
        single = module(Tensor(x[:1, :1]), np.array([[False]])).numpy()
        assert single.shape == (1, 1, 8)
        np.testing.assert_array_equal(single[0, 0], module.out_proj.bias.numpy())

    def test_dropout_only_in_training(self):
        module, x = MultiHeadAttention(8, 2, dropout=0.5, rng=np.random.default_rng(5)), Tensor(draw(1, 6, 8))
        assert (module(x).numpy() != module(x).numpy()).any()
        module.eval()
        np.testing.assert_array_equal(module(x).numpy(), module(x).numpy())

    def test_parameters_and_bias(self):
        names = [name for name, _ in MultiHeadAttention(8, 2).named_parameters()]
        assert names == ["qkv_proj.weight", "qkv_proj.bias", "out_proj.weight", "out_proj.bias"]
        module = MultiHeadAttention(8, 4, 1, bias=False)
        assert [p.shape for p in module.parameters()] == [(12, 8), (8, 8)]

    def test_it_joins_other_layers_and_learns(self):
        rng = np.random.default_rng(6)
        model = Sequential(Linear(3, 8, rng=rng), MultiHeadAttention(8, 2, causal=True, rng=rng), Linear(8, 1, rng=rng))
        x = draw(4, 5, 3)
        target = np.cumsum(x[..., :1], axis=1) / np.arange(1, 6)[:, None]  # the mean of what is before
        losses = []
        for _ in range(80):
            loss = mse_loss(model(Tensor(x)), Tensor(target))
            model.zero_grad()
            loss.backward()
            for parameter in model.parameters():
                parameter.data -= 0.3 * parameter.grad.numpy()
            losses.append(loss.item())
        assert losses[-1] < 0.2 * losses[0], f"loss {losses[0]:.3f} -> {losses[-1]:.3f}"


class TestDecodePath:
    @pytest.mark.parametrize("num_kv_heads", [4, 2])
    def test_one_query_reads_the_keys_where_they_lie(self, num_kv_heads):
        """One new token over 4096 keys: less memory than a copy of the keys would take, and float32 throughout."""
        store = draw(2, 1, num_kv_heads, 5000, 32)
        store.flags.writeable = False
        module = MultiHeadAttention(128, 4, num_kv_heads, causal=True, rng=np.random.default_rng(7)).eval()
        key, value = store[0][:, :, :4096], store[1][:, :, :4096]
        with no_grad():
            query = module.project(Tensor(draw(1, 1, 128)))[0]
            module.attend(query, key, value)
            tracemalloc.start()
            mixed = module.attend(query, key, value)
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        assert mixed.shape == (1, 4, 1, 32) and mixed.dtype == np.float32
        assert peak < key.nbytes / 2, f"{peak} bytes were allocated, the keys are {key.nbytes}"
        expected = attention_in_loops(query.numpy(), key[:, :, -8:], value[:, :, -8:], lambda b, h, t, s: True)
        got = module.attend(query, key, value, np.arange(4096) >= 4088)
        assert got.shape == expected.shape
        np.testing.assert_allclose(got.numpy(), expected, atol=1e-5)

    def test_token_by_token_equals_all_at_once(self):
        module = MultiHeadAttention(16, 4, 2, causal=True, rng=np.random.default_rng(8))
        x = Tensor(draw(2, 6, 16))
        query, key, value = module.project(x)
        steps = [
            module.attend(query[:, :, t : t + 1], key[:, :, : t + 1], value[:, :, : t + 1]).numpy() for t in range(6)
        ]
        together = module.attend(query, key, value, causal_mask(6)).numpy()
        assert together.shape == (2, 4, 6, 4)
        np.testing.assert_allclose(np.concatenate(steps, axis=2), together, atol=1e-6)


class TestErrors:
    @pytest.mark.parametrize(
        ("arguments", "words"),
        [((10, 3), r"embed_dim \(10\).*num_heads \(3\)"), ((12, 4, 3), r"num_heads \(4\).*num_kv_heads \(3\)"),
         ((12, 0), "num_heads"), ((12, 4, 0), "num_kv_heads")],
    )
    def test_sizes_that_do_not_divide(self, arguments, words):
        with pytest.raises(ValueError, match=words):
            MultiHeadAttention(*arguments)

    @pytest.mark.parametrize(
        ("query", "key", "value", "words"),
        [((1, 2, 3, 4), (1, 2, 3, 5), (1, 2, 3, 5), "head_dim 4 and key 5"),
         ((1, 2, 3, 4), (1, 2, 3, 4), (1, 2, 2, 4), "one value"),
         ((1, 3, 3, 4), (1, 2, 3, 4), (1, 2, 3, 4), "multiple"),
         ((2, 2, 3, 4), (1, 2, 3, 4), (1, 2, 3, 4), "batch"),
         ((2, 3, 4), (1, 2, 3, 4), (1, 2, 3, 4), "number of axes")],
    )
    def test_shapes_that_do_not_fit(self, query, key, value, words):
        with pytest.raises(ValueError, match=words):
            scaled_dot_product_attention(Tensor(np.ones(query)), Tensor(np.ones(key)), Tensor(np.ones(value)))

    @pytest.mark.parametrize("shape", [(3, 4), (4, 3), (2, 3, 3), (1, 3, 3, 3), (1, 1, 1, 3, 3), (2,)])
    def test_a_mask_that_does_not_fit(self, shape):
        x = Tensor(draw(1, 2, 3, 4))
        with pytest.raises(ValueError, match="does not fit"):
            scaled_dot_product_attention(x, x, x, np.ones(shape, bool))

    @pytest.mark.parametrize("causal", [False, True])
    def test_a_mask_that_does_not_fit_is_named_by_the_module_too(self, causal):
        module = MultiHeadAttention(8, 2, causal=causal)
        for shape in ((4, 4), (3, 3, 3), (1, 5, 3, 3)):
            with pytest.raises(ValueError, match=r"does not fit scores of shape \(2, 2, 3, 3\)"):
                module(Tensor(draw(2, 3, 8)), np.ones(shape, bool))

    def test_a_mask_of_numbers(self):
        x = Tensor(draw(1, 2, 3, 4))
        with pytest.raises(ValueError, match="bool"):
            scaled_dot_product_attention(x, x, x, np.zeros((3, 3)))

    @pytest.mark.parametrize("shape", [(5, 8), (2, 5, 7), (1, 2, 5, 8)])
    def test_an_input_that_is_not_a_batch_of_tokens(self, shape):
        with pytest.raises(ValueError, match=r"\(B, T, 8\)"):
            MultiHeadAttention(8, 2)(Tensor(np.ones(shape)))
