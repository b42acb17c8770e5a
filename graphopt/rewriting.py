"""How a fusion is written: `@rewrite`, `op`, and what a rule may ask.

A pattern is a function that returns the graph it matches, in the field's own operators; the
replacement is a function that returns the graph that takes its place. The matcher takes care of
commuted operands, constants within tolerance, defaults of attributes, and intermediate values
that something else still needs. What is no fixed pattern is a root rule (`@rewrite.on`).
The style follows onnxscript's rewriter; the matcher is a backtracking goal search.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Any, cast

import numpy as np

from graphopt import ir
from graphopt._match import Apply, Pattern, PatternOp, Wild, match, needed_outside
from graphopt.context import Context
from graphopt.dims import DimLike
from graphopt.target import Target

Const = Annotated[ir.Value, "const"]
"""A capture that matches constant values only."""

Attribute = Annotated[Any, "attribute"]
"""A capture of an attribute: its plain value, the schema's default where it is absent."""

Input = ir.Value | ir.Array | float | Sequence[int] | None
Result = ir.Value | Sequence[ir.Value | None] | Mapping[ir.Value, ir.Value] | None


class Refuse(Exception):
    """A rule looked right but may not be applied; the reason goes into the report."""


def require_unneeded(nodes: Iterable[ir.Node], root: ir.Node) -> None:
    """Raises Refuse where something else needs a value of nodes that go with their root."""
    outside = needed_outside(nodes, root)
    if outside is not None:
        raise Refuse(f"{outside.name!r} is used elsewhere")


class Op:
    """What a rule sees: builds nodes at the root's place and answers questions about values.

    `op.Mul(x, 2.0, ...)` makes a node of that type and returns its first output; keyword
    arguments are attributes, `_domain` the operator's domain. Numbers take the type of the
    node's first value input; lists are int64 tensors; arrays are taken as they are.
    """

    def __init__(self, context: Context, node: ir.Node) -> None:
        assert node.graph is not None
        self.context = context
        self.node = node
        self.created: list[ir.Node] = []
        self.constants: list[ir.Value] = []
        self._root = context.root(node.graph)
        self._hint = node.outputs[0].name or node.op_type

    def __getattr__(self, op_type: str) -> Callable[..., ir.Value]:
        if op_type.startswith("_"):
            raise AttributeError(op_type)

        def build(*inputs: Input, _domain: str = "", **attributes: Any) -> ir.Value:
            return self.build(op_type, inputs, attributes, domain=_domain)[0]

        return build

    def build(
        self,
        op_type: str,
        inputs: Sequence[Input],
        attributes: Mapping[str, Any] | None = None,
        *,
        domain: str = "",
        outputs: int = 1,
    ) -> Sequence[ir.Value]:
        """Make a node with several outputs or computed attributes; returns its outputs."""
        like = next((self.dtype(v) for v in inputs if isinstance(v, ir.Value)), None)
        values = [v if isinstance(v, ir.Value | None) else self._number(v, like) for v in inputs]
        attrs = [
            value if isinstance(value, ir.Attr) else ir.convenience.convert_attribute(name, value)
            for name, value in (attributes or {}).items()
            if value is not None
        ]
        node = ir.Node(domain, op_type, values, attrs, num_outputs=outputs)
        for output in node.outputs:
            output.name = self.context.unique(f"{self._hint}_{op_type}")
        self.created.append(node)
        self.context.shapes.update(node, self._root)
        return node.outputs

    def initializer(self, array: ir.Array, hint: str = "const") -> ir.Value:
        """A constant, e.g. a new weight; dropped again where no node that stays uses it."""
        node = self.node
        assert node.graph is not None
        tensor = ir.tensor(np.ascontiguousarray(array) if array.ndim else array)
        if self.context.holds_initializers(node.graph):
            value = self.context.initializer(node.graph, tensor, f"{self._hint}_{hint}")
            self.constants.append(value)
        else:
            made = ir.Node("", "Constant", [], [ir.Attr("value", ir.AttributeType.TENSOR, tensor)])
            value = made.outputs[0]
            value.name = self.context.unique(f"{self._hint}_{hint}")
            self.created.append(made)
            self.context.shapes.update(made, self._root)
        return value

    def _number(self, value: Any, like: ir.DataType | None) -> ir.Value:
        if isinstance(value, np.ndarray):
            return self.initializer(cast(ir.Array, value))
        if isinstance(value, Sequence):
            return self.initializer(np.asarray(value, np.int64))
        if like is None:
            raise Refuse("the operand's type is unknown")
        return self.initializer(np.asarray(value, like.numpy()))

    def shape(self, value: ir.Value) -> tuple[DimLike, ...] | None:
        """Dimensions, ints or polynomials over symbols; None where the rank is unknown."""
        return self.context.shapes.shape(value)

    def rank(self, value: ir.Value) -> int | None:
        """Number of dimensions, or None."""
        shape = self.shape(value)
        return None if shape is None else len(shape)

    def dtype(self, value: ir.Value) -> ir.DataType | None:
        """Element type, or None."""
        return self.context.shapes.dtype(value)

    def values(self, value: ir.Value) -> Any:
        """Elements of a small integer tensor as ints and polynomials (object array), or None."""
        return self.context.shapes.values(value)

    def size(self, value: ir.Value) -> DimLike | None:
        """Number of elements, or None."""
        return self.context.shapes.size(value)

    def const(self, value: ir.Value | None) -> ir.Array | None:
        """The array that a constant value holds, or None."""
        return ir.array(value)

    def scalar(self, value: ir.Value | None) -> Any:
        """The Python number of a constant with a single element (of any shape), or None."""
        tensor = ir.constant(value)
        if tensor is None or tensor.size != 1 or tensor.dtype == ir.DataType.STRING:
            return None
        return tensor.numpy().reshape(()).item()

    def attr(self, node: ir.Node, name: str, default: Any = None) -> Any:
        """An attribute's plain value, or `default`."""
        return ir.attribute(node, name, default)

    def uses(self, value: ir.Value) -> int:
        """How many node inputs and graph outputs take the value."""
        return ir.use_count(value) + value.is_graph_output()

    @property
    def opset(self) -> int:
        """The ai.onnx version at the root."""
        return ir.opset(self._root)

    @property
    def target(self) -> Target:
        """What the model is optimized for."""
        return self.context.target


class Rule:
    """A rewrite: where it may start, and what it makes of a node."""

    name: str
    roots: tuple[tuple[str, str], ...]
    """(domain, operator) of the nodes it may start at."""
    benefit: int
    """Nodes that go; among the rules of a root, larger ones are tried first."""

    def apply(self, op: Op, node: ir.Node) -> Result:
        """New values for the root's outputs, or None where the rule does not apply.

        Raises:
            Refuse: where it looked right but may not be applied.
        """
        raise AssertionError(self)


class NodeRewrite(Rule):
    """A root rule: a Python function from a node to the values that replace its outputs."""

    def __init__(
        self,
        function: Callable[[Op, ir.Node], Result],
        op_types: tuple[str, ...],
        domain: str,
        benefit: int,
    ) -> None:
        self.name = function.__name__
        self.roots = tuple((domain, op_type) for op_type in op_types)
        self.benefit = benefit
        self._function = function

    def apply(self, op: Op, node: ir.Node) -> Result:
        return self._function(op, node)


class PatternRewrite(Rule):
    """A fusion: one pattern in one or more spellings, and its replacement."""

    def __init__(self, pattern: Callable[..., ir.Value]) -> None:
        self.name = pattern.__name__
        self._patterns: list[Pattern] = []
        self._replacement: Callable[..., Result] | None = None
        self.roots = ()
        self.benefit = 0
        self.spelling(pattern)

    def spelling(self, pattern: Callable[..., ir.Value]) -> Callable[..., ir.Value]:
        """Add a further way to write the same pattern; it must name the same captures."""
        captures = {
            name: Wild(name, kind=_kind(annotation))
            for name, annotation in pattern.__annotations__.items()
            if name not in ("op", "return")
        }
        traced = cast(object, pattern(cast(Op, PatternOp()), **cast(dict[str, Any], captures)))
        if not isinstance(traced, Apply):
            raise TypeError(f"{pattern.__name__}: a pattern returns the operator that it ends in")
        self._patterns.append(Pattern(traced, tuple(captures.values())))
        self.roots = tuple(dict.fromkeys((p.root.domain, p.root.op_type) for p in self._patterns))
        self.benefit = max(self.benefit, *(p.nodes for p in self._patterns))
        return pattern

    def replace(self, replacement: Callable[..., Result]) -> Callable[..., Result]:
        """Set the replacement: a function (op, captures...) → Value."""
        self._replacement = replacement
        return replacement

    def apply(self, op: Op, node: ir.Node) -> Result:
        assert self._replacement is not None, f"{self.name} has no replacement"
        needed_elsewhere = ""
        for pattern in self._patterns:
            found = match(pattern, node, op.opset, op.shape)
            if found is None:
                continue
            outside = needed_outside(found.nodes, node)
            if outside is None:
                return self._replacement(op, **found.captures)
            needed_elsewhere = needed_elsewhere or f"{outside.name!r} is used elsewhere"
        if needed_elsewhere:
            raise Refuse(needed_elsewhere)
        return None


def _kind(annotation: object) -> str:
    if annotation in (Const, "Const"):
        return "const"
    return "attribute" if annotation in (Attribute, "Attribute") else "value"


class _Decorator:
    """`@rewrite` on a pattern, `@rewrite.on(...)` on a root rule."""

    def __call__(self, pattern: Callable[..., ir.Value]) -> PatternRewrite:
        return PatternRewrite(pattern)

    def on(
        self, *op_types: str, domain: str = "", benefit: int = 1
    ) -> Callable[[Callable[[Op, ir.Node], Result]], NodeRewrite]:
        """A rule that starts at nodes of these operators."""
        return lambda function: NodeRewrite(function, op_types, domain, benefit)


rewrite = _Decorator()
