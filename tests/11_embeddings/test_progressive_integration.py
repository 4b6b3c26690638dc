"""Lesson 11 in the package, with what came before it: modules, autograd, and ids from a tokenizer."""

import math

import numpy as np
import pytest

from tinytorch.core.autograd import check_gradients, no_grad
from tinytorch.core.embeddings import Embedding, PositionalEncoding, choose_positions, sinusoidal_table, sum_rows
from tinytorch.core.layers import Linear, Module
from tinytorch.core.losses import cross_entropy
from tinytorch.core.tensor import Tensor, apply, manual_seed
from tinytorch.text.tokenization import CharTokenizer


def rng(seed=0):
    return np.random.default_rng(seed)


class TestEmbedding:
    @pytest.mark.parametrize("shape", [(), (4,), (2, 3), (2, 3, 4), (0,), (2, 0)])
    def test_rows_for_ids_of_any_shape(self, shape):
        layer, ids = Embedding(9, 5, rng=rng()), rng(1).integers(9, size=shape)
        got = layer(ids)
        assert got.shape == (*shape, 5)
        assert got.dtype == np.float32
        for index in np.ndindex(shape):
            assert np.array_equal(got.numpy()[index], layer.weight.numpy()[ids[index]])

    @pytest.mark.parametrize("ids", [[1, 2], (1, 2), np.array([1, 2], np.uint8), Tensor([1, 2]), np.array([1, 2])])
    def test_ids_as_list_array_or_tensor(self, ids):
        layer = Embedding(3, 2, rng=rng())
        got = layer(ids)
        assert got.shape == (2, 2)
        assert np.array_equal(got.numpy(), layer.weight.numpy()[1:])

    @pytest.mark.parametrize("bad", [-1, 9, 2**40])
    def test_an_id_outside_is_named_with_the_vocabulary(self, bad):
        with pytest.raises(IndexError, match=rf"id {bad} .*num_embeddings is 9"):
            Embedding(9, 5)([[0, 1], [2, bad]])

    @pytest.mark.parametrize("bad", [[0.0, 2.5], [True, False], ["a"], Tensor([1.0])])
    def test_what_is_no_integer_is_refused(self, bad):
        with pytest.raises(TypeError, match="integers"):
            Embedding(9, 5)(bad)

    def test_repeated_ids_add_up_over_batch_and_passes(self):
        layer = Embedding(6, 3, rng=rng())
        ids = np.array([[1, 1, 4], [4, 1, 0]])
        for passes in (1, 2):
            (layer(ids) * 2.0).sum().backward()
            grad = layer.weight.grad.numpy()
            assert grad.shape == (6, 3) and grad.dtype == np.float32
            assert grad[:, 0].tolist() == [2 * passes, 6 * passes, 0, 0, 4 * passes, 0]

    def test_gradient_as_central_differences(self):
        from tinytorch.core.embeddings import embedding_array

        ids = np.array([[2, 0, 2], [3, 2, 0]])
        check_gradients(lambda w: apply(embedding_array, w, ids) * 3.0, rng().standard_normal((5, 4)))

    def test_a_shared_table_collects_both_gradients(self):
        """A tied head: the same Parameter looks up ids and scores them."""
        embed, head = Embedding(7, 4, rng=rng()), Linear(4, 7, bias=False)
        head.weight = embed.weight
        ids = np.array([[1, 2, 1]])
        head(embed(ids)).sum().backward()
        weight = embed.weight.numpy()
        expected = np.tile(weight[ids[0]].sum(axis=0), (7, 1))
        for i in ids[0]:
            expected[i] += weight.sum(axis=0)
        assert np.allclose(embed.weight.grad.numpy(), expected, atol=1e-5)

    def test_float64_stays_float64(self):
        layer = Embedding(4, 2)
        layer.weight = Tensor(np.ones((4, 2)), requires_grad=True, dtype=np.float64)
        out = layer([1, 1])
        out.sum().backward()
        assert out.dtype == layer.weight.grad.dtype == np.float64

    def test_no_gradient_inside_no_grad(self):
        with no_grad():
            assert not Embedding(4, 2)([1]).requires_grad

    def test_same_seed_same_rows(self):
        manual_seed(5)
        first = Embedding(4, 3).weight.numpy().copy()
        manual_seed(5)
        assert np.array_equal(Embedding(4, 3).weight.numpy(), first)
        assert np.array_equal(Embedding(4, 3, rng=rng(1)).weight.numpy(), Embedding(4, 3, rng=rng(1)).weight.numpy())


class TestSumRows:
    @pytest.mark.parametrize("count", [0, 1, 2, 500])
    def test_as_a_plain_loop(self, count):
        ids, rows = rng(2).integers(20, size=count), rng(3).integers(-9, 9, size=(count, 3)).astype(np.float32)
        expected = np.zeros((25, 3), np.float32)
        for i, row in zip(ids, rows):
            expected[i] += row
        got = sum_rows(ids, rows, 25)
        assert got.shape == expected.shape and got.dtype == np.float32
        assert np.array_equal(got, expected)

    def test_inputs_are_left_alone(self):
        ids, rows = np.array([3, 1, 3]), np.ones((3, 2), np.float32)
        sum_rows(ids, rows, 4)
        assert ids.tolist() == [3, 1, 3] and rows.tolist() == [[1, 1]] * 3


class TestPositions:
    @pytest.fixture(params=["learned", "sinusoidal"])
    def layer(self, request):
        return PositionalEncoding(12, 6, kind=request.param, rng=rng(4))

    def rows(self, layer):
        return layer.weight.numpy() if layer.kind == "learned" else layer.table

    def test_adds_the_row_of_each_position(self, layer):
        x = Tensor(rng(5).standard_normal((3, 7, 6)))
        got = layer(x)
        assert got.shape == (3, 7, 6) and got.dtype == np.float32
        assert np.array_equal(got.numpy(), x.numpy() + self.rows(layer)[:7])

    def test_token_by_token_equals_all_at_once(self, layer):
        x = Tensor(rng(6).standard_normal((2, 12, 6)))
        whole = layer(x).numpy()
        assert whole.shape == (2, 12, 6)
        for t in range(12):
            assert np.array_equal(layer(x[:, t:t + 1], positions=np.array([t])).numpy(), whole[:, t:t + 1])

    def test_each_row_of_a_batch_has_its_own(self, layer):
        x, positions = Tensor(np.zeros((3, 2, 6))), np.array([[5, 6], [0, 1], [10, 11]])
        got = layer(x, positions=positions).numpy()
        assert got.shape == (3, 2, 6)
        assert np.array_equal(got, self.rows(layer)[positions])

    def test_a_text_without_a_batch(self, layer):
        assert np.array_equal(layer(Tensor(np.zeros((4, 6)))).numpy(), self.rows(layer)[:4])

    def test_the_table_ends_at_max_seq_len(self, layer):
        assert layer(Tensor(np.zeros((1, 12, 6)))).shape == (1, 12, 6)
        for length, positions, named in ((13, None, 12), (1, [12], 12), (2, [[-1, 3]], -1)):
            with pytest.raises(ValueError, match=rf"position {named} .*max_seq_len is 12"):
                layer(Tensor(np.zeros((1, length, 6))), positions=positions)

    def test_shapes_that_do_not_fit_are_named(self, layer):
        with pytest.raises(ValueError, match=r"\(B, T, 6\), got \(2, 3, 5\)"):
            layer(Tensor(np.zeros((2, 3, 5))))
        for positions in ([0, 1], [[0, 1, 2]], 0):
            with pytest.raises(ValueError, match=r"positions should have the shape \(3,\) or \(2, 3\)"):
                layer(Tensor(np.zeros((2, 3, 6))), positions=positions)

    def test_gradients_pass_through_to_x_and_add_up_in_the_table(self, layer):
        x = Tensor(np.zeros((5, 3, 6)), requires_grad=True)
        layer(x, positions=[2, 0, 2]).sum().backward()
        assert x.grad.shape == x.shape and np.all(x.grad.numpy() == 1)
        if layer.kind == "learned":
            assert layer.weight.grad.numpy()[:, 0].tolist() == [5, 0, 10] + [0] * 9

    def test_only_learned_rows_are_parameters(self):
        assert list(PositionalEncoding(4, 6).state_dict()) == ["weight"]
        assert PositionalEncoding(4, 6, kind="sinusoidal").state_dict() == {}

    def test_an_unknown_kind_is_refused(self):
        with pytest.raises(ValueError, match="'rotary'"):
            PositionalEncoding(4, 6, kind="rotary")

    def test_positions_given_are_not_changed(self):
        given = np.array([3, 4])
        choose_positions(given, 2, 8)
        assert given.tolist() == [3, 4]


class TestSinusoidalTable:
    @pytest.mark.parametrize("shape", [(1, 1), (5, 2), (50, 7), (2000, 16)])
    def test_as_the_formula_number_by_number(self, shape):
        table = sinusoidal_table(*shape)
        assert table.shape == shape and table.dtype == np.float32
        for t in {0, 1, shape[0] // 2, shape[0] - 1} & set(range(shape[0])):
            for c in range(shape[1]):
                angle = t / 10000 ** ((c - c % 2) / shape[1])
                expected = math.cos(angle) if c % 2 else math.sin(angle)
                assert abs(table[t, c] - expected) < 1e-6, f"row {t}, column {c}"


class TestWithALanguage:
    def test_rows_learn_which_character_follows(self):
        """Character -> row -> scores of the next one; the best possible loss is 0, since each has one successor."""
        tokenizer = CharTokenizer("abcdefgh")
        ids = np.array(tokenizer.encode("abcdefgh" * 4))
        inputs, targets = ids[:-1], ids[1:]

        class Bigram(Module):
            def __init__(self):
                self.embed, self.head = Embedding(8, 12, rng=rng(7)), Linear(12, 8, rng=rng(8))

            def forward(self, ids):
                return self.head(self.embed(ids))

        model = Bigram()
        assert [name for name, _ in model.named_parameters()] == ["embed.weight", "head.weight", "head.bias"]
        losses = []
        for _ in range(60):
            model.zero_grad()
            loss = cross_entropy(model(inputs), targets)
            loss.backward()
            losses.append(loss.item())
            for parameter in model.parameters():
                parameter.data -= np.float32(1.0) * parameter.grad.data
        assert losses[0] > 1.5
        assert losses[-1] < 0.1
        assert tokenizer.decode(model([0, 4]).numpy().argmax(axis=1)) == "bf"
