"""The dependency graph: the atoms along each axis of each value of a model.

Each operator has a rule that says how the axes of its outputs come from those of its inputs and
which of them must keep in step. What has no rule freezes all that it touches and is reported.
The idea of groups of coupled indices is that of DepGraph (Fang et al. 2023, Towards any structural
pruning); single indices instead of layers make offsets, heads and shuffles plain arrays.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from graphopt import ir
from graphopt.dims import DimLike
from graphopt.pruner.atoms import Atoms, Axis, fixed
from graphopt.shapes import Shapes

__all__ = ["Axes", "Rule", "Trace", "Unknown"]

Axes = list[Axis]
Rule = Callable[["Trace", ir.Node], Sequence[Axes]]
"""Axes of each output; may leave out trailing ones, which are then fixed. Raises Unknown."""


class Unknown(Exception):
    """A rule cannot tell: everything at the node is frozen, for the reason given."""


class Trace:
    """The atoms of a model's values, once `run` has gone through it."""

    def __init__(
        self,
        model: ir.Model,
        shapes: Shapes,
        rules: Mapping[tuple[str, str], Rule],
        choices: Mapping[ir.Node, int] | None = None,
    ) -> None:
        self.model = model
        self.shapes = shapes
        self.atoms = Atoms()
        self.axes: dict[ir.Value, Axes] = {}
        self.vanishing: set[ir.Value] = set()
        """Values that are zero where the constants of pruned entries are set to zero."""
        self.unknown: Counter[str] = Counter()
        """Operators without a rule that touch something prunable, and how often."""
        self.choices = dict(choices or {})
        """Reshape → which of several output axes is to shrink."""
        self.chosen: dict[ir.Node, tuple[int, list[int], Axis]] = {}
        """Reshape → axis that was chosen, those that could be, and the atoms in question."""
        self._rules = rules

    def run(self) -> None:
        """Trace the main graph; its inputs and outputs keep their shape."""
        for value in self.model.graph.inputs:
            if not value.is_initializer():
                self.axes[value] = self.fixed(value)
        self.graph(self.model.graph)
        for value in self.model.graph.outputs:
            self.freeze(value, f"output {value.name!r} of the model")

    def graph(self, graph: ir.Graph) -> None:
        """Trace a graph's nodes in order."""
        for node in graph:
            self._node(node)

    def _node(self, node: ir.Node) -> None:
        domain = "" if node.domain == "ai.onnx" else node.domain
        rule = self._rules.get((domain, node.op_type))
        name = f"{domain}.{node.op_type}" if domain else node.op_type
        if rule is None:
            self._give_up(node, f"no rule for {name}", name)
            return
        try:
            found = rule(self, node)
        except Unknown as reason:
            self._give_up(node, f"{name}: {reason}", None)
            return
        except (LookupError, ValueError, TypeError, AttributeError):
            self._give_up(node, f"{name} with shapes that are unknown or do not fit", name)
            return
        for index, value in enumerate(node.outputs):
            axes = found[index] if index < len(found) else self.fixed(value)
            self.axes[value] = self._fitting(value, axes, name)

    def _fitting(self, value: ir.Value, axes: Axes, name: str) -> Axes:
        """The axes as long as they are; what does not fit the known shape is frozen."""
        shape = self.shapes.shape(value)
        if shape is None:
            return axes
        sizes = [size if isinstance(size, int) else 0 for size in shape]
        if len(sizes) == len(axes):
            pairs = list(zip(axes, sizes, strict=True))
            if all(len(axis) == size or not size for axis, size in pairs):
                return axes
        reason = f"{name} has an output of another shape than expected"
        for axis in axes:
            self.atoms.freeze(axis, reason)
        return [fixed(size) for size in sizes]

    def _give_up(self, node: ir.Node, reason: str, unknown: str | None) -> None:
        touched = False
        for value in node.inputs:
            if value is not None and (value in self.axes or ir.constant(value) is not None):
                touched = touched or any(self.atoms.live(axis) for axis in self.of(value))
                self.freeze(value, f"{reason} at {ir.label(node)}")
        if touched and unknown:
            self.unknown[unknown] += 1
        for graph in ir.subgraphs(node):
            for inner in graph:
                self._give_up(inner, reason, None)
        for value in node.outputs:
            self.axes[value] = self.fixed(value)

    # What follows is for the rules.

    def of(self, value: ir.Value | None) -> Axes:
        """The axes of a value; those of a constant are its own until something couples them."""
        if value is None:
            raise Unknown("an input is missing")
        known = self.axes.get(value)
        if known is None:
            tensor = ir.constant(value)
            if tensor is None:
                known = self.fixed(value)
            else:
                known = [self.atoms.fresh(size) for size in tensor.shape.numpy()]
            self.axes[value] = known
        return known

    def fixed(self, value: ir.Value) -> Axes:
        """Axes that cannot be pruned, as long as is known; none for an unknown rank."""
        shape = self.shapes.shape(value)
        return [fixed(s if isinstance(s, int) else 0) for s in shape or ()]

    def rank(self, value: ir.Value | None) -> int:
        """The number of axes. Raises Unknown where it is not known."""
        if value is None or self.shapes.shape(value) is None:
            raise Unknown("a rank is unknown")
        return len(self.of(value))

    def shape(self, value: ir.Value | None) -> tuple[DimLike, ...] | None:
        """The sizes of a value, symbolic ones too; None where the rank is unknown."""
        return None if value is None else self.shapes.shape(value)

    def size(self, value: ir.Value, axis: int) -> int:
        """The length of an axis; 0 where it is not known."""
        shape = self.shapes.shape(value)
        size = shape[axis] if shape is not None else 0
        return size if isinstance(size, int) else 0

    def freeze(
        self, value: ir.Value | None, reason: str, axes: Sequence[int] | None = None
    ) -> None:
        """These axes of a value (all, if not said) keep every index."""
        if value is None:
            return
        known = self.of(value)
        for axis in range(len(known)) if axes is None else axes:
            self.atoms.freeze(known[axis], reason)

    def unite(self, a: Axis, b: Axis, node: ir.Node) -> None:
        """Two axes keep in step. One of unknown length freezes the other."""
        reason = f"tied to a fixed axis at {ir.label(node)}"
        if a.size and b.size:
            self.atoms.unite(a, b, reason)
        else:
            self.atoms.freeze(a if a.size else b, f"tied to a free axis at {ir.label(node)}")

    def broadcast(self, axes: Sequence[Axes], node: ir.Node) -> Axes:
        """Axes of what comes of several operands, as numpy broadcasts them."""
        rank = max((len(item) for item in axes), default=0)
        found: Axes = []
        for back in range(rank, 0, -1):
            column = [item[-back] for item in axes if len(item) >= back]
            size = max(len(axis) for axis in column)
            free = any(not axis.size for axis in column)
            wide = [axis for axis in column if len(axis) == size]
            for axis in wide[1:]:
                self.unite(wide[0], axis, node)
            if free:
                for axis in column:
                    self.atoms.freeze(axis, f"tied to a free axis at {ir.label(node)}")
            found.append(fixed(size) if free and size <= 1 else wide[0])
        return found

    def vanishes(self, value: ir.Value | None, axis: Axis) -> bool:
        """Whether a value is zero at pruned atoms once the constants there are zero."""
        if value is None:
            return True
        array = ir.constant(value)
        if array is None:
            return value in self.vanishing
        if any(len(own) == len(axis) > 1 for own in self.of(value)):
            return True
        return array.size <= 16 and not array.numpy().any()
