"""A rule without a numeric check is a failing test: the whole package's rule table, and random graphs.

An operation of a new lesson needs one line in LATER: its name, the arrays it is called with, its parameters.
"""

import ast
import importlib
import importlib.util
import pkgutil
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("hypothesis")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

import tinytorch  # noqa: E402
from tinytorch.core.autograd import RULES, check_gradients, numeric_gradient, unbroadcast  # noqa: E402
from tinytorch.core.tensor import Tensor, apply, cat  # noqa: E402

ROOT = Path(__file__).parents[2]
quick = settings(max_examples=40, deadline=None)


def lesson_05_cases():
    """The table of tests/05_autograd, which runs in a learner's copy as well."""
    path = ROOT / "tests" / "05_autograd" / "test_progressive_integration.py"
    spec = importlib.util.spec_from_file_location("lesson_05_cases", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return {f"{op.__module__}.{op.__name__}": cases for op, cases in module.CASES.items()}


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


HALF_VISIBLE = np.tril(np.ones((3, 4), dtype=bool), k=1)
TURNS = np.tile(normal(3, 2), 2)  # an angle for each pair (i, i + D/2) of three tokens

# operations of later lessons, by the full name of the array function
LATER = {
    "tinytorch.core.embeddings.embedding_array": [
        ((normal(5, 3), np.array([[1, 1, 4], [0, 1, 3]])), {}),
        ((normal(5, 3), np.array(2)), {}),
    ],
    "tinytorch.core.attention.split_heads_array": [
        ((normal(2, 3, 8),), {"first": first, "count": count, "head_dim": 2})
        for first, count in ((0, 4), (1, 2), (3, 1))
    ],
    "tinytorch.core.attention.merge_heads_array": [((normal(2, 4, 3, 2),), {})],
    "tinytorch.core.attention.mix_values_array": [
        ((normal(2, 4, 3, 5), normal(2, heads, 5, 2, seed=1)), {}) for heads in (4, 2, 1)
    ],
    "tinytorch.core.attention.attention_weights_array": [
        ((normal(2, 4, 3, 2), normal(2, heads, 4, 2, seed=1)), {"visible": visible})
        for heads in (4, 2, 1)
        for visible in (None, HALF_VISIBLE)
    ],
    "tinytorch.models.transformer.layer_norm_array": [
        ((normal(2, 3, 4), normal(4, seed=1), normal(4, seed=2)), {}),
        ((normal(5), normal(5, seed=1), normal(5, seed=2)), {"eps": 0.1}),
    ],
    "tinytorch.models.llama.rms_norm_array": [
        ((normal(2, 3, 4), normal(4, seed=1)), {}),
        ((normal(5), normal(5, seed=1)), {"eps": 0.1}),
    ],
    "tinytorch.models.llama.rotate_array": [
        ((normal(2, 2, 3, 4),), {"cos": np.cos(TURNS), "sin": np.sin(TURNS) * [-1, -1, 1, 1]}),
    ],
    "tinytorch.models.llama.swiglu_array": [((normal(2, 3, 4), normal(2, 3, 4, seed=1)), {})],
}

MODULES = [m.name for m in pkgutil.walk_packages(tinytorch.__path__, "tinytorch.") if not m.ispkg]
for name in MODULES:
    importlib.import_module(name)
OPERATIONS = {f"{op.__module__}.{op.__name__}": op for op in RULES if op.__module__ in MODULES}
CASES = lesson_05_cases() | LATER
EVERY_CASE = [
    pytest.param(name, arrays, params, id=f"{name.rpartition('.')[2]}-{i}")
    for name, cases in CASES.items()
    for i, (arrays, params) in enumerate(cases)
]


def test_every_rule_has_a_numeric_check():
    missing = sorted(OPERATIONS.keys() - CASES.keys())
    assert not missing, (
        f"rules without a numeric check: {missing}. Add a line for each to LATER in {Path(__file__).name}"
    )


def test_every_case_has_a_rule():
    missing = sorted(CASES.keys() - OPERATIONS.keys())
    assert not missing, f"cases for operations that have no rule: {missing}"


def test_every_operation_that_goes_through_the_door_has_a_rule():
    """Reads apply(some_array, ...) off the package's source; comparisons and argmax have no gradient."""
    used = set()
    for module in MODULES:
        tree = ast.parse(Path(importlib.import_module(module).__file__).read_text(encoding="utf-8"))
        for call in ast.walk(tree):
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "apply" and call.args:
                if isinstance(call.args[0], ast.Name):
                    used.add((module, call.args[0].id))
    assert len(used) > 30, f"found only {len(used)} operations: is the door still called apply?"
    functions = {(m, n): getattr(importlib.import_module(m), n, None) for m, n in used}
    missing = sorted(f"{m}.{n}" for (m, n), op in functions.items() if op is not None and op not in RULES)
    without_gradient = {"tinytorch.core.tensor.argmax_array"}
    assert set(missing) <= without_gradient, f"operations without a gradient rule: {set(missing) - without_gradient}"


@pytest.mark.parametrize("name, arrays, params", EVERY_CASE)
def test_rule_against_central_differences(name, arrays, params):
    check_gradients(lambda *inputs: apply(OPERATIONS[name], *inputs, **params), *arrays)


@pytest.mark.parametrize("name, arrays, params", EVERY_CASE)
def test_float32_stays_float32_through_the_rule(name, arrays, params):
    op = OPERATIONS[name]
    narrow = [a.astype(np.float32) if a.dtype.kind == "f" else a for a in arrays]
    output = np.asarray(op(*narrow, **params))
    assert output.dtype == np.float32, f"{name}: float32 became {output.dtype}"
    for i, result in enumerate(RULES[op](np.ones_like(output), output, *narrow, **params)):
        result = result() if callable(result) else result
        if result is not None and narrow[i].dtype.kind == "f":
            assert np.asarray(result).dtype == np.float32, f"gradient {i} of {name} became {result.dtype}"


@quick
@given(st.lists(st.integers(1, 4), max_size=4).map(tuple), st.data())
def test_unbroadcast_is_the_reverse_of_broadcasting(shape, data):
    """The definition of the reverse: stretch(x) against g weighs as much as x against unbroadcast(g)."""
    cut = data.draw(st.integers(0, len(shape)))
    small = tuple(1 if data.draw(st.booleans()) else n for n in shape[cut:])
    x, g = normal(*small, seed=1), normal(*shape, seed=2)
    back = unbroadcast(g, small)
    assert back.shape == small
    assert np.isclose((np.broadcast_to(x, shape) * g).sum(), (x * back).sum())


STEPS = [
    lambda a, b: a * b,
    lambda a, b: a + b,
    lambda a, b: 1.0 - a,
    lambda a, b: a / (b * b + 2.0),
    lambda a, b: (a * 0.3).sum(dim=1, keepdim=True) * 0.2 - b,
    lambda a, b: (a * 0.1).exp() @ b.T @ b * 0.1,
    lambda a, b: cat([a, b])[[0, 3, 3]],
]
programs = st.lists(st.tuples(st.sampled_from(STEPS), st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=9)


@quick
@given(st.integers(0, 2**32 - 1), programs)
def test_random_graphs_against_central_differences(seed, program):
    """A few smooth operations wired at random: reuse, diamonds and dead ends come by themselves."""

    def run(*inputs):
        made = list(inputs)
        for step, i, j in program:
            result = step(made[i % len(made)], made[j % len(made)])
            made.append(result / (result * result + 1.0))  # keeps the numbers small
        return made[-1] + made[0] * 0.0

    check_gradients(run, normal(3, 2, seed=seed), normal(3, 2, seed=seed + 1), tolerance=1e-4)


@quick
@given(st.integers(1, 30), st.integers(1, 30))
def test_the_number_of_paths_does_not_matter(doublings, uses):
    x = Tensor(1.0, requires_grad=True, dtype=np.float64)
    y = x
    for _ in range(doublings):
        y = y + y
    total = y
    for _ in range(uses - 1):
        total = total + y
    total.backward()
    assert x.grad.item() == uses * 2.0**doublings


def test_numeric_gradient_of_a_quadratic_is_exact():
    a = normal(4, 4, seed=3)
    x = normal(4, seed=4)
    assert np.allclose(numeric_gradient(lambda v: float(v @ a @ v), x), (a + a.T) @ x, atol=1e-8)
