"""The numpy table says what ONNX Runtime says, or nothing."""

from __future__ import annotations

import importlib
from typing import Any, cast

import numpy as np
import pytest

from graphopt import ir
from graphopt.execute import Runner, evaluate, output_bytes
from tests._models import node_model

ml_dtypes: Any = importlib.import_module("ml_dtypes")

RNG = np.random.default_rng(0)


def floats(*shape: int, dtype: Any = np.float32) -> Any:
    """Normal numbers with some special ones among them."""
    array = RNG.standard_normal(shape)
    if array.size > 8:
        array.reshape(-1)[:6] = [0.0, -0.0, 1.0, -2.5, 1e30, 0.5]
    return array.astype(dtype)


def ints(*shape: int, dtype: Any = np.int64, low: int = -7, high: int = 8) -> Any:
    """Small integers, none negative for unsigned types."""
    info = np.iinfo(dtype)
    return RNG.integers(max(low, info.min), high, shape).astype(dtype)


def i64(*numbers: int) -> Any:
    """A list of int64."""
    return np.asarray(numbers, np.int64)


def flags(*shape: int) -> Any:
    """Random booleans."""
    return RNG.random(shape) < 0.5


X = floats(3, 4)
N = ints(3, 4)
CASES: list[tuple[str, list[Any], int, dict[str, Any]]] = [
    *((op, [X, floats(4)], 20, {}) for op in ("Add", "Sub", "Mul", "Div", "Min", "Max")),
    *((op, [N, ints(1, 4)], 20, {}) for op in ("Add", "Sub", "Mul", "Min", "Max")),
    *((op, [N.astype(np.int32), ints(dtype=np.int32)], 20, {}) for op in ("Add", "Mul", "Max")),
    *((op, [floats(3, dtype=np.float64), floats(dtype=np.float64)], 20, {}) for op in ("Add",)),
    ("Div", [ints(3, 4, low=0), ints(4, low=1)], 20, {}),
    ("Mod", [ints(3, 4, low=0), ints(4, low=1)], 20, {}),
    ("Mod", [ints(5, dtype=np.uint8), ints(5, dtype=np.uint8, low=1)], 20, {}),
    ("Pow", [np.abs(X), floats(4)], 20, {}),
    ("Pow", [X, np.float32(2).reshape(())], 20, {}),
    *((op, [X], 20, {}) for op in ("Abs", "Neg", "Ceil", "Floor", "Round", "Exp", "Sin", "Cos")),
    *((op, [np.abs(X) + 1], 20, {}) for op in ("Sqrt", "Log", "Reciprocal")),
    *((op, [N], 20, {}) for op in ("Abs", "Neg")),
    *((op, [flags(3, 1), flags(4)], 20, {}) for op in ("And", "Or", "Xor", "Equal")),
    *(
        (op, [a, b], 20, {})
        for op in ("Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual")
        for a, b in ((X, X[:1]), (N, N[1:2]))
    ),
    ("Not", [flags(4)], 20, {}),
    ("Sum", [X, floats(4), floats(3, 1)], 20, {}),
    ("Where", [flags(3, 1), X, floats(4)], 20, {}),
    ("Where", [flags(3, 4), N, ints()], 20, {}),
    ("Clip", [X, np.float32(-1).reshape(()), None], 20, {}),
    ("Clip", [X, np.float32(1).reshape(()), np.float32(-1).reshape(())], 20, {}),
    ("Clip", [N, None, np.int64(2).reshape(())], 20, {}),
    ("Clip", [X], 10, {"min": -0.5, "max": 0.5}),
    *(("Cast", [X], 20, {"to": to}) for to in (1, 10, 11, 9)),
    *(("Cast", [np.clip(X, -9, 9)], 20, {"to": to}) for to in (3, 5, 6, 7)),
    *(("Cast", [N], 20, {"to": to}) for to in (1, 11, 6, 3, 2, 13, 9)),
    *(("Cast", [flags(3)], 20, {"to": to}) for to in (1, 7, 10)),
    ("Cast", [np.clip(X, -9, 9).astype(np.float16)], 20, {"to": 1}),
    ("CastLike", [N, X], 19, {}),
    ("Identity", [X], 20, {}),
    ("Shape", [X], 20, {}),
    ("Shape", [floats(2, 3, 4)], 20, {"start": -2, "end": 3}),
    ("Shape", [floats(2, 3, 4)], 20, {"start": 2, "end": 1}),
    ("Size", [X], 20, {}),
    ("Reshape", [X, i64(2, -1)], 20, {}),
    ("Reshape", [X, i64(0, 2, 2)], 20, {}),
    ("Reshape", [floats(0, 3), i64(0, 7)], 20, {"allowzero": 1}),
    ("Reshape", [X, np.zeros(1, np.int64) - 1], 20, {}),
    ("Flatten", [floats(2, 3, 4)], 20, {}),
    ("Flatten", [floats(2, 3, 4)], 20, {"axis": 0}),
    ("Flatten", [floats(2, 3, 4)], 20, {"axis": -1}),
    ("Transpose", [floats(2, 3, 4)], 20, {}),
    ("Transpose", [floats(2, 3, 4)], 20, {"perm": [1, 2, 0]}),
    ("Squeeze", [floats(1, 3, 1)], 20, {}),
    ("Squeeze", [floats(1, 3, 1), i64(-1)], 20, {}),
    ("Squeeze", [floats(1, 3, 1)], 11, {"axes": [0]}),
    ("Unsqueeze", [X, i64(0, -1)], 20, {}),
    ("Unsqueeze", [X], 11, {"axes": [1]}),
    ("Concat", [X, floats(1, 4)], 20, {"axis": 0}),
    ("Concat", [X, floats(3, 2)], 20, {"axis": -1}),
    ("Slice", [floats(6, 5), i64(1, -9), i64(5, 9), i64(0, 1), i64(2, 1)], 20, {}),
    ("Slice", [floats(6, 5), i64(-1), i64(-(2**63)), i64(0), i64(-2)], 20, {}),
    ("Slice", [floats(6, 5), i64(9), i64(1), i64(0), i64(-1)], 20, {}),
    ("Slice", [floats(6, 5), i64(4), i64(2)], 20, {}),
    ("Slice", [floats(6, 5), i64(-9), i64(-(2**63)), i64(0), i64(-1)], 20, {}),
    ("Slice", [floats(6, 5), i64(-3), i64(-9), i64(1), i64(-2)], 20, {}),
    ("Slice", [floats(6, 5), i64(-100), i64(2**62), i64(-1)], 20, {}),
    ("Slice", [floats(6, 5)], 9, {"starts": [1, 0], "ends": [-1, 3]}),
    ("Gather", [X, i64(2, 0, -1)], 20, {}),
    ("Gather", [X, ints(2, 2, low=0, high=4, dtype=np.int32)], 20, {"axis": 1}),
    ("Gather", [X, np.asarray(-1)], 20, {"axis": -1}),
    ("Expand", [floats(3, 1), i64(2, 1, 4)], 20, {}),
    ("Expand", [floats(3, 4), i64(1)], 20, {}),
    ("Tile", [X, i64(2, 0)], 20, {}),
    ("Tile", [X, i64(2, 3)], 20, {}),
    ("ConstantOfShape", [i64(2, 3)], 20, {}),
    ("ConstantOfShape", [i64()], 20, {}),
    ("Range", [np.asarray(2), np.asarray(9), np.asarray(3)], 20, {}),
    ("Range", [np.asarray(2), np.asarray(-9), np.asarray(-3)], 20, {}),
    ("Range", [np.asarray(2), np.asarray(1), np.asarray(3)], 20, {}),
    ("Pad", [X, i64(1, 0, 0, 2)], 20, {}),
    ("Pad", [X, i64(1, 2), np.float32(7).reshape(()), i64(-1)], 20, {}),
    ("Pad", [N, i64(0, 1, 0, 1), np.asarray(-1)], 20, {}),
    ("Pad", [X], 10, {"pads": [0, 1, 0, 1], "value": 2.5}),
    *(
        (op, [x, i64(1)], 20, {"keepdims": keep})
        for op in ("ReduceSum", "ReduceMax", "ReduceMin", "ReduceProd")
        for x, keep in ((X, 1), (N, 0))
    ),
    ("ReduceSum", [X, None], 20, {"noop_with_empty_axes": 1}),
    ("ReduceSum", [N.astype(np.int32)], 20, {}),
    ("ReduceMax", [X], 13, {"axes": [-1]}),
    ("ReduceMean", [X, i64(0, 1)], 20, {"keepdims": 0}),
    ("ReduceMean", [X], 17, {"axes": [0]}),
    ("NonZero", [N], 20, {}),
]
SPLITS: list[tuple[list[Any], int, int, dict[str, Any]]] = [
    ([floats(6, 2)], 20, 3, {"num_outputs": 3}),
    ([floats(7, 2)], 20, 3, {"num_outputs": 3}),
    ([floats(6, 2), i64(1, 5)], 20, 2, {}),
    ([floats(6, 2)], 11, 2, {"split": [2, 4]}),
    ([floats(6, 4)], 13, 2, {"axis": -1}),
]


def check(op: str, inputs: list[Any], opset: int, outputs: int, attributes: Any) -> None:
    """The table's answer, where it gives one, is ONNX Runtime's."""
    proto = node_model(op, inputs, opset, outputs, **attributes)
    model = ir.serde.deserialize_model(proto)
    node = next(iter(model.graph))
    found = evaluate(node, inputs, opset)
    assert found is not None
    wanted = list(Runner(model).run({}).values())
    assert len(found) == len(wanted)
    total = 0
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        np.testing.assert_allclose(cast(Any, a), b, rtol=1e-6 if a.dtype.kind == "f" else 0)
        total += a.nbytes
    predicted = output_bytes(node, inputs, {"": opset})
    assert predicted is None or predicted >= total


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}")
def test_table_agrees(case: tuple[str, list[Any], int, dict[str, Any]]) -> None:
    op, inputs, opset, attributes = case
    if op == "ReduceSum" and attributes.get("noop_with_empty_axes"):
        node = next(
            iter(ir.serde.deserialize_model(node_model(op, inputs, opset, 1, **attributes)).graph)
        )
        assert evaluate(node, inputs, opset) is None
        return
    check(op, inputs, opset, 1, attributes)


@pytest.mark.parametrize("case", SPLITS, ids=str)
def test_split_agrees(case: tuple[list[Any], int, int, dict[str, Any]]) -> None:
    inputs, opset, outputs, attributes = case
    check("Split", inputs, opset, outputs, attributes)


@pytest.mark.parametrize(
    ("op", "inputs", "attributes"),
    [
        ("Div", [i64(-7), i64(2)], {}),
        ("Div", [i64(7), i64(0)], {}),
        ("Mod", [i64(-7), i64(2)], {}),
        ("Cast", [np.asarray([3e9], np.float32)], {"to": 6}),
        ("Cast", [np.asarray([np.nan], np.float32)], {"to": 7}),
        ("Cast", [np.asarray([2.0**63], np.float32)], {"to": 7}),
        ("Cast", [X], {"to": 16}),
        ("Cast", [X], {"to": 17}),
        ("Cast", [X], {"to": 22}),
        ("Max", [X, np.full(4, np.nan, np.float32)], {}),
        ("Add", [np.ones(3, np.float16), np.ones(3, np.float16)], {}),
        ("Reshape", [X, i64(5, 5)], {}),
        ("Gather", [X, i64(7)], {}),
        ("Squeeze", [X, i64(0)], {}),
        ("Squeeze", [X, i64()], {}),
        ("Slice", [X, i64(9), i64(2**62), i64(0), i64(-1)], {}),
        ("ReduceSum", [i64(2**62, 2**61)], {}),
        ("ReduceSum", [np.asarray([2**30, 2**30], np.int32)], {}),
        ("Clip", [np.asarray([-np.inf], np.float32)], {}),
        ("Concat", [X, N], {"axis": 0}),
        ("Add", [X, floats(5)], {}),
        ("Softmax", [X], {}),
        ("Range", [np.asarray(1), np.asarray(2), np.asarray(0)], {}),
        ("Unsqueeze", [X, None], {}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_doubtful_is_left(op: str, inputs: list[Any], attributes: dict[str, Any]) -> None:
    node = next(iter(ir.serde.deserialize_model(node_model(op, inputs, 20, 1, **attributes)).graph))
    assert evaluate(node, inputs, 20) is None


@pytest.mark.parametrize("name", ["bfloat16", "float8_e4m3fn", "int4", "float16"])
def test_moves_keep_any_dtype(name: str) -> None:
    array = np.asarray([[1, 2], [3, 4]]).astype(np.dtype(getattr(ml_dtypes, name, name)))
    node = ir.Node("", "Transpose", [])
    found = evaluate(node, [array], 20)
    assert found is not None
    assert found[0].dtype == array.dtype
    assert found[0].astype(np.float32).tolist() == [[1, 3], [2, 4]]
