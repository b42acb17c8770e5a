"""Dimensions: one canonical form, exact arithmetic, nothing claimed that does not hold."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphopt.dims import (
    Dim,
    DimLike,
    as_int,
    atoms,
    bounds,
    broadcast,
    ceil_div,
    equal,
    evaluate,
    floor_div,
    less,
    maximum,
    minimum,
    product,
    substitute,
)

B, H, W = Dim.symbol("b"), Dim.symbol("h"), Dim.symbol("w")


def test_equal_polynomials_are_equal() -> None:
    assert H * W == W * H and hash(H * W) == hash(W * H)
    assert (H + W) * (H - W) == H * H - W * W
    assert H + 1 - H == 1 and isinstance(H + 1 - H, int)
    assert 3 - H + H == 3 and 0 * H == 0
    assert Dim.symbol("?0") != Dim.fresh(0)


def test_text() -> None:
    assert str(2 * B * H - 3) == "2*b*h - 3"
    assert str(-H) == "-h"
    assert str(floor_div(H, 2)) == "(h//2)"
    assert str(maximum(H - 1, 0)) == "max(0, h - 1)"


@pytest.mark.parametrize(
    ("got", "expected"),
    [
        (floor_div(H - 1, 2) + 1, floor_div(H + 1, 2)),
        (ceil_div(H, 2), floor_div(H + 1, 2)),
        (floor_div(floor_div(H, 2), 3), floor_div(H, 6)),
        (floor_div(floor_div(H - 1, 2), 2), floor_div(H - 1, 4)),
        (floor_div(6 * H + 5, 3), 2 * H + 1),
        (floor_div(2 * H + 1, 4), floor_div(H, 2)),
        (floor_div(12 * B * H * W, B * H), 12 * W),
        (floor_div(H * H - W * W, H + W), H - W),
        (floor_div(6 * B * H, 4 * B), floor_div(3 * H, 2)),
        (floor_div(H, -1), -H),
        ((H * 4) % 4, 0),
        (floor_div(0, H), 0),
    ],
)
def test_division(got: DimLike, expected: DimLike) -> None:
    assert got == expected


def test_extremes() -> None:
    assert minimum(3, 5) == 3 and maximum(3, 5) == 5
    assert maximum(H + 1, H) == H + 1 and minimum(H + 1, H) == H
    assert maximum(minimum(H, 5), 7) == 7
    assert minimum(minimum(H, 5), minimum(7, H)) == minimum(5, H)
    assert maximum(H, 0) == H


def test_broadcast() -> None:
    assert broadcast(1, H) == H and broadcast(H, H) == H
    assert broadcast(H, 5) == 5, "H is 1 or 5"
    assert broadcast(0, H) == 0
    assert broadcast(H, W) == broadcast(W, H) == broadcast(broadcast(H, W), H)
    assert broadcast(H, minimum(H, 512)) == H
    assert broadcast(H + 2, W) == H + 2, "never 1"
    with pytest.raises(ValueError, match="do not broadcast"):
        broadcast(2, 3)


def test_what_is_proven() -> None:
    assert equal(H, -1) is False and equal(H, H) is True and equal(H, W) is None
    assert less(H, 0) is False and less(H, H + 1) is True and less(H, 3) is None
    assert bounds(H * W + 3) == (3, float("inf"))
    assert bounds(minimum(H, 8)) == (0, 8)
    assert bounds(floor_div(minimum(H, 8) - 1, 2))[0] == -1
    assert bounds(Dim.value(0))[0] == float("-inf")


def test_numbers_in_and_out() -> None:
    assert as_int(3) == 3 and as_int(H) is None
    assert evaluate(H * W + 1, {"h": 3, "w": 4}) == 13
    assert evaluate(H * W, {"h": 3}, default=1) == 3
    assert substitute(floor_div(H, 2) * W, {next(atoms(H)): 8}) == 4 * W
    pair = np.array([2, H], object) * np.array([np.int64(3), 3], object)
    assert pair.tolist() == [6, 3 * H], "elements of object arrays"
    assert product([2, H, 3]) == 6 * H
    with pytest.raises(KeyError):
        evaluate(H, {})
    with pytest.raises(ZeroDivisionError):
        floor_div(H, 0)


def test_expressions_stay_bounded() -> None:
    with pytest.raises(OverflowError):
        value: DimLike = H
        for _ in range(100):
            value = value * value
    with pytest.raises(OverflowError):
        value = H
        for index in range(1000):
            value = maximum(value, Dim.symbol(f"s{index}") + index)


def _add(a: DimLike, b: DimLike) -> DimLike:
    return a + b


def _sub(a: DimLike, b: DimLike) -> DimLike:
    return a - b


def _mul(a: DimLike, b: DimLike) -> DimLike:
    return a * b


_OPERATIONS: list[Callable[[DimLike, DimLike], DimLike]] = [
    *(_add, _sub, _mul),
    *(floor_div, minimum, maximum),
]
_LEAVES = st.one_of(st.integers(-4, 6), st.sampled_from([B, H, W]))


@given(
    start=_LEAVES,
    steps=st.lists(st.tuples(st.sampled_from(range(6)), _LEAVES), max_size=6),
    numbers=st.tuples(st.integers(0, 9), st.integers(0, 9), st.integers(0, 9)),
)
def test_arithmetic_commutes_with_evaluation(
    start: DimLike, steps: list[tuple[int, DimLike]], numbers: tuple[int, int, int]
) -> None:
    known = dict(zip("bhw", numbers, strict=True))
    value, number = start, evaluate(start, known)
    for index, operand in steps:
        divisor = evaluate(operand, known)
        if _OPERATIONS[index] is floor_div and divisor == 0:
            continue
        try:
            value = _OPERATIONS[index](value, operand)
        except OverflowError:
            return
        number = evaluate(_OPERATIONS[index](number, divisor), {})
        low, high = bounds(value)
        assert low <= number <= high
    try:
        assert evaluate(value, known) == number
    except ZeroDivisionError:  # a division that was postponed: 0 // 0 has no answer
        assert 0 in numbers
