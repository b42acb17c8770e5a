"""What graphopt knows of a model's shapes, as TVM's symbolic integers."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

from graphopt import ir
from graphopt._polynomial import terms_of as terms
from graphopt.dims import Atom, Dim, DimLike, as_int, atoms
from graphopt.shapes import Shapes

relax: Any = importlib.import_module("tvm.relax")
tirx: Any = importlib.import_module("tvm.tirx")

ENDLESS = 10**9
"""Beyond the size of any axis: exporters write such numbers for its end."""


class Sizes:
    """Shapes and shape tensors of the values of one model.

    TVM's own inference loses track where a shape is computed; graphopt's, which sees through
    shape arithmetic, stands in for it.
    """

    def __init__(self, model: ir.Model) -> None:
        self._shapes = Shapes(model)
        self._variables: dict[str, Any] = {}

    def declare(self, value: ir.Value, parameter: Any) -> None:
        """Take TVM's variables for the free dimensions of an input."""
        shape = self._shapes.shape(value)
        if shape is None or parameter.ty.shape is None:
            return
        for size, expression in zip(shape, parameter.ty.shape, strict=True):
            known = [] if as_int(size) is not None else list(atoms(size))
            if len(known) == 1 and str(known[0].name) == str(size):
                self._variables.setdefault(known[0].name, expression)

    def dtype(self, value: ir.Value) -> ir.DataType | None:
        """The type of a value's elements."""
        return self._shapes.dtype(value)

    def shape(self, value: ir.Value) -> list[Any] | None:
        """The sizes, if each can be said in terms of the inputs' sizes."""
        shape = self._shapes.shape(value)
        return None if shape is None else self._all(shape)

    def cast(self, value: ir.Value) -> list[Any] | None:
        """The sizes, with a new variable for each that only the run will tell."""
        shape = self._shapes.shape(value)
        if shape is None:
            return None
        sizes = [self._one(size) for size in shape]
        return [
            tirx.Var(f"size_{id(value)}_{axis}", "int64") if size is None else size
            for axis, size in enumerate(sizes)
        ]

    def elements(self, value: ir.Value) -> Any:
        """An integer tensor that graphopt knows: a constant, or one made of symbolic sizes."""
        values, dtype = self._shapes.values(value), self._shapes.dtype(value)
        if values is None or dtype is None or values.size == 0 or value.const_value is not None:
            return None
        if not any(isinstance(element, Dim) for element in values.ravel().tolist()):
            return relax.const(values, dtype.numpy().name)
        if dtype != ir.DataType.INT64 or values.ndim > 1:
            return None
        expressions = self._all(values.ravel().tolist())
        if expressions is None:
            return None
        shape = relax.ShapeExpr(expressions)
        if values.ndim == 1:
            return shape
        return relax.op.reshape(relax.op.shape_to_tensor(shape), ())

    def _all(self, sizes: Sequence[Any]) -> list[Any] | None:
        expressions = [self._one(size) for size in sizes]
        return None if any(e is None for e in expressions) else expressions

    def _one(self, size: DimLike) -> Any:
        number = as_int(size)
        if number is not None:
            return tirx.const(int(number), "int64")
        total = tirx.const(0, "int64")
        for monomial, factor in terms(size):
            product = tirx.const(factor, "int64")
            for atom in monomial:
                expression = self._atom(atom)
                if expression is None:
                    return None
                product = product * expression
            total = total + product
        return total

    def _atom(self, atom: Atom) -> Any:
        if atom.op in ("symbol", "fresh", "value"):
            return self._variables.get(atom.name)
        operation = _OPERATIONS.get(atom.op)
        arguments = [size for size in atom.args if not isinstance(size, str)]
        if atom.op == "min":  # of an axis and where exporters end it
            arguments = [size for size in arguments if (as_int(size) or 0) < ENDLESS]
        sizes = [self._one(size) for size in arguments]
        if operation is None or not sizes or any(size is None for size in sizes):
            return None
        result = sizes[0]
        for size in sizes[1:]:
            result = operation(result, size)
        return result


_OPERATIONS = {
    **{"//": tirx.floordiv, "min": tirx.min, "max": tirx.max},
    "broadcast": tirx.max,  # of sizes that are equal where none is 1
}
