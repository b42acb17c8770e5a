"""Arithmetic on elements that are known: ints, bools, floats and `Dim`s, as ONNX defines it."""

from __future__ import annotations

from typing import cast

from graphopt.dims import Dim, DimLike, equal, floor_div, less, maximum, minimum
from graphopt.shapes.call import FLOATS, Call, Scalar, Unknown, dim, number


def _whole(value: Scalar) -> DimLike:
    """Beside a symbolic operand a float counts as an int, if it is a whole number."""
    if isinstance(value, float):
        if not value.is_integer():
            raise Unknown
        return int(value)
    return value


def add(c: Call, a: Scalar, b: Scalar) -> Scalar:
    """a + b."""
    if isinstance(a, Dim) or isinstance(b, Dim):
        return _whole(a) + _whole(b)
    return a + b


def sub(c: Call, a: Scalar, b: Scalar) -> Scalar:
    """a - b."""
    if isinstance(a, Dim) or isinstance(b, Dim):
        return _whole(a) - _whole(b)
    return a - b


def mul(c: Call, a: Scalar, b: Scalar) -> Scalar:
    """a * b."""
    if isinstance(a, Dim) or isinstance(b, Dim):
        return _whole(a) * _whole(b)
    return a * b


def div(c: Call, a: Scalar, b: Scalar) -> Scalar:
    """Integers are divided toward zero; a symbolic float only where nothing is left."""
    if not isinstance(a, Dim) and not isinstance(b, Dim):
        if c.dtype(0) in FLOATS:
            return a / b
        quotient = abs(number(a)) // abs(number(b))
        return quotient if (a < 0) == (b < 0) else -quotient
    x, y = _whole(a), _whole(b)
    whole = floor_div(x, y)
    if whole * y == x:
        return whole
    if c.dtype(0) not in FLOATS and c.nonnegative(x) and c.nonnegative(y):
        return whole
    raise Unknown


def mod(c: Call, a: Scalar, b: Scalar) -> Scalar:
    """The rest of a division, with the divisor's sign unless `fmod` is set."""
    x, y = dim(a), dim(b)
    plain = not isinstance(x, Dim) and not isinstance(y, Dim) and not c.attr("fmod", int, 0)
    if not plain and not (c.nonnegative(x) and c.nonnegative(y)):
        raise Unknown
    return x % y


def power(c: Call, a: Scalar, b: Scalar) -> Scalar:
    """a to the power of b, small numbers only."""
    if isinstance(a, Dim) or isinstance(b, Dim):
        raise Unknown
    if abs(b) > 64 or (b < 0 and isinstance(a, int)):
        raise Unknown
    return cast("float", a**b)


def lower(c: Call, a: Scalar, b: Scalar) -> Scalar:
    """The smaller of two."""
    if isinstance(a, Dim) or isinstance(b, Dim):
        return minimum(_whole(a), _whole(b))
    return min(a, b)


def higher(c: Call, a: Scalar, b: Scalar) -> Scalar:
    """The larger of two."""
    if isinstance(a, Dim) or isinstance(b, Dim):
        x, y = _whole(a), _whole(b)
        for one, other in ((x, y), (y, x)):
            if not isinstance(other, Dim) and other <= 0 and c.nonnegative(one):
                return one
        return maximum(x, y)
    return max(a, b)


def _decided(answer: bool | None) -> bool:
    if answer is None:
        raise Unknown
    return answer


def is_equal(c: Call, a: Scalar, b: Scalar) -> bool:
    """Whether a == b; Unknown where that is not proven."""
    if not isinstance(a, Dim) and not isinstance(b, Dim):
        return a == b
    x, y = _whole(a), _whole(b)
    for one, other in ((x, y), (y, x)):
        if not isinstance(other, Dim) and other < 0 and c.nonnegative(one):
            return False
    return _decided(equal(x, y))


def is_less(c: Call, a: Scalar, b: Scalar) -> bool:
    """Whether a < b; Unknown where that is not proven."""
    if not isinstance(a, Dim) and not isinstance(b, Dim):
        return a < b
    x, y = _whole(a), _whole(b)
    if not isinstance(y, Dim) and y <= 0 and c.nonnegative(x):
        return False
    if not isinstance(x, Dim) and x < 0 and c.nonnegative(y):
        return True
    return _decided(less(x, y))


def negated(value: Scalar) -> bool:
    """The other truth value; Unknown for what is none."""
    if not isinstance(value, bool):
        raise Unknown
    return not value


def truth(value: Scalar) -> bool:
    """A truth value; Unknown for what is none."""
    if not isinstance(value, bool):
        raise Unknown
    return value


def absolute(c: Call, value: Scalar) -> Scalar:
    """The distance from 0."""
    if isinstance(value, Dim):
        if not c.nonnegative(value):
            raise Unknown
        return value
    return abs(value)
