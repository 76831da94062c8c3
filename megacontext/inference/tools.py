"""The calculator behind `<|python_start|>…<|python_end|>`.

An expression is parsed, never executed: the syntax tree is walked and only listed nodes have a meaning. There is no
timeout because there is nothing to time out: without powers, a result has about as many digits as its expression.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable

MAX_CHARS = 1_000
MAX_DEPTH = 100

_ARITHMETIC_CHARS = frozenset("0123456789*+-/.() ")
_BINARY: dict[type[ast.operator], Callable[[int | float, int | float], int | float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
}
_UNARY: dict[type[ast.unaryop], Callable[[int | float], int | float]] = {ast.UAdd: operator.pos, ast.USub: operator.neg}


def calculate(expression: str) -> str | None:
    """The result of an expression as Python prints it, or None when it is not allowed or has no result.

    Allowed is what nanochat's calculator is for, with the same results: arithmetic with `+ - * / //` and parentheses
    (thousands commas are dropped), and `"text".count("part")` on string literals. Everything else is None: powers,
    names, other calls, more than MAX_CHARS characters, division by zero. Safe to call from any thread.

    Two differences from nanochat, both where it is wrong or refuses: commas inside string literals are kept, and
    literals may hold any text but backslashes (nanochat refuses words such as "medieval", for the `eval` in it).
    """
    if len(expression) > MAX_CHARS or "\\" in expression:
        return None
    quoted = '"' in expression or "'" in expression
    source = expression.strip() if quoted else expression.replace(",", "").strip()
    if not quoted and not _ARITHMETIC_CHARS.issuperset(source):
        return None
    try:
        body = ast.parse(source, mode="eval").body
        result = _count(body) if quoted else _number(body, MAX_DEPTH)
    except (SyntaxError, ValueError, ArithmeticError, RecursionError, MemoryError):
        return None
    return None if result is None else str(result)


def _number(node: ast.expr, depth: int) -> int | float | None:
    """Value of an arithmetic tree, None if any node of it is not on the list."""
    if depth == 0:
        return None
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return node.value  # type: ignore[return-value]  # narrowed by the type test, which excludes bool
    if isinstance(node, ast.UnaryOp) and type(node.op) in _UNARY:
        value = _number(node.operand, depth - 1)
        return None if value is None else _UNARY[type(node.op)](value)
    if isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
        left, right = _number(node.left, depth - 1), _number(node.right, depth - 1)
        return None if left is None or right is None else _BINARY[type(node.op)](left, right)
    return None


def _count(node: ast.expr) -> int | None:
    """Value of `"text".count("part")`, None for any other tree."""
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "count"):
        return None
    if len(node.args) != 1 or node.keywords:
        return None
    text, part = _literal(node.func.value), _literal(node.args[0])
    return None if text is None or part is None else text.count(part)


def _literal(node: ast.expr) -> str | None:
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None
