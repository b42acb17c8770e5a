"""Write an Einsum as the MatMul, Mul, Transpose or ReduceSum that it is.

Why: no other pass knows Einsum, and runtimes prepare its operands anew at every run.
Numerics: rounding.
Needs: the rank of each operand with an ellipsis, no letter twice in one operand, and proof that
no operand is repeated along what is summed.
"""

from __future__ import annotations

from graphopt import ir
from graphopt.passes._views import axes_arguments
from graphopt.rewriting import Op, Refuse, rewrite

_Term = list[str]
"""The letters of an operand's axes; those that an ellipsis stands for are numbered from the end."""


_MULTIPLIED = (ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16)
_SUMMED = (*_MULTIPLIED, ir.DataType.INT32, ir.DataType.INT64)


@rewrite.on("Einsum")
def eliminate_einsum(op: Op, node: ir.Node) -> ir.Value | None:
    """One operand: Transpose and ReduceSum; two: MatMul between Transposes."""
    values = [value for value in node.inputs if value is not None]
    if not 1 <= len(values) <= 2:
        return None
    known = _SUMMED if len(values) == 1 else _MULTIPLIED
    if any(op.dtype(value) not in known for value in values):
        raise Refuse("few runtimes sum or multiply operands of this type")
    terms, result = _equation(op, node, values)
    if len(values) == 1:
        return _single(op, values[0], terms[0], result)
    return _product(op, values, terms, result)


def _equation(op: Op, node: ir.Node, values: list[ir.Value]) -> tuple[list[_Term], _Term]:
    """The letters of the operands and of the result."""
    text = str(op.attr(node, "equation", "")).replace(" ", "")
    left, arrow, right = text.partition("->")
    parts = left.split(",")
    if len(parts) != len(values):
        raise Refuse("the equation is for another number of operands")
    terms = [_letters(part, op.rank(value)) for part, value in zip(parts, values, strict=True)]
    spread = max(terms, key=lambda t: sum(len(c) > 1 for c in t))
    ellipsis = [letter for letter in spread if len(letter) > 1]
    if any(len(set(term)) != len(term) for term in terms):
        raise Refuse("a letter is twice in one operand")
    if not arrow:
        once = [c for c in sorted(set(left) - set(",.")) if left.count(c) == 1]
        return terms, ellipsis + once
    before, dots, after = right.partition("...")
    if ellipsis and not dots:
        raise Refuse("the result lacks the ellipsis")
    return terms, [*before, *ellipsis, *after]


def _letters(part: str, rank: int | None) -> _Term:
    before, dots, after = part.partition("...")
    if not dots:
        return [*part]
    if rank is None:
        raise Refuse("the rank of an operand with an ellipsis is unknown")
    count = rank - len(before) - len(after)
    return [*before, *(f"...{index}" for index in range(count, 0, -1)), *after]


def _single(op: Op, value: ir.Value, term: _Term, result: _Term) -> ir.Value:
    """One operand, summed over the letters that the result lacks."""
    if not set(result) <= set(term):
        raise Refuse("a letter of the result is in no operand")
    axes = [axis for axis, letter in enumerate(term) if letter not in result]
    kept = [letter for letter in term if letter in result]
    if axes and op.opset < 13:
        value = op.ReduceSum(value, axes=axes, keepdims=0)
    elif axes:
        value = op.ReduceSum(value, axes, keepdims=0)
    return _arranged(op, value, kept, result)


def _product(op: Op, values: list[ir.Value], terms: list[_Term], result: _Term) -> ir.Value:
    """Two operands: batch axes, the axes of either one, and a single axis that is summed over."""
    first, second = (set(term) for term in terms)
    wanted = set(result)
    summed = (first & second) - wanted
    batch = [letter for letter in result if letter in first and letter in second]
    own = [[c for c in result if c in this and c not in batch] for this in (first, second)]
    if len(summed) > 1 or (first | second) - wanted != summed or not wanted <= first | second:
        raise Refuse("it is no single product of matrices")
    _check_sizes(op, values, terms, summed)
    if not summed:
        return _elementwise(op, values, terms, result)
    if not batch and not own[0] + own[1]:
        return op.MatMul(*values)
    if not batch and not (own[0] and own[1]):
        place = 0 if own[0] else 1
        value = _arranged(op, values[place], terms[place], [*own[place], *summed])
        return op.MatMul(value, values[1 - place])
    if own[0] and own[1] and result.index(own[0][-1]) > result.index(own[1][-1]):
        values, terms, own = values[::-1], terms[::-1], own[::-1]
    rows, columns = own
    if len(columns) != 1 or not rows or (len(rows) != 1 and batch):
        raise Refuse("it is no single product of matrices")
    left = _arranged(op, values[0], terms[0], [*batch, *rows, *summed])
    right = _arranged(op, values[1], terms[1], [*batch, *summed, *columns])
    return _arranged(op, op.MatMul(left, right), [*batch, *rows, *columns], result)


def _elementwise(op: Op, values: list[ir.Value], terms: list[_Term], result: _Term) -> ir.Value:
    """Nothing is summed: a product of operands with axes of size 1 for the letters they lack."""
    operands: list[ir.Value] = []
    for value, term in zip(values, terms, strict=True):
        kept = [letter for letter in result if letter in term]
        arranged = _arranged(op, value, term, kept)
        missing = [axis for axis, letter in enumerate(result) if letter not in term]
        if missing and set(result[: len(missing)]) & set(term):
            more, attributes = axes_arguments(op, missing)
            arranged = op.Unsqueeze(arranged, *more, **attributes)
        operands.append(arranged)
    return op.Mul(*operands)


def _check_sizes(op: Op, values: list[ir.Value], terms: list[_Term], summed: set[str]) -> None:
    """Refuse where an axis of size 1 may be repeated, or the equation does not fit the operands.

    Along batch axes MatMul repeats it too.
    """
    shapes = [op.shape(value) for value in values]
    fits = all(s is None or len(s) == len(t) for s, t in zip(shapes, terms, strict=True))
    if not fits or any(shape is None for shape in shapes):
        raise Refuse("the equation does not fit the ranks of the operands")
    for letter in summed:
        sizes = [
            None if shape is None or len(shape) != len(term) else shape[term.index(letter)]
            for shape, term in zip(shapes, terms, strict=True)
        ]
        if None in sizes or sizes[0] != sizes[1]:
            raise Refuse("the sizes of an axis of both operands may differ")


def _arranged(op: Op, value: ir.Value, term: _Term, wanted: _Term) -> ir.Value:
    """A value with its axes in another order."""
    if term == wanted:
        return value
    return op.Transpose(value, perm=[term.index(letter) for letter in wanted])
