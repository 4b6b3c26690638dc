"""Trees of modules of any form: every parameter is found once, and a state survives the round trip."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tinytorch.core.activations import ReLU
from tinytorch.core.layers import Linear, Module, Parameter, Sequential, dropout_mask
from tinytorch.core.tensor import Tensor

few = settings(deadline=None, max_examples=60)


class Node(Module):
    """A module whose attributes are handed in."""

    def __init__(self, attributes):
        for name, value in attributes.items():
            setattr(self, name, value)


# a tree as plain data: an int is parameter number n of a pool (so the same one can occur twice), None is no parameter
names = st.sampled_from(["a", "b", "weight", "blocks"])
trees = st.recursive(
    st.dictionaries(names, st.one_of(st.integers(0, 5), st.none()), max_size=3),
    lambda inner: st.dictionaries(names, st.one_of(st.integers(0, 5), inner, st.lists(inner, max_size=3)), max_size=4),
    max_leaves=12,
)


def build(tree, pool):
    """The module of a tree."""

    def value(entry):
        if isinstance(entry, dict):
            return build(entry, pool)
        if isinstance(entry, list):
            return [value(item) for item in entry]
        return ReLU() if entry is None else pool[entry]

    return Node({name: value(entry) for name, entry in tree.items()})


def expected_names(tree, prefix=""):
    """(name, pool number) in the promised order: own parameters, then children; written on plain data."""
    opened = []
    for name, entry in tree.items():
        entries = [(f"{name}.{i}", item) for i, item in enumerate(entry)] if isinstance(entry, list) else None
        opened += [(name, entry)] if entries is None else entries
    found = [(prefix + name, entry) for name, entry in opened if isinstance(entry, int)]
    for name, entry in opened:
        if isinstance(entry, dict):
            found += expected_names(entry, f"{prefix}{name}.")
    return found


def new_pool(seed):
    return [Parameter(np.random.default_rng(seed + n).standard_normal(n + 1)) for n in range(6)]


@few
@given(tree=trees)
def test_every_parameter_is_found_once_under_its_first_name(tree):
    pool = new_pool(0)
    first = {}
    for name, number in expected_names(tree):
        first.setdefault(number, name)
    found = list(build(tree, pool).named_parameters())
    assert [name for name, _ in found] == list(first.values())
    assert all(parameter is pool[number] for (_, parameter), number in zip(found, first, strict=True))


@few
@given(tree=trees, data=st.data())
def test_a_state_goes_round_and_a_damaged_one_changes_nothing(tree, data):
    source, target = build(tree, new_pool(0)), build(tree, new_pool(50))
    state, before = source.state_dict(), target.state_dict()
    if state:
        damaged, victim = dict(state), data.draw(st.sampled_from(sorted(state)))
        if data.draw(st.booleans()):
            del damaged[victim]
        else:
            damaged[victim] = np.zeros((2, 2))
        try:
            target.load_state_dict(damaged)
        except RuntimeError as error:
            assert victim in str(error)
        else:
            raise AssertionError(f"loaded a state without a fitting {victim}")
        assert all(np.array_equal(before[name], array) for name, array in target.state_dict().items())
    target.load_state_dict(state)
    assert all(np.array_equal(state[name], array) for name, array in target.state_dict().items())


@few
@given(sizes=st.lists(st.integers(1, 6), min_size=2, max_size=5), lead=st.lists(st.integers(0, 3), max_size=3))
def test_a_chain_of_linear_layers_is_the_product_of_their_matrices(sizes, lead):
    rng = np.random.default_rng(1)
    chain = Sequential(*(Linear(a, b, bias=False, rng=rng) for a, b in zip(sizes, sizes[1:])))
    x = rng.standard_normal((*lead, sizes[0])).astype(np.float32)
    product = np.eye(sizes[0])
    for layer in chain.parameters():
        product = product @ layer.data.T.astype(np.float64)
    y = chain(Tensor(x))
    assert y.shape == (*lead, sizes[-1])
    np.testing.assert_allclose(y.data, x @ product, rtol=1e-4, atol=1e-5)


@few
@given(p=st.floats(0, 1), shape=st.lists(st.integers(0, 4), max_size=3), seed=st.integers(0, 99))
def test_a_dropout_mask_holds_two_values_only(p, shape, seed):
    mask = dropout_mask(tuple(shape), p, np.random.default_rng(seed))
    assert (mask.shape, mask.dtype) == (tuple(shape), np.float32)
    kept = mask[mask != 0]
    np.testing.assert_allclose(kept, np.full(kept.shape, 1 / (1 - p) if p < 1 else 0), rtol=1e-6)
