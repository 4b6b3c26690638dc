"""Lesson 13 against everything before it: the GPT, its training, its generation and its one socket for a cache."""

import codecs
import contextlib
import io
import math
import warnings

import numpy as np
import pytest

from tinytorch.core.attention import visible_mask
from tinytorch.core.autograd import check_gradients, no_grad
from tinytorch.core.losses import cross_entropy
from tinytorch.core.optimizers import AdamW
from tinytorch.core.tensor import Tensor, apply, manual_seed
from tinytorch.models.transformer import GPT, MLP, LayerNorm, TransformerBlock, layer_norm_array, sample_next


def small_gpt(seed=0, vocab_size=11, embed_dim=16, num_layers=3, num_heads=4, max_seq_len=12, **options):
    """A GPT in evaluation mode whose weights are large enough that every token matters."""
    model = GPT(vocab_size, embed_dim, num_layers, num_heads, max_seq_len, rng=np.random.default_rng(seed), **options)
    rng = np.random.default_rng(seed + 1)
    for parameter in model.parameters():
        parameter.data += 0.2 * rng.standard_normal(parameter.shape, dtype=np.float32)
    return model.eval()


def gpt_in_numpy(model, ids):
    """Logits (T, V) of one sequence in float64, token by token and head by head, from the state_dict alone."""
    w = {name: value.astype(np.float64) for name, value in model.state_dict().items()}
    H, H_kv = model.num_heads, model.num_kv_heads
    D = model.embed_dim // H

    def norm(x, name):
        return (x - x.mean()) / math.sqrt(x.var() + 1e-5) * w[name + ".weight"] + w[name + ".bias"]

    def linear(x, name):
        return w[name + ".weight"] @ x + w[name + ".bias"]

    past = [[] for _ in range(model.num_layers)]  # the keys and values of each layer, as lists
    logits = []
    for t, token in enumerate(ids):
        x = w["token_embedding.weight"][token] + w["position_embedding.weight"][t]
        for layer in range(model.num_layers):
            name = f"blocks.{layer}."
            heads = linear(norm(x, name + "norm1"), name + "attention.qkv_proj").reshape(-1, D)
            past[layer].append(heads[H:])
            mixed = []
            for h in range(H):
                shared = h // (H // H_kv)
                scores = np.array([heads[h] @ old[shared] for old in past[layer]]) / math.sqrt(D)
                weights = np.exp(scores - scores.max())
                mixed.append(sum(p * old[H_kv + shared] for p, old in zip(weights / weights.sum(), past[layer])))
            x = x + linear(np.concatenate(mixed), name + "attention.out_proj")
            up = linear(norm(x, name + "norm2"), name + "mlp.up_proj")
            up = 0.5 * up * (1 + np.tanh(math.sqrt(2 / math.pi) * (up + 0.044715 * up**3)))
            x = x + linear(up, name + "mlp.down_proj")
        logits.append(w.get("head.weight", w["token_embedding.weight"]) @ norm(x, "norm"))
    return np.array(logits)


class ListCache:
    """A cache of plain lists, with no more than lesson 13 may ask of one: attached_to, seq_pos and reset."""

    def __init__(self, num_layers):
        self.layers, self.seq_pos, self.resets, self.ran = [None] * num_layers, 0, 0, []

    def reset(self):
        self.layers, self.seq_pos, self.resets = [None] * len(self.layers), 0, self.resets + 1

    @contextlib.contextmanager
    def attached_to(self, model):
        parts = [block.attention for block in model.blocks]
        position_embedding = model.position_embedding
        try:
            for layer, block in enumerate(model.blocks):
                block.attention = ListAttention(self, layer, parts[layer])
            model.position_embedding = lambda x: position_embedding(x, self.seq_pos + np.arange(x.shape[1]))
            yield self
        finally:
            model.position_embedding = position_embedding
            for block, attention in zip(model.blocks, parts):
                block.attention = attention


class ListAttention:
    """project, append to the lists, attend, merge; the last layer commits."""

    def __init__(self, cache, layer, attention):
        self.cache, self.layer, self.attention = cache, layer, attention

    def __call__(self, x):
        cache, new = self.cache, x.shape[1]
        query, key, value = (part.numpy() for part in self.attention.project(x))
        if cache.layers[self.layer] is not None:
            key, value = (np.concatenate(pair, axis=2) for pair in zip(cache.layers[self.layer], (key, value)))
        cache.layers[self.layer] = key, value
        visible = visible_mask(cache.seq_pos + np.arange(new), np.arange(key.shape[2]))
        mixed = self.attention.attend(Tensor(query), Tensor(key), Tensor(value), visible)
        if self.layer == len(cache.layers) - 1:
            cache.seq_pos += new
            cache.ran.append(new)
        return self.attention.merge(mixed)


def zen_windows(seq_len=32, batch_size=8, seed=0):
    """(alphabet, draw): the characters of the Zen of Python, and random windows of their numbers."""
    with contextlib.redirect_stdout(io.StringIO()):
        import this
    text = codecs.decode(this.s, "rot13")
    alphabet = sorted(set(text))
    ids, rng = np.array([alphabet.index(c) for c in text]), np.random.default_rng(seed)

    def draw():
        starts = rng.integers(0, len(ids) - seq_len, batch_size)
        windows = ids[starts[:, None] + np.arange(seq_len + 1)]
        return windows[:, :-1], windows[:, 1:]

    return alphabet, draw


class TestParts:
    def test_layer_norm_is_numpys_mean_and_var(self):
        x = np.random.default_rng(0).standard_normal((2, 3, 8)).astype(np.float32) * 5 + 2
        norm = LayerNorm(8)
        norm.weight.data[...], norm.bias.data[...] = np.arange(8), 0.5
        got = norm(Tensor(x))
        mean, variance = x.mean(axis=2, keepdims=True), x.var(axis=2, keepdims=True)
        expected = np.arange(8) * (x - mean) / np.sqrt(variance + 1e-5) + 0.5
        assert got.shape == (2, 3, 8) and got.dtype == np.float32
        np.testing.assert_allclose(got.numpy(), expected, atol=1e-5)

    def test_layer_norm_gradients(self):
        rng = np.random.default_rng(1)
        arrays = rng.standard_normal((2, 3, 5)), rng.standard_normal(5), rng.standard_normal(5)
        check_gradients(lambda x, w, b: apply(layer_norm_array, x, w, b), *arrays)

    def test_layer_norm_wrong_width(self):
        with pytest.raises(ValueError, match=r"\(\.\.\., 8\)"):
            LayerNorm(8)(Tensor(np.ones((2, 7))))

    def test_mlp_is_four_times_wider_unless_told(self):
        assert MLP(6).up_proj.weight.shape == (24, 6)
        assert MLP(6, hidden_dim=10).down_proj.weight.shape == (6, 10)

    def test_block_is_causal_and_keeps_the_shape(self):
        block = TransformerBlock(8, 2, rng=np.random.default_rng(2))
        x = np.random.default_rng(3).standard_normal((1, 4, 8)).astype(np.float32)
        changed = x.copy()
        changed[0, 3] += 1
        a, b = block(Tensor(x)).numpy(), block(Tensor(changed)).numpy()
        assert a.shape == b.shape == (1, 4, 8)
        np.testing.assert_array_equal(a[:, :3], b[:, :3])
        assert (a[:, 3] != b[:, 3]).any()


class TestForward:
    @pytest.mark.parametrize("options", [{}, {"num_kv_heads": 2}, {"num_kv_heads": 1}, {"tie_weights": False}])
    def test_against_a_decoder_of_plain_numpy(self, options):
        model = small_gpt(**options)
        ids = np.random.default_rng(4).integers(0, 11, (2, 7))
        logits = model(ids)
        assert logits.shape == (2, 7, 11) and logits.dtype == np.float32
        expected = np.stack([gpt_in_numpy(model, row) for row in ids])
        assert expected.shape == (2, 7, 11)
        np.testing.assert_allclose(logits.numpy(), expected, atol=1e-3, rtol=1e-4, err_msg=f"{options}")

    def test_a_later_token_leaves_earlier_logits_bitwise(self):
        model, ids = small_gpt(), np.arange(8)
        reference = model(ids).numpy()
        for t in range(8):
            changed = ids.copy()
            changed[t] = 10
            logits = model(changed).numpy()
            assert logits.shape == reference.shape == (1, 8, 11)
            np.testing.assert_array_equal(logits[:, :t], reference[:, :t])
            assert (logits[:, t:] != reference[:, t:]).any(axis=-1).all(), f"token {t} does not reach every later one"

    def test_ids_in_every_form(self):
        model, ids = small_gpt(), [1, 2, 3]
        reference = model(np.array([ids])).numpy()
        for form in (ids, [ids], np.array(ids, np.int32), np.array(ids, np.uint8), Tensor(ids)):
            assert model(form).shape == (1, 3, 11)
            np.testing.assert_array_equal(model(form).numpy(), reference)

    @pytest.mark.parametrize("ids", [[], [[]], [0.5, 1.0], 3, np.zeros((1, 1, 1), int), [True, False]])
    def test_what_are_not_ids(self, ids):
        with pytest.raises(ValueError, match="token ids"):
            small_gpt()(ids)

    def test_too_long_or_unknown(self):
        with pytest.raises(ValueError, match="max_seq_len"):
            small_gpt()(np.zeros(13, int))
        with pytest.raises(IndexError, match="11"):
            small_gpt()([11])

    def test_dropout_only_in_training(self):
        model = small_gpt(dropout=0.3)
        np.testing.assert_array_equal(model([1, 2]).numpy(), model([1, 2]).numpy())
        model.train()
        assert (model([1, 2]).numpy() != model([1, 2]).numpy()).any()


class TestParameters:
    def test_tied_weights_are_one_parameter(self):
        tied, untied = small_gpt(), small_gpt(tie_weights=False)
        assert tied.head.weight is tied.token_embedding.weight
        assert len(untied.parameters()) == len(tied.parameters()) + 1
        assert "head.weight" in untied.state_dict() and "head.weight" not in tied.state_dict()
        tied([1, 2]).sum().backward()
        assert tied.token_embedding.weight.grad.shape == (11, 16)
        assert (tied.token_embedding.weight.grad.numpy()[5] != 0).any(), "a word that was not read is still scored"

    def test_the_tied_gradient_is_the_sum_of_both_uses(self):
        """Oracle: an untied model with the same numbers, whose table and head collect their gradients apart."""
        tied, untied = small_gpt(), small_gpt(tie_weights=False)
        untied.load_state_dict({**tied.state_dict(), "head.weight": tied.head.weight.numpy()})
        for model in (tied, untied):
            cross_entropy(model([[1, 2, 3, 1]]), np.array([[2, 3, 1, 5]])).backward()
        both = untied.token_embedding.weight.grad.numpy() + untied.head.weight.grad.numpy()
        assert both.shape == (11, 16)
        np.testing.assert_allclose(tied.token_embedding.weight.grad.numpy(), both, atol=1e-6)

    def test_every_block_has_weights_of_its_own(self):
        """Changing one weight changes that weight only, and matters in every block."""
        model = small_gpt()
        for name, parameter in model.named_parameters():
            if name.startswith("blocks.") and name.endswith("weight"):
                before, logits = model.state_dict(), model([1, 2, 3]).numpy()
                parameter.data[0] += 1
                changed = [other for other, value in model.state_dict().items() if (value != before[other]).any()]
                assert changed == [name], f"changing {name} changed {changed}"
                assert (model([1, 2, 3]).numpy() != logits).any(), f"{name} has no influence"
                model.load_state_dict(before)

    def test_shared_heads_equal_repeated_heads(self):
        """A model whose 4 query heads share 2 key heads, against full attention with each key head twice."""
        few, full = small_gpt(num_kv_heads=2), small_gpt()
        state = few.state_dict()
        for name in [name for name in state if "qkv_proj" in name]:
            heads = state[name].reshape(4 + 2 + 2, 4, -1)  # (H + 2 * H_kv, D, E or 1)
            repeated = np.concatenate([heads[:4], np.repeat(heads[4:6], 2, 0), np.repeat(heads[6:], 2, 0)])
            state[name] = repeated.reshape(48, *state[name].shape[1:])
        full.load_state_dict(state)
        got, expected = few([[1, 2, 3, 4, 5]]).numpy(), full([[1, 2, 3, 4, 5]]).numpy()
        assert got.shape == expected.shape == (1, 5, 11)
        np.testing.assert_allclose(got, expected, atol=1e-5)

    def test_sizes_are_attributes(self):
        model = GPT(11, 16, 3, 4, 12, num_kv_heads=2)
        sizes = model.vocab_size, model.embed_dim, model.num_layers, model.num_heads, model.max_seq_len
        assert sizes == (11, 16, 3, 4, 12) and model.num_kv_heads == 2 and len(model.blocks) == 3
        assert GPT(11, 16, 3, 4, 12).num_kv_heads == 4

    def test_gpt2_start(self):
        model = GPT(200, 64, 4, 4, 64, rng=np.random.default_rng(5))
        for name, parameter in model.named_parameters():
            values = parameter.numpy()
            if name.endswith("bias"):
                assert (values == 0).all(), name
            elif "norm" in name:
                assert (values == 1).all(), name
            else:
                small = name.endswith(("out_proj.weight", "down_proj.weight"))
                expected = 0.02 / math.sqrt(8) if small else 0.02
                assert abs(values.std() / expected - 1) < 0.05, f"{name}: std {values.std()}, expected {expected}"
                assert parameter.dtype == np.float32, name

    def test_state_dict_goes_round(self):
        a, b = small_gpt(0), small_gpt(7)
        assert (a([1, 2, 3]).numpy() != b([1, 2, 3]).numpy()).any()
        b.load_state_dict(a.state_dict())
        np.testing.assert_array_equal(a([1, 2, 3]).numpy(), b([1, 2, 3]).numpy())
        assert b.head.weight is b.token_embedding.weight

    def test_the_same_seed_gives_the_same_model(self):
        a, b = (GPT(11, 8, 1, 2, 8, rng=np.random.default_rng(3)).state_dict() for _ in range(2))
        manual_seed(1)
        c = GPT(11, 8, 1, 2, 8).state_dict()
        manual_seed(1)
        d = GPT(11, 8, 1, 2, 8).state_dict()
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])
            np.testing.assert_array_equal(c[name], d[name])


class TestTraining:
    def test_loss_on_real_text_goes_down(self):
        alphabet, draw = zen_windows()
        model = GPT(len(alphabet), 32, 2, 4, 64, dropout=0.05, rng=np.random.default_rng(0))
        optimizer, losses = AdamW(model.parameters(), lr=3e-3), []
        for _ in range(60):
            inputs, targets = draw()
            loss = cross_entropy(model(inputs), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        untrained = math.log(len(alphabet))
        assert abs(losses[0] - untrained) < 0.15, f"the first loss is {losses[0]:.3f}, log V is {untrained:.3f}"
        assert np.mean(losses[-5:]) < 0.75 * losses[0], f"loss {losses[0]:.2f} -> {np.mean(losses[-5:]):.2f}"

    def test_every_parameter_gets_the_gradient_of_central_differences(self):
        """One entry of every parameter, in float64."""
        model = small_gpt(num_layers=2, num_kv_heads=2).train()
        for parameter in model.parameters():
            parameter.data = parameter.data.astype(np.float64)
        ids = np.random.default_rng(6).integers(0, 11, (2, 6))

        def loss():
            return cross_entropy(model(ids[:, :-1]), ids[:, 1:])

        loss().backward()
        for name, parameter in model.named_parameters():
            index = tuple(min(1, n - 1) for n in parameter.shape)
            saved = parameter.data[index]
            parameter.data[index] = saved + 1e-6
            above = loss().item()
            parameter.data[index] = saved - 1e-6
            below = loss().item()
            parameter.data[index] = saved
            expected, got = (above - below) / 2e-6, parameter.grad.numpy()[index]
            assert abs(got - expected) < 1e-6 + 1e-4 * abs(expected), f"{name}{index}: got {got}, expected {expected}"

    def test_it_learns_a_text_by_heart_and_writes_it(self):
        """A short sequence repeated: greedy generation continues it exactly."""
        text = [1, 4, 2, 8, 5, 7, 0, 3]
        ids = np.array([text + text[:1]])
        model = GPT(10, 32, 2, 4, 16, rng=np.random.default_rng(1))
        optimizer = AdamW(model.parameters(), lr=1e-2)
        for _ in range(60):
            loss = cross_entropy(model(ids[:, :-1]), ids[:, 1:])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert model.generate(text[:1], 7) == text, f"loss {loss.item():.3f}"


class TestGenerate:
    def test_greedy_is_the_largest_logit_of_the_plain_decoder(self):
        model, ids = small_gpt(), [3, 1, 4]
        got = model.generate(ids, 6)
        for _ in range(6):
            ids = ids + [int(np.argmax(gpt_in_numpy(model, ids)[-1]))]
        assert got == ids

    def test_the_form_of_the_prompt_comes_back(self):
        model = small_gpt()
        as_list = model.generate([1, 2, 3], 4)
        assert type(as_list) is list and len(as_list) == 7 and all(type(i) is int for i in as_list)
        as_array = model.generate(np.array([1, 2, 3], np.int32), 4)
        assert as_array.shape == (7,) and as_array.dtype == np.int32 and as_array.tolist() == as_list
        rows = model.generate(np.array([[1, 2, 3], [4, 5, 6]]), 4)
        assert rows.shape == (2, 7) and rows[0].tolist() == as_list
        assert model.generate([[1, 2, 3]], 4) == [as_list]
        as_tensor = model.generate(Tensor([1, 2, 3]), 4)
        assert isinstance(as_tensor, Tensor) and as_tensor.numpy().tolist() == as_list

    def test_nothing_to_write(self):
        model, prompt = small_gpt(), np.array([1, 2, 3])
        got = model.generate(prompt, 0)
        assert got.tolist() == [1, 2, 3]
        got[0] = 9
        assert prompt.tolist() == [1, 2, 3], "the answer is the caller's own array"
        assert model.generate([1, 2], 0) == [1, 2]

    def test_bounds_are_checked_before_any_work(self):
        model = small_gpt()
        assert len(model.generate([1] * 4, 8)) == 12
        model.hidden = None  # any work would now be a TypeError
        for prompt, new in (([1] * 4, 9), ([1] * 13, 0)):
            with pytest.raises(ValueError, match="max_seq_len=12"):
                model.generate(prompt, new)
        for new in (-1, 1.5, None, "3", True):
            with pytest.raises(ValueError, match="max_new_tokens"):
                model.generate([1], new)
        for wrong in ({"temperature": -1}, {"temperature": float("nan")}, {"top_k": 0}, {"top_k": 2.5}):
            for new in (0, 2):
                with pytest.raises(ValueError, match=next(iter(wrong))):
                    model.generate([1], new, **wrong)
        with pytest.raises(ValueError, match="different lengths"):
            small_gpt()([[1], [1, 2]])
        with pytest.raises(ValueError, match="token ids"):
            model.generate([], 1)

    def test_prompts_of_different_length_are_each_continued_as_if_alone(self):
        """Oracle: each prompt alone, continued greedily from the logits of `gpt_in_numpy`."""
        model, prompts, told = small_gpt(), [[1, 2, 3, 4], [5], [6, 7]], []
        expected = []
        for prompt in prompts:
            text = list(prompt)
            for _ in range(5):
                text.append(int(gpt_in_numpy(model, text)[-1].argmax()))
            expected.append(text)
        got = model.generate(prompts, 5, on_token=lambda token: told.append(token.tolist()))
        assert got == expected
        assert told == [[text[len(prompt) + i] for prompt, text in zip(prompts, expected)] for i in range(5)]
        assert model.generate(tuple(np.array(prompt) for prompt in prompts), 5) == expected
        assert model.generate(prompts, 0) == prompts and prompts == [[1, 2, 3, 4], [5], [6, 7]]

    def test_a_row_of_a_ragged_batch_ends_at_its_stop_token_and_is_not_filled_up(self):
        model, prompts = small_gpt(), [[1, 2, 3, 4], [5], [6, 7]]
        alone = [model.generate(prompt, 8) for prompt in prompts]
        stop = alone[1][3]
        expected = []
        for prompt, text in zip(prompts, alone):
            new = text[len(prompt) :]
            expected.append(prompt + (new[: new.index(stop) + 1] if stop in new else new))
        assert model.generate(prompts, 8, stop_token=stop) == expected
        assert len(expected[1]) <= 4

    def test_ragged_prompts_that_are_none_are_refused_before_any_work(self):
        model = small_gpt()
        model.hidden = None  # so that any work is an error of another kind
        for prompts in ([[1, 2], []], [[1], [2.5, 2]], [[1], [2, [3]]], [[1], [[2, 3]], [1, 2]], [[1], [True, False]]):
            with pytest.raises(ValueError, match="token ids|different lengths"):
                model.generate(prompts, 2)
        with pytest.raises(ValueError, match="max_seq_len=12"):
            model.generate([[1], [1] * 10], 3)

    def test_a_stop_token_stops_its_own_row_only(self):
        model = small_gpt()
        prompts = np.array([[1, 2], [3, 4], [5, 6], [7, 8]])
        free = model.generate(prompts, 8)
        stop = int(free[0, 4])
        got = model.generate(prompts, 8, stop_token=stop)
        width = got.shape[1]
        for row, reference in zip(got, free):
            met = np.flatnonzero(reference[2:] == stop)
            end = 2 + met[0] + 1 if len(met) else width
            np.testing.assert_array_equal(row[:end], reference[:end])
            assert (row[end:] == stop).all(), f"row {row} goes on after its stop token {stop}"
        single = model.generate(prompts[0].tolist(), 8, stop_token=stop)
        assert single[-1] == stop and stop not in single[2:-1]
        several = model.generate(prompts[0].tolist(), 8, stop_token=[stop, int(free[0, 3])])
        assert several == free[0, : len(several)].tolist() and len(several) <= 4

    @pytest.mark.parametrize("training", [True, False])
    def test_the_mode_comes_back_also_after_an_error(self, training):
        model = small_gpt(dropout=0.5).train(training)
        model.blocks[1].train(not training)  # a part with a mode of its own
        modes = [module.training for module in model.modules()]
        assert model.generate([1, 2], 3) == model.generate([1, 2], 3), "dropout was active while generating"
        assert [module.training for module in model.modules()] == modes
        with pytest.raises(IndexError):
            model.generate([99], 3)
        assert [module.training for module in model.modules()] == modes
        loss = model.train()([1, 2]).sum()
        loss.backward()
        assert model.token_embedding.weight.grad is not None, "gradients are still off after generate"

    def test_no_gradients_inside(self):
        model = small_gpt().train()
        seen = []
        hidden = model.hidden
        model.hidden = lambda ids: seen.append(hidden(ids)) or seen[-1]
        model.generate([1, 2], 2)
        assert len(seen) == 2 and not any(x.requires_grad for x in seen)

    def test_only_the_last_position_goes_through_the_head(self):
        model, shapes = small_gpt(), []
        head = model.head
        model.head = lambda x: shapes.append(x.shape) or head(x)
        model.generate(np.array([[1, 2, 3], [4, 5, 6]]), 3)
        assert shapes == [(2, 16)] * 3

    def test_sampling_is_seeded_and_stays_among_the_k_best(self):
        model = small_gpt()
        a, b = (model.generate([1, 2], 8, temperature=1.5, rng=np.random.default_rng(5)) for _ in range(2))
        assert a == b
        others = {tuple(model.generate([1, 2], 8, temperature=1.5, rng=np.random.default_rng(i))) for i in range(8)}
        assert len(others) > 1
        assert model.generate([1, 2], 8, temperature=1.5, top_k=1) == model.generate([1, 2], 8)
        manual_seed(3)
        c = model.generate([1, 2], 8, temperature=1.5)
        manual_seed(3)
        assert model.generate([1, 2], 8, temperature=1.5) == c

    def test_a_tiny_temperature_is_greedy(self):
        """Divided by 1e-200, logits that are not shifted first overflow: inf - inf would be NaN, and token 0."""
        logits = np.array([[3.0, 5.0, 4.0], [2e30, 1e30, -1e30]], np.float32)
        assert sample_next(logits, temperature=1e-200, rng=np.random.default_rng(0)).tolist() == [1, 0]

    def test_a_prompt_of_small_integers_does_not_wrap_around(self):
        model = GPT(300, 8, 1, 2, 8, rng=np.random.default_rng(0))
        model.norm.weight.data[:], model.norm.bias.data[:] = 0, 1
        model.head.weight.data[299] = 5  # the largest logit, always; in 8 bits it would be 43
        got = model.generate(np.array([1, 2], np.uint8), 2)
        assert got.tolist() == [1, 2, 299, 299]

    def test_each_round_is_told_as_it_comes(self):
        model, told = small_gpt(), []
        ids = model.generate(np.array([[1, 2], [3, 4]]), 4, on_token=told.append)
        assert np.shape(told) == (4, 2)
        assert np.array_equal(np.transpose(told), ids[:, 2:])

    def test_draws_follow_the_probabilities(self):
        """20,000 draws from [0.1, 0.2, 0.7], within five standard errors."""
        logits = np.log(np.tile([[0.1, 0.2, 0.7]], (20000, 1))).astype(np.float32)
        draws = sample_next(logits, temperature=1, rng=np.random.default_rng(0))
        assert draws.shape == (20000,)
        shares = np.bincount(draws, minlength=3) / 20000
        np.testing.assert_allclose(shares, [0.1, 0.2, 0.7], atol=5 * math.sqrt(0.21 / 20000))


class TestSocket:
    """Lesson 13 knows three things of a cache; a cache of plain lists has them and is enough."""

    def test_generate_runs_only_what_is_new(self):
        model, cache = small_gpt(num_kv_heads=2), ListCache(3)
        prompt = np.array([[1, 2, 3, 4], [5, 6, 7, 8]])
        got = model.generate(prompt, 7, cache=cache)
        expected = model.generate(prompt, 7)
        assert got.shape == expected.shape == (2, 11)
        np.testing.assert_array_equal(got, expected)
        assert cache.ran == [4, 1, 1, 1, 1, 1, 1], "P + n - 1 tokens, the prompt at once"

    def test_a_cache_with_another_text_is_reset(self):
        model, cache = small_gpt(), ListCache(3)
        model.generate([9, 8, 7], 3, cache=cache)
        assert (cache.seq_pos, cache.resets) == (5, 0)
        assert model.generate([1, 2], 4, cache=cache) == model.generate([1, 2], 4)
        assert (cache.seq_pos, cache.resets) == (5, 1)
        assert model.generate([1, 2], 0, cache=cache) == [1, 2]
        assert (cache.seq_pos, cache.resets) == (5, 1), "nothing to write is nothing to do"

    def test_forward_with_a_cache(self):
        model, cache, ids = small_gpt(), ListCache(3), [1, 2, 3, 4, 5]
        full = model(ids).numpy()
        parts = [model(ids[:3], cache=cache).numpy(), model(ids[3:], cache=cache).numpy()]
        assert cache.ran == [3, 2] and [p.shape for p in parts] == [(1, 3, 11), (1, 2, 11)]
        np.testing.assert_allclose(np.concatenate(parts, axis=1), full, atol=1e-5)

    def test_the_very_same_parts_come_back(self):
        model, cache = small_gpt(), ListCache(3)
        before = [block.attention for block in model.blocks], model.position_embedding
        model.generate([1, 2], 2, cache=cache)
        with pytest.raises(IndexError):
            model.generate([99], 2, cache=cache)
        after = [block.attention for block in model.blocks], model.position_embedding
        assert all(a is b for a, b in zip(before[0], after[0])) and before[1] is after[1]

    def test_training_has_no_use_for_a_cache(self):
        model, cache = small_gpt().train(), ListCache(3)
        with pytest.raises(RuntimeError, match="eval"):
            model([1, 2], cache=cache)
        assert cache.seq_pos == 0
        assert model.generate([1, 2], 3, cache=cache) == model.generate([1, 2], 3)
        assert model.training

    def test_an_enabled_cache_is_used_without_being_named(self):
        model, cache = small_gpt(), ListCache(3)
        expected = model.generate([1, 2], 3)
        with cache.attached_to(model):
            model._kv_cache = cache
            assert model.generate([1, 2], 3) == expected
            assert model.generate([1, 2], 3, cache=cache) == expected, "the enabled cache, named: not attached twice"
            assert cache.ran == [2, 1, 1] * 2 and cache.resets == 1
            del model._kv_cache
        assert model._kv_cache is None and GPT._kv_cache is None

    def test_an_empty_cache_is_still_a_cache(self):
        """A cache may have a length of 0 and so be falsy; it is used all the same."""

        class Empty(ListCache):
            def __len__(self):
                return 0

        model, cache = small_gpt(), Empty(3)
        model.generate([1, 2], 3, cache=cache)
        assert cache.ran == [2, 1, 1]


def test_nothing_warns():
    model = small_gpt(dropout=0.1)
    with warnings.catch_warnings(), np.errstate(over="raise", invalid="raise", divide="raise"):
        warnings.simplefilter("error")
        model.train()(np.array([[1, 2, 3]])).sum().backward()
        model.generate([1, 2], 3, temperature=0.7, top_k=3)
        with no_grad():
            assert not model([1, 2]).requires_grad
