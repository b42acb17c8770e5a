"""Dimensions: exact integer arithmetic over named symbols, in place of sympy.

A dimension is a plain int where it is known and a `Dim` where it is not: an integer polynomial
over symbols and over *opaque atoms*, which stand for what is no polynomial (an inexact floor
division, a minimum, a broadcast of two unknowns). Atoms are built in one canonical form, so equal
expressions compare equal as far as the rules below see it. Unequal ones may still be equal at run
time: ask `equal` and `less` for what is proven.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from graphopt._polynomial import (
    Atom,
    Dim,
    DimLike,
    bounds,
    ceil_div,
    floor_div,
    of_atom,
)

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
    return of_atom(Atom(op, tuple(sorted(members, key=str))))


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
        if bounds(one)[0] >= 2 or is_cut_of(other, one):
            return one
    members = dict.fromkeys((*_members("broadcast", a), *_members("broadcast", b)))
    if len(members) == 1:
        return a
    return of_atom(Atom("broadcast", tuple(sorted(members, key=str))))


def is_cut_of(value: DimLike, whole: DimLike) -> bool:
    """Whether value is min(whole, k), k >= 2: then it is 1 only where whole is.

    So two operands of these sizes are equal wherever they broadcast.
    """
    atom = value.atom() if isinstance(value, Dim) else None
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
    return _rebuild(value, lambda atom: known.get(atom, of_atom(atom)))


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
