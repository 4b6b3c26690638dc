"""From a check to its negative control: the same check with wrong expectations, which no honest work can meet.

A check that passes while it also accepts a wrong value compares nothing: its answer is an object equal to
everything, a patched comparison or a forged reply. Each assertion of the check becomes a claim with a tilted
expectation (`got == _tilt(expected)`; `_same` tilts either side in turn); the worker counts the claims that held.
Which claims fail as they should on the reference solution is found out once, when the lesson is released, and only
these are kept.
"""

from __future__ import annotations

import ast
import re

COMPARING = {
    "allclose", "array_equal", "isclose", "assert_allclose", "assert_array_equal", "assert_equal",
    "assert_almost_equal", "assert_array_almost_equal",
}  # fmt: skip
DISTANCES = {"abs", "absolute", "norm"}


def control_of(source: str, keep: set[int] | None = None) -> str:
    """The control of a check. `keep` are the numbers of the claims to make; by default all that can be made."""
    tree = _Tilting(keep).visit(ast.parse(source))
    return ast.unparse(ast.fix_missing_locations(tree)) + "\n"


def numbers_in(control: str) -> set[int]:
    """Numbers of the claims that a control makes."""
    return {int(number) for number in re.findall(r"\b_claim\((\d+), lambda", control)}


class _Tilting(ast.NodeTransformer):
    """Turns assertions into claims, numbered in the order of the text."""

    def __init__(self, keep: set[int] | None):
        self.keep, self.count = keep, 0

    def visit_Assert(self, node: ast.Assert) -> ast.stmt:
        return self._claim(node.test)

    def visit_Expr(self, node: ast.Expr) -> ast.stmt:
        if isinstance(node.value, ast.Call) and _name(node.value.func) in COMPARING:
            return self._claim(node.value)
        return self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> ast.expr:
        """A distance that is computed first and asserted later: `error = np.abs(got - expected).max()`."""
        self.generic_visit(node)
        if _name(node.func) in DISTANCES and node.args and _is_difference(node.args[0]):
            node.args[0].right = _tilted(node.args[0].right)
        return node

    def _claim(self, test: ast.expr) -> ast.stmt:
        number, self.count = self.count, self.count + 1
        if self.keep is not None and number not in self.keep:
            return ast.Expr(test)  # still evaluated: what it does may matter to what follows
        wrong = _wrong(self.visit(test))
        say = ast.Lambda(ast.arguments([], [], None, [], [], None, []), wrong)
        return ast.Expr(ast.Call(ast.Name("_claim", ast.Load()), [ast.Constant(number), say], []))


def _wrong(test: ast.expr) -> ast.expr:
    """A condition that honest work does not meet. What is compared as a whole is tilted on either side, in turn."""
    if isinstance(test, ast.BoolOp):
        return ast.BoolOp(test.op, [_wrong(each) for each in test.values])
    if isinstance(test, ast.Compare) and len(test.ops) == 1 and isinstance(test.ops[0], ast.Eq):
        return _same(ast.Constant(None), [test.left, test.comparators[0]], [])
    if isinstance(test, ast.Call) and _name(test.func) in COMPARING and len(test.args) >= 2:
        return _same(test.func, test.args, test.keywords)
    return _WrongExpectation().visit(test)


def _same(compare: ast.expr, values: list[ast.expr], options: list[ast.keyword]) -> ast.expr:
    return ast.Call(ast.Name("_same", ast.Load()), [compare, *values], options)


class _WrongExpectation(ast.NodeTransformer):
    """Tilts what an assertion expects: the right side of ==, the second argument of a comparing call."""

    def visit_Compare(self, node: ast.Compare) -> ast.expr:
        self.generic_visit(node)
        if isinstance(node.ops[-1], (ast.Eq, ast.Is)):
            node.comparators[-1] = _tilted(node.comparators[-1])
        elif isinstance(node.ops[-1], (ast.In, ast.NotIn)) and len(node.ops) == 1:
            node.left = _tilted(node.left)
        return node

    def visit_Call(self, node: ast.Call) -> ast.expr:
        self.generic_visit(node)
        if _name(node.func) in COMPARING and len(node.args) >= 2:
            node.args[1] = _tilted(node.args[1])
        return node


def _tilted(value: ast.expr) -> ast.expr:
    return ast.Call(ast.Name("_tilt", ast.Load()), [value], [])


def _name(function: ast.expr) -> str:
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def _is_difference(node: ast.expr) -> bool:
    return isinstance(node, ast.BinOp) and isinstance(node.op, ast.Sub)
