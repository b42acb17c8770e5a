"""The polynomials behind `graphopt.dims`: atoms, sums of products, exact and floor division."""

from __future__ import annotations

import math
import operator
from typing import Union

_INFINITY = math.inf
_MAX_FACTOR = 1 << 128  # far beyond any size; hostile models would square their way up
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

    `terms` are its monomials with their factors, the highest degree first. `range` belongs to
    `bounds`, which remembers its answer there.

    The operators `+ - * // %` take ints and Dims and give an int where the result is constant.
    `//` rounds down and `%` has the divisor's sign, as in Python. They raise ZeroDivisionError for
    a divisor that is 0, and OverflowError for an expression beyond reasonable size.
    """

    __slots__ = ("_hash", "range", "terms", "weight")

    def __init__(self, terms: tuple[tuple[Monomial, int], ...]) -> None:
        self.terms = terms
        self.weight: int = sum(a.weight for m, _ in terms for a in m) + len(terms)
        if self.weight > _MAX_WEIGHT or max(abs(f) for _, f in terms) > _MAX_FACTOR:
            raise OverflowError("a dimension's expression is too large")
        self._hash = hash(terms)
        self.range: tuple[float, float] | None = None

    @staticmethod
    def symbol(name: str) -> Dim:
        """The dimension of that name: the same name is the same number everywhere in a model."""
        return of_atom(Atom("symbol", (name,)))

    @staticmethod
    def fresh(number: int) -> Dim:
        """An unnamed dimension, printed `?number`; never equal to a symbol, whatever its name."""
        return of_atom(Atom("fresh", (f"?{number}",)))

    @staticmethod
    def value(number: int) -> Dim:
        """An unknown integer of any sign: an element of a tensor, printed `$number`."""
        return of_atom(Atom("value", (f"${number}",)))

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
        for monomial, factor in terms_of(other):
            terms[monomial] = terms.get(monomial, 0) + factor
        return make_dim(terms)

    __radd__ = __add__

    def __sub__(self, other: DimLike) -> DimLike:
        return self + (-other)

    def __rsub__(self, other: DimLike) -> DimLike:
        return -self + other

    def __mul__(self, other: DimLike) -> DimLike:
        factors = terms_of(other)
        if len(factors) * len(self.terms) > _MAX_WEIGHT:
            raise OverflowError("a dimension's expression is too large")
        terms: dict[Monomial, int] = {}
        for left, a in self.terms:
            for right, b in factors:
                monomial = tuple(sorted(left + right, key=_atom_key)) if left else right
                terms[monomial] = terms.get(monomial, 0) + a * b
        return make_dim(terms)

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


def of_atom(atom: Atom) -> Dim:
    """The polynomial that is just this atom."""
    return Dim((((atom,), 1),))


def terms_of(value: DimLike) -> tuple[tuple[Monomial, int], ...]:
    """Monomials and factors; a number is one term without atoms."""
    return value.terms if isinstance(value, Dim) else (((), operator.index(value)),)


def _order(term: tuple[Monomial, int]) -> tuple[int, list[tuple[str, str]]]:
    return -len(term[0]), [a.key for a in term[0]]


def make_dim(terms: dict[Monomial, int]) -> DimLike:
    """The polynomial of these terms; an int where it is constant."""
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
    if value.range is None:
        low: float = 0
        high: float = 0
        for monomial, factor in value.terms:
            least: float = factor
            greatest: float = factor
            for atom in monomial:
                corners = [_times(a, b) for a in (least, greatest) for b in atom.bounds()]
                least, greatest = min(corners), max(corners)
            low, high = low + least, high + greatest
        value.range = low, high
    return value.range


def _times(a: float, b: float) -> float:
    return 0 if a == 0 or b == 0 else a * b


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
    return floor_div(a, b) if not isinstance(b, Dim) else of_atom(Atom("//", (a, b)))


def ceil_div(a: DimLike, b: DimLike) -> DimLike:
    """a / b rounded up, for b > 0."""
    return floor_div(a + b - 1, b)


def _div_by_int(a: Dim, b: int) -> DimLike:
    """Floor division in canonical form: all multiples of b leave the numerator."""
    if b == 0:
        raise ZeroDivisionError("a dimension is divided by 0")
    if b < 0:
        return floor_div(-a, -b)
    whole = make_dim({m: f // b for m, f in a.terms})
    rest = make_dim({m: f % b for m, f in a.terms})
    if not isinstance(rest, Dim):
        return whole + rest // b
    common = math.gcd(b, *(f for m, f in rest.terms if m))
    if common > 1:  # floor((g*P + k) / (g*c)) = floor((P + floor(k/g)) / c)
        rest = make_dim({m: f // common for m, f in rest.terms})
        return whole + floor_div(rest, b // common)
    inner = _nested(rest)
    if inner is not None:  # floor((floor(x/m) + k) / n) = floor((x + k*m) / (m*n))
        numerator, divisor, offset = inner
        return whole + floor_div(numerator + offset * divisor, b * divisor)
    return whole + of_atom(Atom("//", (rest, b)))


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
                step = make_dim({missing: number // factor})
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
    terms = terms_of(a) + b.terms
    number = math.gcd(*(f for _, f in terms))
    shared = terms[0][0]
    for monomial, _ in terms[1:]:
        for atom in set(shared):
            extra = shared.count(atom) - monomial.count(atom)
            for _ in range(max(extra, 0)):
                shared = _without(shared, (atom,)) or ()

    def reduce(value: DimLike) -> DimLike:
        return make_dim({_without(m, shared) or (): f // number for m, f in terms_of(value)})

    return reduce(a), reduce(b)
