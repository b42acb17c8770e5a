"""The numpy table against ONNX Runtime on random nodes: equal, or left to ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from graphopt import ir
from graphopt.execute import evaluate, output_bytes
from graphopt.runner import run_session, session
from tests._models import node_model

Case = tuple[str, list[Any], dict[str, Any]]
Make = Callable[["Maker"], Case]

_FLOATS: tuple[Any, ...] = (np.float32, np.float64, np.float16)
_OTHERS: tuple[Any, ...] = (np.int64, np.int32, np.uint8, np.int8, np.bool_, np.int16, np.uint64)
_CASES = 120


class Maker:
    """Random dtypes, shapes and arrays; shapes are often empty, of rank 0, or broadcast."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.dtype = self.pick(*_FLOATS, *_OTHERS)
        self.opset = self.pick(13, 18, 20)
        self.shape = tuple(self.numbers(0 if self.chance(0.1) else 1, 5, self.number(0, 4)))
        self.x = self.array(self.shape)

    def number(self, low: int, high: int) -> int:
        """low..high - 1"""
        return int(self.rng.integers(low, high))

    def numbers(self, low: int, high: int, count: int) -> list[int]:
        """Several of them."""
        return [int(i) for i in self.rng.integers(low, high, count)]

    def chance(self, share: float) -> bool:
        """True in that share of cases."""
        return bool(self.rng.random() < share)

    def pick(self, *items: Any) -> Any:
        """One of them."""
        return items[self.number(0, len(items))]

    def axis(self) -> int:
        """An axis of the shape, from either end; ranks of 0 give 0."""
        rank = len(self.shape)
        return self.number(-rank, rank) if rank else 0

    def array(self, shape: tuple[int, ...], dtype: Any = None) -> Any:
        """Small and large numbers, some of them special."""
        dtype = dtype or self.dtype
        if dtype == np.bool_:
            return self.rng.random(shape) < 0.5
        if dtype in _FLOATS:
            array = self.rng.standard_normal(shape) * self.pick(1, 10, 1e4)
            if array.size and self.chance(0.3):
                array.reshape(-1)[0] = self.pick(np.inf, -np.inf, np.nan, -0.0)
            return array.astype(dtype)
        info = np.iinfo(dtype)
        wide = self.chance(0.3)
        low, high = (info.min // 2, info.max // 2) if wide else (max(-9, info.min), 9)
        return self.rng.integers(low, high, shape).astype(dtype)

    def other(self, dtype: Any = None) -> Any:
        """An array that broadcasts to the shape."""
        dims = [1 if self.chance(0.3) else d for d in self.shape]
        return self.array(tuple(dims[self.number(0, len(dims) + 1) :]), dtype)


def i64(numbers: list[int]) -> Any:
    """A list of int64."""
    return np.asarray(numbers, np.int64)


def _slice(m: Maker) -> Case:
    axes = [int(a) for a in m.rng.permutation(len(m.shape))[: m.number(0, 3)]]
    extreme = (-(2**63), 2**63 - 1)
    ends = [[m.pick(*extreme) if m.chance(0.15) else m.number(-7, 8) for _ in axes] for _ in "se"]
    steps = [m.pick(1, 2, -1, -2) for _ in axes]
    return "Slice", [m.x, *map(i64, (*ends, axes, steps))], {}


def _reduce(m: Maker) -> Case:
    op = m.pick("ReduceSum", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceMean")
    axes = [int(a) for a in m.rng.permutation(len(m.shape))[: m.number(0, 3)]]
    attributes: dict[str, Any] = {"keepdims": m.number(0, 2)}
    if m.opset >= 18 or op == "ReduceSum":
        return op, [m.x, *([i64(axes)] if m.chance(0.8) else [])], attributes
    return op, [m.x], {**attributes, **({"axes": axes} if axes else {})}


def _split(m: Maker) -> Case:
    count = m.number(1, 4)
    return "Split", [m.x], {"axis": m.axis(), **({"num_outputs": count} if m.opset > 13 else {})}


MAKERS: dict[str, Make] = {
    "binary": lambda m: (m.pick("Add", "Sub", "Mul", "Div", "Mod", "Pow"), [m.x, m.other()], {}),
    "compare": lambda m: (
        m.pick("Equal", "Less", "GreaterOrEqual", "And", "Or", "Xor"),
        [m.x, m.other()],
        {},
    ),
    "variadic": lambda m: (m.pick("Max", "Min", "Sum"), [m.x, m.other(), m.other()], {}),
    "unary": lambda m: (
        m.pick("Abs", "Neg", "Ceil", "Floor", "Round", "Exp", "Sqrt", "Not", "Shape", "NonZero"),
        [m.x],
        {},
    ),
    "cast": lambda m: ("Cast", [m.x], {"to": m.pick(1, 2, 3, 4, 5, 6, 7, 9, 10, 11, 12, 13)}),
    "where": lambda m: ("Where", [m.other(np.bool_), m.x, m.other()], {}),
    "clip": lambda m: ("Clip", [m.x, m.pick(m.array(()), None), m.pick(m.array(()), None)], {}),
    "reshape": lambda m: ("Reshape", [m.x, i64(m.numbers(-1, 5, m.number(0, 4)))], {}),
    "squeeze": lambda m: (
        m.pick("Squeeze", "Unsqueeze"),
        [m.x, i64(m.numbers(-3, 3, m.number(0, 3)))],
        {},
    ),
    "transpose": lambda m: (
        "Transpose",
        [m.x],
        {"perm": [int(a) for a in m.rng.permutation(len(m.shape))]} if m.shape else {},
    ),
    "gather": lambda m: ("Gather", [m.x, m.rng.integers(-5, 5, (2, 1))], {"axis": m.axis()}),
    "concat": lambda m: ("Concat", [m.x, m.array(m.shape)], {"axis": m.axis()}),
    "expand": lambda m: ("Expand", [m.x, i64(m.numbers(1, 4, m.number(0, 5)))], {}),
    "tile": lambda m: ("Tile", [m.x, i64(m.numbers(0, 3, len(m.shape)))], {}),
    "pad": lambda m: ("Pad", [m.x, i64(m.numbers(-1, 3, 2 * len(m.shape)))], {}),
    "slice": _slice,
    "reduce": _reduce,
    "split": _split,
}


def check(m: Maker, op: str, inputs: list[Any], attributes: dict[str, Any]) -> None:
    """Compare one node's results."""
    proto = node_model(op, inputs, m.opset, attributes.get("num_outputs", 1), **attributes)
    node = next(iter(ir.serde.deserialize_model(proto).graph))
    found = evaluate(node, inputs, m.opset)
    if found is None:
        return
    try:
        loaded = session(proto.SerializeToString())
        wanted = run_session(loaded, [o.name for o in loaded.get_outputs()], {})
    except Exception:  # noqa: BLE001  no kernel for the dtype, or an invalid node
        return
    predicted = output_bytes(node, inputs, {"": m.opset})
    assert predicted is None or predicted >= sum(a.nbytes for a in found)
    for a, b in zip(found, wanted, strict=True):
        said = f"{op} {attributes} {inputs} -> {a}, not {b}"
        assert (a.dtype, a.shape) == (b.dtype, b.shape), said
        if b.dtype.kind != "f":
            assert np.array_equal(a, b), said
            continue
        finite = np.abs(np.where(np.isfinite(b), b, 0))
        scale = 1e-6 * float(np.max(finite, initial=0))
        close = np.allclose(np.asarray(a, b.dtype), b, rtol=1e-5, atol=scale, equal_nan=True)
        assert close, said


@pytest.mark.parametrize("kind", MAKERS)
def test_fuzz(kind: str) -> None:
    """Random nodes of one kind."""
    for seed in range(_CASES):
        maker = Maker(seed)
        check(maker, *MAKERS[kind](maker))
