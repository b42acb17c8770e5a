"""Dimensions: exact integer arithmetic over named symbols, in place of sympy.

A dimension is a plain int where it is known and a `Dim` where it is not: an integer polynomial
over symbols and over *opaque atoms*, which stand for what is no polynomial (an inexact floor
division, a minimum, a broadcast of two unknowns). Atoms are built in one canonical form, so equal
expressions compare equal as far as the rules below see it. Unequal ones may still be equal at run
time: ask `equal` and `less` for what is proven.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Union

__all__ = [
    "Atom",
    "Dim",
    "DimLike",
    "as_int",
    "atoms",
    "bounds",
    "broadcast",
    "ceil_div",
    "equal",
    "evaluate",
    "floor_div",
    "less",
    "maximum",
    "minimum",
    "product",
    "substitute",
]

_INFINITY = math.inf
_MAX_WEIGHT = 400  # symbols and operators in one expression: hostile models would grow them forever


class Atom:
    """An indivisible factor: a symbol, or an operation on dimensions that is no polynomial.

    `op` is "symbol" (a named dimension), "fresh" (an unnamed one), "value" (an unknown integer of
    any sign, an element of a tensor), "//", "min", "max" or "broadcast".
    """

    __slots__ = ("_hash", "args", "key", "name", "op", "weight")

    def __init__(self, op: str, args: tuple[DimLike | str, ...]) -> None:
        self.op = op
        self.args = args
        self.weight: int = 1 + sum(a.weight for a in args if isinstance(a, Dim))
        if self.weight > _MAX_WEIGHT:
            raise OverflowError("a dimension's expression is too large")
        self.name = _atom_name(op, args)
        self.key = (self.name, op)
        self._hash = hash((op, args))

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        return isinstance(other, Atom) and self.op == other.op and self.args == other.args

    def __repr__(self) -> str:
        return self.name

    def bounds(self) -> tuple[float, float]:
        """The least and greatest value that the atom can take; dimensions are at least zero."""
        if self.op in ("symbol", "fresh"):
            return 0, _INFINITY
        if self.op == "value":
            return -_INFINITY, _INFINITY
        lows, highs = zip(*(bounds(a) for a in self.args if not isinstance(a, str)), strict=True)
        if self.op == "min":
            return min(lows), min(highs)
        if self.op == "max":
            return max(lows), max(highs)
        if self.op == "broadcast":
            return min(lows), max(highs)
        if lows[1] == highs[1] and lows[1] > 0:
            return _floor(lows[0], lows[1]), _floor(highs[0], lows[1])
        if lows[0] >= 0 and lows[1] >= 0:
            return 0, highs[0]
        return -_INFINITY, _INFINITY


Monomial = tuple[Atom, ...]  # sorted, an atom repeated for its power


class Dim:
    """An integer polynomial that is not constant; immutable and hashable.

    The operators `+ - * // %` take ints and Dims and give an int where the result is constant.
    `//` rounds down and `%` has the divisor's sign, as in Python. They raise ZeroDivisionError for
    a divisor that is 0, and OverflowError for an expression beyond reasonable size.
    """

    __slots__ = ("_bounds", "_hash", "terms", "weight")

    def __init__(self, terms: tuple[tuple[Monomial, int], ...]) -> None:
        self.terms = terms
        self.weight: int = sum(a.weight for m, _ in terms for a in m) + len(terms)
        if self.weight > _MAX_WEIGHT:
            raise OverflowError("a dimension's expression is too large")
        self._hash = hash(terms)
        self._bounds: tuple[float, float] | None = None

    @staticmethod
    def symbol(name: str) -> Dim:
        """The dimension of that name: the same name is the same number everywhere in a model."""
        return _of_atom(Atom("symbol", (name,)))

    @staticmethod
    def fresh(number: int) -> Dim:
        """An unnamed dimension, printed `?number`; never equal to a symbol, whatever its name."""
        return _of_atom(Atom("fresh", (f"?{number}",)))

    @staticmethod
    def value(number: int) -> Dim:
        """An unknown integer of any sign: an element of a tensor, printed `$number`."""
        return _of_atom(Atom("value", (f"${number}",)))

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Dim) and self.terms == other.terms)

    def __str__(self) -> str:
        text = ""
        for monomial, factor in self.terms:
            sign = "-" if factor < 0 else "+"
            parts = [str(abs(factor))] if abs(factor) != 1 or not monomial else []
            parts += [a.name for a in monomial]
            text += f" {sign} {'*'.join(parts)}" if text else "-" * (factor < 0) + "*".join(parts)
        return text

    __repr__ = __str__

    def __neg__(self) -> DimLike:
        return Dim(tuple((m, -f) for m, f in self.terms))

    def __add__(self, other: DimLike) -> DimLike:
        terms = dict(self.terms)
        for monomial, factor in _terms(other):
            terms[monomial] = terms.get(monomial, 0) + factor
        return _make(terms)

    __radd__ = __add__

    def __sub__(self, other: DimLike) -> DimLike:
        return self + (-other)

    def __rsub__(self, other: DimLike) -> DimLike:
        return -self + other

    def __mul__(self, other: DimLike) -> DimLike:
        factors = _terms(other)
        if len(factors) * len(self.terms) > _MAX_WEIGHT:
            raise OverflowError("a dimension's expression is too large")
        terms: dict[Monomial, int] = {}
        for left, a in self.terms:
            for right, b in factors:
                monomial = tuple(sorted(left + right, key=_atom_key)) if left else right
                terms[monomial] = terms.get(monomial, 0) + a * b
        return _make(terms)

    __rmul__ = __mul__

    def __floordiv__(self, other: DimLike) -> DimLike:
        return floor_div(self, other)

    def __rfloordiv__(self, other: DimLike) -> DimLike:
        return floor_div(other, self)

    def __mod__(self, other: DimLike) -> DimLike:
        return self - other * floor_div(self, other)

    def __rmod__(self, other: DimLike) -> DimLike:
        return other - self * floor_div(other, self)

    def constant(self) -> int:
        """The term without symbols."""
        monomial, factor = self.terms[-1]
        return 0 if monomial else factor

    def atom(self) -> Atom | None:
        """The one atom that the dimension is, or None if it is more than that."""
        monomial, factor = self.terms[0]
        plain = len(self.terms) == 1 and len(monomial) == 1 and factor == 1
        return monomial[0] if plain else None


DimLike = Union[int, Dim]  # noqa: UP007  evaluated at run time, after Dim exists


_atom_key = operator.attrgetter("key")


def _of_atom(atom: Atom) -> Dim:
    return Dim((((atom,), 1),))


def _terms(value: DimLike) -> tuple[tuple[Monomial, int], ...]:
    return value.terms if isinstance(value, Dim) else (((), operator.index(value)),)


def _order(term: tuple[Monomial, int]) -> tuple[int, list[tuple[str, str]]]:
    return -len(term[0]), [a.key for a in term[0]]


def _make(terms: dict[Monomial, int]) -> DimLike:
    kept = [term for term in terms.items() if term[1]]
    if not kept:
        return 0
    if len(kept) == 1 and not kept[0][0]:
        return kept[0][1]
    kept.sort(key=_order)
    return Dim(tuple(kept))


def _atom_name(op: str, args: tuple[DimLike | str, ...]) -> str:
    if op in ("symbol", "fresh", "value"):
        return str(args[0])
    if op == "//":
        return "//".join(
            str(a) if isinstance(a, int) or (isinstance(a, Dim) and a.atom()) else f"({a})"
            for a in args
        ).join("()")
    return f"{op}({', '.join(map(str, args))})"


def _floor(value: float, divisor: float) -> float:
    return value if math.isinf(value) else value // divisor


def bounds(value: DimLike) -> tuple[float, float]:
    """The least and the greatest value possible where every dimension is at least zero."""
    if not isinstance(value, Dim):
        return value, value
    if value._bounds is None:
        low: float = 0
        high: float = 0
        for monomial, factor in value.terms:
            least: float = factor
            greatest: float = factor
            for atom in monomial:
                corners = [_times(a, b) for a in (least, greatest) for b in atom.bounds()]
                least, greatest = min(corners), max(corners)
            low, high = low + least, high + greatest
        value._bounds = low, high
    return value._bounds


def _times(a: float, b: float) -> float:
    return 0 if a == 0 or b == 0 else a * b


def as_int(value: DimLike) -> int | None:
    """The number, or None where it is symbolic."""
    return None if isinstance(value, Dim) else value


def equal(a: DimLike, b: DimLike) -> bool | None:
    """Whether two dimensions are the same number; None where neither answer is proven."""
    difference = a - b
    low, high = bounds(difference)
    if low > 0 or high < 0:
        return False
    return True if low == high == 0 else None


def less(a: DimLike, b: DimLike) -> bool | None:
    """Whether a < b; None where neither answer is proven."""
    low, high = bounds(a - b)
    if high < 0:
        return True
    return False if low >= 0 else None


def product(values: tuple[DimLike, ...] | list[DimLike]) -> DimLike:
    """The product of dimensions; 1 for none."""
    result: DimLike = 1
    for value in values:
        result = result * value
    return result


def floor_div(a: DimLike, b: DimLike) -> DimLike:
    """a / b rounded down; exact where the polynomial division has no rest.

    Raises ZeroDivisionError where b is 0. A symbolic b is taken not to be 0, since the division
    that it stands for would have failed.
    """
    if not isinstance(b, Dim):
        if not isinstance(a, Dim):
            return a // b
        return _div_by_int(a, b)
    if not isinstance(a, Dim) and a == 0:
        return 0
    quotient = _divide(a, b)
    if quotient is not None:
        return quotient
    a, b = _cancel(a, b)
    return floor_div(a, b) if not isinstance(b, Dim) else _of_atom(Atom("//", (a, b)))


def ceil_div(a: DimLike, b: DimLike) -> DimLike:
    """a / b rounded up, for b > 0."""
    return floor_div(a + b - 1, b)


def _div_by_int(a: Dim, b: int) -> DimLike:
    """Floor division in canonical form: all multiples of b leave the numerator."""
    if b == 0:
        raise ZeroDivisionError("a dimension is divided by 0")
    if b < 0:
        return floor_div(-a, -b)
    whole = _make({m: f // b for m, f in a.terms})
    rest = _make({m: f % b for m, f in a.terms})
    if not isinstance(rest, Dim):
        return whole + rest // b
    common = math.gcd(b, *(f for m, f in rest.terms if m))
    if common > 1:  # floor((g*P + k) / (g*c)) = floor((P + floor(k/g)) / c)
        rest = _make({m: f // common for m, f in rest.terms})
        return whole + floor_div(rest, b // common)
    inner = _nested(rest)
    if inner is not None:  # floor((floor(x/m) + k) / n) = floor((x + k*m) / (m*n))
        numerator, divisor, offset = inner
        return whole + floor_div(numerator + offset * divisor, b * divisor)
    return whole + _of_atom(Atom("//", (rest, b)))


def _nested(value: Dim) -> tuple[DimLike, int, int] | None:
    """(x, m, k) where the value is floor(x/m) + k with an integer m."""
    offset = value.constant()
    plain = value - offset
    atom = plain.atom() if isinstance(plain, Dim) else None
    if atom is None or atom.op != "//" or not isinstance(atom.args[1], int):
        return None
    numerator = atom.args[0]
    return None if isinstance(numerator, str) else (numerator, atom.args[1], offset)


def _divide(a: DimLike, b: Dim) -> DimLike | None:
    """The polynomial a / b if it leaves no rest, by long division on leading terms."""
    lead, factor = b.terms[0]
    quotient: DimLike = 0
    rest = a
    for _ in range(32):
        if not isinstance(rest, Dim):
            return quotient if rest == 0 else None
        for monomial, number in rest.terms:
            missing = _without(monomial, lead)
            if missing is not None and number % factor == 0:
                step = _make({missing: number // factor})
                quotient, rest = quotient + step, rest - step * b
                break
        else:
            return None
    return None


def _without(monomial: Monomial, part: Monomial) -> Monomial | None:
    left = list(monomial)
    for atom in part:
        if atom not in left:
            return None
        left.remove(atom)
    return tuple(left)


def _cancel(a: DimLike, b: Dim) -> tuple[DimLike, DimLike]:
    """Both without their common factor, numbers and atoms alike."""
    terms = _terms(a) + b.terms
    number = math.gcd(*(f for _, f in terms))
    shared = terms[0][0]
    for monomial, _ in terms[1:]:
        for atom in set(shared):
            extra = shared.count(atom) - monomial.count(atom)
            for _ in range(max(extra, 0)):
                shared = _without(shared, (atom,)) or ()

    def reduce(value: DimLike) -> DimLike:
        return _make({_without(m, shared) or (): f // number for m, f in _terms(value)})

    return reduce(a), reduce(b)


def minimum(a: DimLike, b: DimLike) -> DimLike:
    """The smaller of two dimensions."""
    return _extreme("min", a, b)


def maximum(a: DimLike, b: DimLike) -> DimLike:
    """The larger of two dimensions."""
    return _extreme("max", a, b)


def _extreme(op: str, a: DimLike, b: DimLike) -> DimLike:
    members: list[DimLike] = []
    for value in (*_members(op, a), *_members(op, b)):
        for other in members:
            smaller = less(other, value) if other != value else True
            if smaller is None:
                smaller = True if less(value, other) is False else None
            if smaller is not None:  # one of the two is never the extreme
                if smaller != (op == "min") and other != value:
                    members[members.index(other)] = value
                break
        else:
            members.append(value)
    members = list(dict.fromkeys(members))
    if len(members) == 1:
        return members[0]
    return _of_atom(Atom(op, tuple(sorted(members, key=str))))


def _members(op: str, value: DimLike) -> tuple[DimLike, ...]:
    atom = value.atom() if isinstance(value, Dim) else None
    if atom is None or atom.op != op:
        return (value,)
    return tuple(a for a in atom.args if not isinstance(a, str))


def broadcast(a: DimLike, b: DimLike) -> DimLike:
    """The size of an axis that two operands share under numpy's broadcasting.

    The claim holds where the operands are compatible, that is, equal or 1. A number other than 1
    decides it; so does an operand that is never below 2. Raises ValueError for unequal numbers.
    """
    if a == b or b == 1:
        return a
    if a == 1:
        return b
    if not isinstance(a, Dim) or not isinstance(b, Dim):
        if not isinstance(a, Dim) and not isinstance(b, Dim):
            raise ValueError(f"{a} and {b} do not broadcast")
        return b if isinstance(a, Dim) else a
    for one, other in ((a, b), (b, a)):
        if bounds(one)[0] >= 2 or _cut_of(other, one):
            return one
    members = dict.fromkeys((*_members("broadcast", a), *_members("broadcast", b)))
    if len(members) == 1:
        return a
    return _of_atom(Atom("broadcast", tuple(sorted(members, key=str))))


def _cut_of(value: Dim, whole: Dim) -> bool:
    """Whether value is min(whole, k), k >= 2: then it is 1 only where whole is."""
    atom = value.atom()
    if atom is None or atom.op != "min" or whole not in atom.args:
        return False
    return all(a == whole or (isinstance(a, int) and a >= 2) for a in atom.args)


def atoms(value: DimLike) -> Iterator[Atom]:
    """The symbols below an expression, each as often as it occurs."""
    if not isinstance(value, Dim):
        return
    for monomial, _ in value.terms:
        for atom in monomial:
            if atom.op in ("symbol", "fresh", "value"):
                yield atom
            else:
                for arg in atom.args:
                    if isinstance(arg, Dim):
                        yield from atoms(arg)


def _rebuild(value: DimLike, leaf: Callable[[Atom], DimLike]) -> DimLike:
    if not isinstance(value, Dim):
        return value
    total: DimLike = 0
    for monomial, factor in value.terms:
        term: DimLike = factor
        for atom in monomial:
            if atom.op in ("symbol", "fresh", "value"):
                term = term * leaf(atom)
                continue
            args = [_rebuild(a, leaf) for a in atom.args if not isinstance(a, str)]
            result = args[0]
            for arg in args[1:]:
                result = _OPERATIONS[atom.op](result, arg)
            term = term * result
        total = total + term
    return total


_OPERATIONS: dict[str, Callable[[DimLike, DimLike], DimLike]] = {
    "//": floor_div,
    "min": minimum,
    "max": maximum,
    "broadcast": broadcast,
}


def substitute(value: DimLike, known: Mapping[Atom, DimLike]) -> DimLike:
    """The expression with symbols replaced."""
    return _rebuild(value, lambda atom: known.get(atom, _of_atom(atom)))


def evaluate(value: DimLike, bindings: Mapping[str, int], default: int | None = None) -> int:
    """The number for the symbols' numbers, by name; `default` stands for symbols left out.

    Raises KeyError for a symbol without a number, and ValueError where operands of a broadcast do
    not fit together.
    """

    def leaf(atom: Atom) -> int:
        if default is None:
            return bindings[atom.name]
        return bindings.get(atom.name, default)

    result = _rebuild(value, leaf)
    assert not isinstance(result, Dim)
    return result
