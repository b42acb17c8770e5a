"""What the converters of operators are given."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from graphopt import ir
from graphopt.backends._tvm_indices import number, same, sizes
from graphopt.backends._tvm_shapes import Sizes

Converter = Callable[["Call"], Any]
"""None in place of a result is for the importer's own converter."""

_ir: Any = importlib.import_module("tvm.ir")
_relax: Any = importlib.import_module("tvm.relax")


@dataclass(frozen=True)
class Call:
    """A node to convert: the builder, its inputs (None where absent) and what is known of it."""

    builder: Any
    inputs: list[Any]
    node: ir.Node
    sizes: Sizes
    values: Mapping[str, Any]
    """All that was converted before, by name."""

    def emit(self, expression: Any) -> Any:
        """Name an expression, so that it is computed once."""
        return self.builder.emit(expression)

    def get(self, index: int) -> Any:
        """An input, None where it is absent."""
        return self.inputs[index] if index < len(self.inputs) else None

    def shape(self) -> list[Any]:
        """The first output's sizes; NotImplementedError where they are only known at run time."""
        shape = self.sizes.shape(self.node.outputs[0])
        if shape is None:
            raise NotImplementedError("the shape of its output is known at run time only")
        return shape

    def matched(self, value: Any, wanted: Sequence[Any], free: int | None = None) -> Any:
        """A tensor with free sizes that are the wanted ones, as TVM cannot tell; the run checks it.

        The last axes are those of `wanted`; the one numbered `free` stays as it is.
        """
        own = sizes(value)
        if own is None:
            return value
        before = len(wanted) - len(own)
        cast = [
            size if at + before == free or number(size) is not None else wanted[at + before]
            for at, size in enumerate(own)
        ]
        if all(map(same, own, cast)):
            return value
        return match(self.builder, value, cast)

    def attribute(self, name: str, default: Any) -> Any:
        """An attribute's plain value, or the default."""
        return ir.attribute(self.node, name, default)


def tensor(array: Any) -> Any:
    """An array as a constant of its own type; `relax.const` makes 32 bits of 64."""
    return _relax.const(array, str(array.dtype))


def match(builder: Any, value: Any, shape: Sequence[Any]) -> Any:
    """A tensor with other sizes, which the run checks.

    It gets a name before that: TVM's change of layouts forgets what it knows of an operator's
    result where the result is cast at once, and then gives the whole model up.
    """
    named = value if isinstance(value, _relax.Var) else builder.emit(value)
    return builder.match_cast(named, _relax.TensorType(list(shape), value.ty.dtype))


def is_constant(value: Any) -> bool:
    """Whether a Relax expression is a tensor that is known while compiling."""
    return isinstance(value, _ir.GenericConst)


def binding(builder: Any, value: Any) -> Any:
    """What a name stands for; None for a parameter."""
    while isinstance(value, _relax.Var):
        value = builder.lookup_binding(value)
    return value


def is_call(value: Any, operator: str) -> bool:
    """Whether an expression calls an operator of Relax."""
    return isinstance(value, _ir.Call) and str(getattr(value.op, "name", "")) == operator


def constant(builder: Any, value: Any) -> Any:
    """The array of a tensor that is known while compiling, or of a name for one; else None."""
    found = binding(builder, value)
    return found.value.numpy() if is_constant(found) else None
