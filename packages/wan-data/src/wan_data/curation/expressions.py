"""The expressions by which clips are selected, such as ``motion > 0.2 and seconds >= 2``.

They are written as in Python, and nothing of Python is run: numbers, columns, ``+ - * /``, comparisons (also in
chains), ``and``, ``or``, ``not`` and parentheses, and nothing else. An expression is compiled both to a function and to
a condition of SQLite, which select the same.
"""

import ast
import dataclasses
import math
import operator
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

COLUMNS: Mapping[str, str] = {
    "motion": "diagonals of the picture per second",
    "stillness": "share of frames equal to the one before",
    "sharpness": "variance of the Laplacian, squared levels of 255",
    "black_borders": "share of the area in letterbox and pillarbox",
    "seconds": "length of the clip",
    "frames": "at the target rate",
    "fps": "average rate of the file",
    "height": "pixels as displayed",
    "width": "pixels as displayed",
    "bytes": "size of the file",
    "samples": "windows of the clip",
}

Values = Mapping[str, Any]

_EXAMPLE = "motion > 0.2 and seconds >= 2"
_LONGEST, _DEEPEST = 1000, 50
_BINARY: dict[type[ast.operator], tuple[str, Callable[[float, float], float]]] = {
    ast.Add: ("+", operator.add),
    ast.Sub: ("-", operator.sub),
    ast.Mult: ("*", operator.mul),
    ast.Div: ("/", operator.truediv),
}
_COMPARISONS: dict[type[ast.cmpop], tuple[str, Callable[[float, float], bool]]] = {
    ast.Lt: ("<", operator.lt),
    ast.LtE: ("<=", operator.le),
    ast.Gt: (">", operator.gt),
    ast.GtE: (">=", operator.ge),
    ast.Eq: ("=", operator.eq),
    ast.NotEq: ("<>", operator.ne),
}


@dataclasses.dataclass(frozen=True)
class Where:
    """A compiled expression.

    A value that was not measured (None, NULL) makes comparisons with it neither true nor false, and ``not`` of them
    too; so does a division by zero. A clip is selected if the whole is true.

    Attributes:
        text: as it was given.
        sql: a condition of SQLite, with a question mark for each of ``parameters``; columns stand in double quotes.
        parameters: the numbers in it, in order.
        columns: the names in it.
    """

    text: str
    sql: str
    parameters: tuple[float, ...]
    columns: frozenset[str]
    _evaluate: Callable[[Values], Any]

    def selects(self, values: Values) -> bool:
        """Whether a clip is selected, from its values by column; one that is absent was not measured."""
        return self._evaluate(values) is True


def compile_where(text: str, columns: Iterable[str] = COLUMNS) -> Where:
    """Compile an expression.

    Args:
        text: the expression.
        columns: the names that may be in it.

    Raises:
        ValueError: it is no such expression; the message names the place and the columns.
    """
    return _Compiler(text, tuple(columns)).compile()


@dataclasses.dataclass(frozen=True)
class _Part:
    """A part of an expression: of numbers, or of truth."""

    evaluate: Callable[[Values], Any]
    sql: str
    parameters: tuple[float, ...]
    is_truth: bool = False


class _Compiler:
    def __init__(self, text: str, columns: Sequence[str]) -> None:
        self._text, self._columns = text, columns
        self._used: set[str] = set()

    def compile(self) -> Where:
        if len(self._text) > _LONGEST:
            raise ValueError(f"an expression of {len(self._text)} characters is too long; expected up to {_LONGEST}")
        # Each blank stays one character, so that places are those in the text.
        line = "".join(" " if character.isspace() else character for character in self._text)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about "1and 2" and "1 is 2"
                tree = ast.parse(line.lstrip(), mode="eval").body
        except SyntaxError as error:
            raise self._error((error.offset or 1) - 1, "it cannot be read") from None
        except (ValueError, MemoryError, RecursionError):
            raise self._error(0, "it cannot be read") from None
        part = self._truth(tree, 0)
        return Where(self._text, part.sql, part.parameters, frozenset(self._used), part.evaluate)

    def _error(self, place: int, what: str) -> ValueError:
        indent = len(self._text) - len(self._text.lstrip())
        shown = self._text if len(self._text) <= 80 else f"{self._text[:77]}..."
        return ValueError(
            f"at character {place + indent + 1} of {shown!r} {what}; expected an expression such as {_EXAMPLE!r} of "
            f"numbers and the columns {', '.join(self._columns)}"
        )

    def _wrong(self, node: ast.expr, what: str) -> ValueError:
        # Python counts bytes.
        before = self._text.lstrip().encode()[: node.col_offset]
        return self._error(len(before.decode()), what)

    def _truth(self, node: ast.expr, depth: int) -> _Part:
        part = self._part(node, depth)
        if not part.is_truth:
            raise self._wrong(node, "a number stands where something true or false is expected")
        return part

    def _number(self, node: ast.expr, depth: int) -> _Part:
        part = self._part(node, depth)
        if part.is_truth:
            raise self._wrong(node, "something true or false stands where a number is expected")
        return part

    def _part(self, node: ast.expr, depth: int) -> _Part:
        if depth > _DEEPEST:
            raise self._wrong(node, f"it is nested more than {_DEEPEST} times")
        match node:
            case ast.BoolOp(op, values):
                return self._joined(isinstance(op, ast.And), [self._truth(value, depth + 1) for value in values])
            case ast.UnaryOp(ast.Not(), operand):
                return _negated(self._truth(operand, depth + 1))
            case ast.UnaryOp(ast.USub() | ast.UAdd() as op, operand):
                part = self._number(operand, depth + 1)
                return part if isinstance(op, ast.UAdd) else _arithmetic("-", operator.sub, _constant(0.0), part)
            case ast.BinOp(left, op, right) if type(op) in _BINARY:
                sign, function = _BINARY[type(op)]
                return _arithmetic(sign, function, self._number(left, depth + 1), self._number(right, depth + 1))
            case ast.Compare(left, ops, comparators):
                return self._comparison(node, [left, *comparators], ops, depth)
            case ast.Name(name):
                if name not in self._columns:
                    raise self._wrong(node, f"{name!r} is no column")
                self._used.add(name)
                return _column(name)
            case ast.Constant(value) if isinstance(value, int | float) and not isinstance(value, bool):
                try:
                    number = float(value)
                except OverflowError:
                    number = math.inf
                if not math.isfinite(number):
                    raise self._wrong(node, "a number is too large")
                return _constant(number)
        raise self._wrong(node, "something else stands")

    def _joined(self, is_and: bool, parts: list[_Part]) -> _Part:
        def evaluate(values: Values) -> bool | None:
            unknown = False
            for part in parts:
                found = part.evaluate(values)
                if found is None:
                    unknown = True
                elif found is not is_and:
                    return not is_and
            return None if unknown else is_and

        sql = (" AND " if is_and else " OR ").join(part.sql for part in parts)
        return _Part(evaluate, f"({sql})", tuple(p for part in parts for p in part.parameters), is_truth=True)

    def _comparison(self, node: ast.expr, operands: list[ast.expr], ops: list[ast.cmpop], depth: int) -> _Part:
        numbers = [self._number(operand, depth + 1) for operand in operands]
        parts = []
        for op, left, right in zip(ops, numbers, numbers[1:], strict=False):
            if type(op) not in _COMPARISONS:
                raise self._wrong(node, "a comparison other than < <= > >= == != stands")
            sign, function = _COMPARISONS[type(op)]
            parts.append(_Part(_of_two(function, left, right), f"({left.sql} {sign} {right.sql})",
                               left.parameters + right.parameters, is_truth=True))  # fmt: skip
        return parts[0] if len(parts) == 1 else self._joined(True, parts)


def _of_two(function: Callable[[float, float], Any], left: _Part, right: _Part) -> Callable[[Values], Any]:
    def evaluate(values: Values) -> Any:
        one, other = left.evaluate(values), right.evaluate(values)
        return None if one is None or other is None else function(one, other)

    return evaluate


def _arithmetic(sign: str, function: Callable[[float, float], float], left: _Part, right: _Part) -> _Part:
    def calculate(one: float, other: float) -> float | None:
        # As SQLite: no number is NULL, and so is a division by zero.
        if function is operator.truediv and other == 0:
            return None
        value = function(one, other)
        return None if math.isnan(value) else value

    sql = f"({left.sql} {sign} {right.sql})"
    return _Part(_of_two(calculate, left, right), sql, left.parameters + right.parameters)


def _negated(part: _Part) -> _Part:
    def evaluate(values: Values) -> bool | None:
        found = part.evaluate(values)
        return None if found is None else not found

    return _Part(evaluate, f"(NOT {part.sql})", part.parameters, is_truth=True)


def _column(name: str) -> _Part:
    def evaluate(values: Values) -> float | None:
        value = values.get(name)
        return None if value is None or math.isnan(value) else float(value)

    # Whole numbers too are divided as real ones.
    quoted = name.replace('"', '""')
    return _Part(evaluate, f'CAST("{quoted}" AS REAL)', ())


def _constant(number: float) -> _Part:
    return _Part(lambda values: number, "?", (number,))
