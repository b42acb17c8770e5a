"""Types, shapes and small tensors' elements of every value of a model, symbolically.

Whatever is claimed holds in every run that succeeds; what is not decided is unknown. A size that
nothing tells is a symbol of its own, so a shape is a full tuple or, without a rank, None.
Two symbols become one only where a node that always runs would fail unless they are equal.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from itertools import count

from graphopt import ir
from graphopt.dims import Atom, Dim, DimLike, atoms, bounds, product, substitute
from graphopt.errors import InputError
from graphopt.shapes import control
from graphopt.shapes.call import (
    FOLLOWED,
    MAX_VALUES,
    NOTHING,
    Call,
    Fact,
    Shape,
    Unknown,
    Values,
    array_of,
    static,
)
from graphopt.shapes.fallback import infer_with_onnx
from graphopt.shapes.ops import SHAPES, TYPES, TypeRule
from graphopt.shapes.values import RULES as VALUES
from graphopt.shapes.values import convert

__all__ = ["Shapes"]

# What rules raise on a model that is malformed or undecided: both mean unknown.
_UNDECIDED = (
    Unknown,
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    MemoryError,
    OSError,
    RecursionError,
    TypeError,
    ValueError,
)


_MAX_RANK = 64
_MAX_SIZE = 1 << 63
_BUDGET = 200_000  # nodes inferred in calls of functions and in repeated looks at a loop


class Shapes:
    """What is known of the values of a model.

    Runs over the whole model once: main graph, functions with unknown inputs, and subgraphs. A
    pass that edits the model keeps it in step with `update` for each new or rewired node, in
    topological order, and `forget` for values that are gone.

    `overrides` gives inputs of the main graph a shape of ints and symbols' names, by input name.
    Raises InputError for an override of no input, or of another rank; never for a model.
    """

    @ir.paused_gc()
    def __init__(
        self, model: ir.Model, *, overrides: Mapping[str, Sequence[int | str]] | None = None
    ) -> None:
        self.model = model
        self.sizes: set[DimLike] = set()  # expressions at least 0, as they are sizes
        self.conditional = 0  # how many bodies that may not run are being inferred
        self.body: ir.Graph | None = None  # the innermost one that runs many times
        self.site: tuple[ir.Node, ...] = ()  # the calls whose function is being inferred
        self.facts: dict[ir.Value, Fact] = {}
        self.arguments: Mapping[str, ir.Attr] | None = None
        self._merged: dict[Atom, DimLike] = {}
        self._minted: dict[tuple[object, ...], Dim] = {}
        self._homes: dict[Atom, ir.Graph] = {}
        self._numbers = count()
        self._budget = _BUDGET
        self._override(overrides or {})
        for value in model.graph.inputs:
            self.fact(value)
        self.infer_graph(model.graph, model.graph)
        control.infer_functions(self)

    def shape(self, value: ir.Value) -> Shape | None:
        """The sizes, each an int or a `Dim`; None where the rank is unknown, or for no tensor."""
        return self.fact(value).shape

    def dtype(self, value: ir.Value) -> ir.DataType | None:
        """The element type of a tensor, or None."""
        return self.fact(value).dtype

    def values(self, value: ir.Value) -> Values | None:
        """The elements of a small tensor as int, bool, float or `Dim`, or None.

        Given for integers and booleans up to 1024 elements and floats up to 16.
        """
        values = self.fact(value).values
        if values is None:
            return None
        for element in values.ravel().tolist():
            if isinstance(element, Dim) and any(a.op == "value" for a in atoms(element)):
                return None
        return values

    def is_static(self, value: ir.Value) -> bool:
        """Whether every size is a number."""
        shape = self.fact(value).shape
        return shape is not None and not any(isinstance(size, Dim) for size in shape)

    def size(self, value: ir.Value) -> DimLike | None:
        """The number of elements; None where the rank is unknown."""
        shape = self.fact(value).shape
        try:
            return None if shape is None else product(shape)
        except OverflowError:
            return None

    def nonnegative(self, value: DimLike) -> bool:
        """Whether an element or size is proven to be at least 0."""
        return bounds(value)[0] >= 0 or value in self.sizes

    def update(self, node: ir.Node, root: ir.Graph) -> None:
        """Infer the outputs of one node anew; `root` imports its opsets (see `ir.scopes`)."""
        self._budget = _BUDGET
        self._update(node, root)

    def _update(self, node: ir.Node, root: ir.Graph) -> None:
        inputs = [None if value is None else self.fact(value) for value in node.inputs]
        call = Call(self, node, inputs, ir.opset(root, node.domain), root)
        facts = self._infer(call)
        for index, value in enumerate(node.outputs):
            fact = facts[index] if index < len(facts) else NOTHING
            if fact.dtype is None or fact.shape is None:
                fact = self._recorded(value, fact)
            self._check(fact)
            self.facts[value] = fact

    def forget(self, value: ir.Value) -> None:
        """Drop what is known of a value that was removed, or whose constant was replaced."""
        self.facts.pop(value, None)

    def calling(self, node: ir.Node) -> AbstractContextManager[ir.Function]:
        """Within it, this object tells of the called function's body what holds in that call."""
        if not self.site:
            self._budget = _BUDGET
        return control.calling(self, node)

    # What follows is for the rules.

    def infer_graph(self, graph: ir.Graph, root: ir.Graph) -> None:
        """Infer every node of a graph, in order."""
        for node in graph:
            self._update(node, root)

    def fact(self, value: ir.Value) -> Fact:
        """What is known of a value, merged symbols replaced."""
        fact = self.facts.get(value)
        if fact is None:
            fact = self.facts[value] = self._source(value)
        if fact.merges != len(self._merged):
            self._refresh(fact)
        return fact

    def mint(self, value: ir.Value, kind: str, index: int) -> Dim:
        """The symbol for an unknown size ("fresh") or element ("value") of a value.

        The same each time it is asked for, since it names the same number.
        """
        key = (value, kind, index, self.site)
        known = self._minted.get(key)
        if known is None:
            make = Dim.fresh if kind == "fresh" else Dim.value
            known = self._minted[key] = make(next(self._numbers))
            atom = known.atom()
            if self.body is not None and atom is not None:
                self._homes[atom] = self.body
        return known

    def spend(self, nodes: int) -> bool:
        """Whether that many nodes may be inferred beyond the one look that each gets."""
        self._budget -= nodes
        return self._budget >= 0

    def is_local(self, value: DimLike, body: ir.Graph) -> bool:
        """Whether an expression says something of one iteration of a body only."""
        return any(self._homes.get(atom) is body for atom in atoms(value))

    def bound(self, attr: ir.Attr) -> ir.Attr | None:
        """The caller's attribute that a function's body refers to; None where it is open."""
        if self.arguments is None:
            return None
        return self.arguments.get(attr.ref_attr_name or "")

    def merge(self, a: DimLike, b: DimLike) -> None:
        """Take note that two sizes are equal, where the node that says so always runs."""
        if self.conditional:
            return
        difference = self._resolve(a - b)
        if not isinstance(difference, Dim):
            return
        best: tuple[tuple[bool, tuple[str, str]], Atom, DimLike] | None = None
        for monomial, factor in difference.terms:
            if len(monomial) != 1 or monomial[0].op not in ("symbol", "fresh"):
                continue
            if any(f % factor for _, f in difference.terms):
                continue
            atom = monomial[0]
            rest = difference - Dim((((atom,), factor),))
            solution = -(rest // factor)
            if atom in atoms(solution) or (isinstance(solution, int) and solution < 0):
                continue
            rank = (atom.op == "fresh", atom.key)
            if best is None or rank > best[0]:
                best = rank, atom, solution
        if best is not None:
            self._merged[best[1]] = best[2]
            if isinstance(best[2], Dim):
                self.sizes.add(best[2])

    def _resolve(self, value: DimLike) -> DimLike:
        first = value
        while isinstance(value, Dim) and any(atom in self._merged for atom in atoms(value)):
            value = substitute(value, self._merged)
        atom = first.atom() if isinstance(first, Dim) and value is not first else None
        if atom is not None and atom in self._merged:
            self._merged[atom] = value  # the next one takes a single step
        return value

    def _refresh(self, fact: Fact) -> None:
        fact.merges = len(self._merged)
        try:
            if fact.shape is not None and any(isinstance(size, Dim) for size in fact.shape):
                fact.shape = tuple([self._resolve(size) for size in fact.shape])
            if fact.read and fact.values is not None:
                flat = fact.values.ravel().tolist()
                flat = [self._resolve(e) if isinstance(e, Dim) else e for e in flat]
                fact.values = array_of(flat, fact.values.shape)
        except _UNDECIDED:  # what was known still holds
            return

    def _override(self, overrides: Mapping[str, Sequence[int | str]]) -> None:
        inputs = {value.name: value for value in self.model.graph.inputs}
        for name, sizes in overrides.items():
            value = inputs.get(name)
            if value is None:
                raise InputError(f"a shape is given for {name!r}, which is no input of the model")
            if value.shape is not None and len(value.shape) != len(sizes):
                raise InputError(
                    f"input {name!r} has {len(value.shape)} axes, the shape given {len(sizes)}"
                )
            if any(isinstance(size, int) and size < 0 for size in sizes):
                raise InputError(f"the shape given for input {name!r} has a negative size")
            shape = tuple([s if isinstance(s, int) else Dim.symbol(s) for s in sizes])
            self.facts[value] = Fact(value.dtype, shape)
            for axis, size in enumerate(value.shape or ()):
                if isinstance(size, ir.SymbolicDim) and size.value:
                    self.merge(Dim.symbol(size.value), shape[axis])

    def _source(self, value: ir.Value) -> Fact:
        """What is known of a value that no inferred node makes: input, constant or unknown."""
        try:
            tensor = ir.constant(value)
            if tensor is not None:
                return Fact(tensor.dtype, tuple(tensor.shape.numpy()), tensor=tensor)
            fact = self._recorded(value, NOTHING)
            default = value.const_value
            if fact.shape is None and value.is_initializer() and default is not None:
                return Fact(default.dtype, tuple(default.shape.numpy()))
        except _UNDECIDED:
            return NOTHING
        return fact

    def _recorded(self, value: ir.Value, fact: Fact) -> Fact:
        """What inference left open, from what the file says of the value."""
        kind = value.type
        if isinstance(kind, ir.SequenceType | ir.OptionalType):
            if fact.element is not None:
                return fact
            return Fact(None, None, element=control.element_of(kind))
        dtype = fact.dtype or value.dtype
        shape = fact.shape
        if shape is None and value.shape is not None:
            shape = tuple([self._declared(value, i, s) for i, s in enumerate(value.shape)])
        if dtype is fact.dtype and shape is fact.shape:
            return fact
        return Fact(dtype, shape, fact.values, element=fact.element)

    def _declared(self, value: ir.Value, axis: int, size: int | ir.SymbolicDim) -> DimLike:
        """A size of the file: a number, a name, or nothing (negative numbers mean nothing)."""
        if isinstance(size, int) and size >= 0:
            return size
        name = None if isinstance(size, int) else size.value
        if name and value.graph is self.model.graph:
            return Dim.symbol(name)
        return self.mint(value, "fresh", axis)

    def _check(self, fact: Fact) -> None:
        """Drop a shape that no tensor has; note sizes that only the run proves not negative."""
        shape = fact.shape
        if shape is None:
            return
        if len(shape) > _MAX_RANK:
            fact.shape, fact.values = None, None
            return
        for size in shape:
            if isinstance(size, Dim):
                if not self.conditional and bounds(size)[0] < 0:
                    self.sizes.add(size)
            elif not 0 <= size < _MAX_SIZE:
                fact.shape, fact.values = None, None
                return

    def _infer(self, call: Call) -> Sequence[Fact]:
        node = call.node
        domain = "" if node.domain == "ai.onnx" else node.domain
        try:
            if node.op_identifier() in self.model.functions:
                return control.call_function(call)
            if not domain:
                special = control.RULES.get(node.op_type)
                if special is not None:
                    return special(call)
                if node.op_type == "Constant":
                    return [self._source(value) for value in node.outputs]
            rule = SHAPES.get(domain, {}).get(node.op_type)
            if rule is None:
                control.infer_bodies(call)
                return infer_with_onnx(call)
            types = _types(call, TYPES[domain].get(node.op_type, 0))
        except _UNDECIDED:
            return []
        shapes: Sequence[Shape | None] = ()
        with suppress(*_UNDECIDED):
            shapes = rule(call)
        facts = [
            Fact(types[i] if i < len(types) else None, shapes[i] if i < len(shapes) else None)
            for i in range(len(node.outputs))
        ]
        if not domain and node.op_type in VALUES:
            _follow(call, facts)
        return facts


def _types(call: Call, rule: TypeRule) -> Sequence[ir.DataType | None]:
    if isinstance(rule, ir.DataType):
        return [rule] * len(call.node.outputs)
    if isinstance(rule, int):
        return [call.dtype(rule)] * len(call.node.outputs)
    if callable(rule):
        return rule(call)
    return [r if isinstance(r, ir.DataType) else call.dtype(r) for r in rule]


def _follow(call: Call, facts: list[Fact]) -> None:
    """Compute the elements of small outputs, where the inputs' are known."""
    elements = 0
    for fact in facts:
        if fact.shape is None or fact.dtype not in FOLLOWED:
            return
        total = 1
        for size in fact.shape:
            if isinstance(size, Dim):
                return
            total *= size
        elements += total
    if elements > MAX_VALUES:
        return
    try:
        sizes = [static(fact.shape or ()) for fact in facts]
        for fact, values in zip(facts, VALUES[call.node.op_type](call, sizes), strict=True):
            if values.shape == fact.shape:
                fact.values = convert(values, fact.dtype)
    except _UNDECIDED:
        return
