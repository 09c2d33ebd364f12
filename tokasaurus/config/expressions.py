"""Arithmetic in flag values, such as ``(128 * 1024)``.

An expression is parsed to a syntax tree, of which only the nodes of a whitelist are evaluated;
nothing is ever compiled or run as Python code. Owns the grammar of an expression and its limits.
Knows no flags.

    expression := number | +e | -e | e op e | (e) | name(e, ...) | tuple or list of e
    op         := + - * / // % **
    name       := min max int round
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable
from typing import TypeAlias

__all__ = ["ExpressionError", "Value", "evaluate"]

Number: TypeAlias = int | float
Value: TypeAlias = "int | float | list[Value] | tuple[Value, ...]"

MAX_SOURCE = 200  # characters
MAX_DEPTH = 20  # of parentheses, and of the syntax tree
MAX_EXPONENT = 64
MAX_MAGNITUDE = 2**63  # exclusive; of every intermediate result too
MAX_DIGITS = 15  # second argument of round

_BINARY: dict[type[ast.operator], Callable[[Number, Number], Number]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}


class ExpressionError(ValueError):
    """An expression that is not allowed or has no value.

    Args:
        message: what is wrong.
        position: the first character at fault, counted from 1.
    """

    def __init__(self, message: str, position: int) -> None:
        super().__init__(f"{message} (character {position})")
        self.position = position


def evaluate(source: str) -> Value:
    """The value of an expression.

    Raises:
        ExpressionError: the source does not follow the grammar above, or breaks a limit.
    """
    if len(source) > MAX_SOURCE:
        raise ExpressionError(f"an expression has at most {MAX_SOURCE} characters", MAX_SOURCE + 1)
    _check_parentheses(source)
    try:
        tree = ast.parse(source, mode="eval")
    except SyntaxError as error:
        position = _position(source, error.lineno or 1, max((error.offset or 1) - 1, 0))
        raise ExpressionError("not an arithmetic expression", position) from None
    except (ValueError, MemoryError, RecursionError):  # e.g. a null character
        raise ExpressionError("not an arithmetic expression", 1) from None
    return _Walk(source).value(tree.body, 1)


def _check_parentheses(source: str) -> None:
    depth = 0
    for index, character in enumerate(source):
        if character == "#":  # would hide the rest as a comment
            raise ExpressionError("unexpected '#'", index + 1)
        depth += (character in "([") - (character in ")]")
        if depth > MAX_DEPTH:
            raise ExpressionError(f"more than {MAX_DEPTH} levels deep", index + 1)


def _position(source: str, line: int, column: int) -> int:
    before = source.splitlines(keepends=True)[: line - 1]
    return sum(map(len, before)) + column + 1


class _Walk:
    """Evaluates the tree of one source."""

    def __init__(self, source: str) -> None:
        self._source = source

    def value(self, node: ast.expr, depth: int) -> Value:
        if depth > MAX_DEPTH:
            raise self._error(f"more than {MAX_DEPTH} levels deep", node)
        if isinstance(node, ast.Tuple):
            return tuple(self.value(item, depth + 1) for item in node.elts)
        if isinstance(node, ast.List):
            return [self.value(item, depth + 1) for item in node.elts]
        return self._number(node, depth)

    def _number(self, node: ast.expr, depth: int) -> Number:
        if depth > MAX_DEPTH:
            raise self._error(f"more than {MAX_DEPTH} levels deep", node)
        try:
            result = self._compute(node, depth)
        except ZeroDivisionError:
            raise self._error("division by zero", node) from None
        except OverflowError:
            raise self._error("the result is too large", node) from None
        if isinstance(result, complex):
            raise self._error("the result is not a real number", node)
        if not abs(result) < MAX_MAGNITUDE:  # also true of nan
            raise self._error("the result is too large", node)
        return result

    def _compute(self, node: ast.expr, depth: int) -> Number:
        match node:
            case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
                return number
            case ast.UnaryOp(op=ast.UAdd(), operand=operand):
                return self._number(operand, depth + 1)
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return -self._number(operand, depth + 1)
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
                first, second = self._number(left, depth + 1), self._number(right, depth + 1)
                if isinstance(op, ast.Pow) and not 0 <= second <= MAX_EXPONENT:
                    raise self._error(f"an exponent is between 0 and {MAX_EXPONENT}", right)
                return _BINARY[type(op)](first, second)
            case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if name in _FUNCTIONS:
                return self._call(node, name, [self._number(arg, depth + 1) for arg in args])
        what = ast.get_source_segment(self._source, node) or ""
        raise self._error(f"{what!r} is not allowed in arithmetic", node)

    def _call(self, node: ast.expr, name: str, args: list[Number]) -> Number:
        low, high = _FUNCTIONS[name]
        if not low <= len(args) <= high:
            raise self._error(f"wrong number of arguments for {name}", node)
        if name == "int":
            return int(args[0])
        if name == "round":
            digits = args[1] if len(args) == 2 else None
            if digits is None:
                return round(args[0])
            if not isinstance(digits, int) or not 0 <= digits <= MAX_DIGITS:
                raise self._error(f"round takes 0 to {MAX_DIGITS} digits", node)
            return round(args[0], digits)
        return min(args) if name == "min" else max(args)

    def _error(self, message: str, node: ast.expr) -> ExpressionError:
        line = self._source.splitlines()[node.lineno - 1]
        column = len(line.encode()[: node.col_offset].decode())  # col_offset counts bytes
        return ExpressionError(message, _position(self._source, node.lineno, column))


_FUNCTIONS = {"int": (1, 1), "max": (2, 100), "min": (2, 100), "round": (1, 2)}
