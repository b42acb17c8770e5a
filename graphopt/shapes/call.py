"""What a shape rule sees: the facts known of a node's inputs, and its attributes.

Rules are plain functions over a `Call`. They raise `Unknown` where the inputs do not decide the
answer, and may raise whatever arithmetic and indexing raise on a malformed node: to the caller
(`graphopt.shapes`) all of that means unknown.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import numpy.typing as npt

from graphopt import ir
from graphopt.dims import Dim, DimLike

if TYPE_CHECKING:
    from graphopt.shapes import Shapes

Shape = tuple[DimLike, ...]
Values = npt.NDArray[np.object_]
Scalar = int | float | Dim
T = TypeVar("T")

MAX_VALUES = 1024  # elements of an integer or boolean tensor that are followed
MAX_FLOATS = 16
MAX_MINTED = 64

INTEGERS = frozenset(
    {
        ir.DataType.INT8,
        ir.DataType.INT16,
        ir.DataType.INT32,
        ir.DataType.INT64,
        ir.DataType.UINT8,
        ir.DataType.UINT16,
        ir.DataType.UINT32,
        ir.DataType.UINT64,
    }
)
FLOATS = frozenset({ir.DataType.FLOAT, ir.DataType.DOUBLE})
FOLLOWED = INTEGERS | FLOATS | {ir.DataType.BOOL}


class Unknown(Exception):
    """The inputs do not decide the answer."""


class Fact:
    """What is known of one value: of a tensor its dtype, shape and elements.

    `shape` is None where even the rank is unknown. `element` is set for sequences and optionals:
    the fact that holds for each of their members.
    """

    __slots__ = ("_tensor", "_values", "dtype", "element", "merges", "shape")

    def __init__(
        self,
        dtype: ir.DataType | None,
        shape: Shape | None,
        values: Values | None = None,
        *,
        tensor: ir.TensorProtocol | None = None,
        element: Fact | None = None,
    ) -> None:
        self.dtype = dtype
        self.shape = shape
        self.element = element
        self.merges = 0
        self._tensor = tensor
        self._values = values

    @property
    def values(self) -> Values | None:
        """The elements as int, bool, float or Dim; constants are read on first use."""
        if self._tensor is not None:
            tensor, self._tensor = self._tensor, None
            try:
                self._values = _read(tensor)
            except (OSError, RuntimeError, TypeError, ValueError):  # damaged, or its file is gone
                self._values = None
        return self._values

    @values.setter
    def values(self, values: Values | None) -> None:
        self._values, self._tensor = values, None

    @property
    def read(self) -> bool:
        """Whether `values` is at hand, and no constant waits to be read."""
        return self._tensor is None

    def without_values(self) -> Fact:
        """The same type and shape, elements unknown."""
        return Fact(self.dtype, self.shape, element=self.element)


NOTHING = Fact(None, None)


def _read(tensor: ir.TensorProtocol) -> Values | None:
    size = tensor.size
    if tensor.dtype in FLOATS:
        if size > MAX_FLOATS:
            return None
    elif tensor.dtype not in FOLLOWED or size > MAX_VALUES:
        return None
    array = tensor.numpy()
    result = np.empty(array.shape, object)
    result[...] = array.tolist()
    return result


class Call:
    """One node with the facts of its inputs; `opset` is the version its domain is imported at."""

    __slots__ = ("inputs", "node", "opset", "root", "shapes")

    def __init__(
        self,
        shapes: Shapes,
        node: ir.Node,
        inputs: list[Fact | None],
        opset: int,
        root: ir.Graph,
    ) -> None:
        self.shapes = shapes
        self.node = node
        self.inputs = inputs
        self.opset = opset
        self.root = root

    def has(self, index: int) -> bool:
        """Whether the input is given."""
        return index < len(self.inputs) and self.inputs[index] is not None

    def fact(self, index: int) -> Fact:
        """What is known of an input; Unknown where it is absent."""
        fact = self.inputs[index] if index < len(self.inputs) else None
        if fact is None:
            raise Unknown
        return fact

    def shape(self, index: int) -> Shape:
        """An input's shape; Unknown without a rank."""
        shape = self.fact(index).shape
        if shape is None:
            raise Unknown
        return shape

    def rank(self, index: int) -> int:
        """An input's rank."""
        return len(self.shape(index))

    def dtype(self, index: int) -> ir.DataType | None:
        """An input's element type, None where unknown or absent."""
        fact = self.inputs[index] if index < len(self.inputs) else None
        return None if fact is None else fact.dtype

    def values(self, index: int) -> Values:
        """An input's elements; Unknown where they are not known."""
        values = self.fact(index).values
        if values is None:
            raise Unknown
        return values

    def elements(self, index: int) -> Values:
        """An input's elements, unknown ones standing as `Dim.value` (static shapes only)."""
        fact = self.fact(index)
        if fact.values is not None:
            return fact.values
        if fact.shape is None or fact.dtype not in INTEGERS:
            raise Unknown
        sizes = static(fact.shape)
        if np.prod(sizes, dtype=object) > MAX_MINTED:
            raise Unknown
        value = self.node.inputs[index]
        assert value is not None
        result = np.empty(sizes, object)
        for position in range(result.size):
            result.flat[position] = self.shapes.mint(value, "value", position)
        fact.values = result
        return result

    def vector(self, index: int) -> list[DimLike]:
        """An integer input's elements, flat."""
        return [dim(v) for v in self.elements(index).ravel()]

    def ints(self, index: int) -> list[int]:
        """An integer input's elements where all are known numbers."""
        return [number(v) for v in self.values(index).ravel()]

    def attr(self, name: str, kind: type[T], default: T) -> T:
        """An attribute's value; Unknown for one of another kind, or that only a caller knows."""
        attr = self.node.attributes.get(name)
        if attr is None:
            return default
        if attr.is_ref():
            attr = self.shapes.bound(attr)
        value: object = None if attr is None else attr.value
        if not isinstance(value, kind):
            raise Unknown
        return value

    def attr_ints(self, name: str) -> list[int] | None:
        """A list-of-integers attribute, None where absent."""
        if name not in self.node.attributes:
            return None
        values: tuple[object, ...] = self.attr(name, tuple, ())
        return [number(v) for v in values]

    def fresh(self, axis: int, output: int = 0) -> DimLike:
        """An unknown size of an output's axis: the same symbol each time the node is inferred."""
        return self.shapes.mint(self.node.outputs[output], "fresh", axis)

    def require(self, a: DimLike, b: DimLike) -> None:
        """Note that the node fails unless the two are equal: proof to merge symbols."""
        if a != b:
            self.shapes.merge(a, b)

    def nonnegative(self, value: DimLike) -> bool:
        """Whether the number is proven to be at least 0."""
        return self.shapes.nonnegative(value)


ShapeRule = Callable[[Call], Sequence[Shape | None]]
Sizes = Sequence[tuple[int, ...]]  # the static shapes of a node's outputs
ValueRule = Callable[[Call, Sizes], Sequence[Values]]


def axis_of(axis: int, rank: int) -> int:
    """A normalized axis; Unknown where it is out of range."""
    if not -rank <= axis < rank:
        raise Unknown
    return axis + rank if axis < 0 else axis


def dim(value: object) -> DimLike:
    """An element that is an integer or symbolic; Unknown for a float."""
    if isinstance(value, Dim | int):
        return value
    raise Unknown


def number(value: object) -> int:
    """An element that is a known integer."""
    if isinstance(value, int):
        return value
    raise Unknown


def static(shape: Shape) -> tuple[int, ...]:
    """The shape as ints; Unknown where an axis is symbolic."""
    return tuple([number(d) for d in shape])


def array_of(values: Sequence[object], shape: Sequence[int] | None = None) -> Values:
    """An object array of the elements, a vector unless a shape is given."""
    result = np.empty(len(values), object)
    for index, value in enumerate(values):
        result[index] = value
    return result if shape is None else result.reshape(shape)
