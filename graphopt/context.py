"""What a pass works on: the model, what is known of its values, and where to record changes."""

from __future__ import annotations

import copy
import time
from collections import Counter
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from graphopt import ir
from graphopt.errors import TimeLimitError
from graphopt.report import PassRecord, Rewrite
from graphopt.shapes import Shapes
from graphopt.target import Target

if TYPE_CHECKING:
    from graphopt.samples import Samples

FOLD_BYTES = 1 << 20
"""How much larger than what it frees a folded constant may be, in bytes."""


class Context:
    """One model under optimization. Passes mutate `model` and keep `shapes` in step."""

    def __init__(
        self,
        model: ir.Model,
        *,
        target: Target | None = None,
        fold_bytes: int = FOLD_BYTES,
        rewrites_left: int | None = None,
        deadline: float | None = None,
        samples: Samples | None = None,
        progress: Callable[[str], None] | None = None,
    ) -> None:
        self.model = model
        self.target = target or Target.portable()
        self.fold_bytes = fold_bytes
        self.rewrites_left = rewrites_left
        self.deadline = deadline
        self.samples = samples
        """Data for the passes that calibrate or reconstruct; None where none was given."""
        self.record = PassRecord("")
        self._progress = progress
        self.refresh()

    def refresh(self) -> None:
        """Look at the model anew: after a pass that worked on it by other means than this class."""
        self.shapes = Shapes(self.model)
        self._roots = dict(ir.scopes(self.model))
        self._names, self._node_names = _all_names(self.model)

    def tell(self, text: str) -> None:
        """Say what is being done, in a pass that takes long."""
        if self._progress is not None:
            self._progress(text)

    @property
    def exhausted(self) -> bool:
        """True once the allowed number of rewrites is used up (`--bisect-limit`)."""
        return self.rewrites_left is not None and self.rewrites_left <= 0

    def check_time(self) -> None:
        """Raise TimeLimitError past the deadline."""
        if self.deadline is not None and time.monotonic() > self.deadline:
            raise TimeLimitError(f"time limit reached in pass {self.record.name!r}")

    def root(self, graph: ir.Graph) -> ir.Graph:
        """The main graph or function's graph that a graph stands in."""
        return self._roots.get(graph, graph)

    def opset(self, node: ir.Node, domain: str = "") -> int:
        """The version of a domain that a node of the model follows."""
        assert node.graph is not None
        return ir.opset(self.root(node.graph), domain)

    def adopt(self, graph: ir.Graph, root: ir.Graph) -> None:
        """Make a graph that was just put into the model known."""
        self._roots[graph] = root

    def unique(self, hint: str) -> str:
        """A name, close to the hint, that no value of the model bears; it is taken."""
        return self._names.take(hint)

    def unique_node(self, hint: str) -> str:
        """A name, close to the hint, that no node of the model bears; it is taken."""
        return self._node_names.take(hint)

    def free(self, name: str) -> None:
        """Give a value's name back, since the value is gone.

        Branches of an If may bear the same names: it is free when the last of them is gone.
        """
        self._names.uses[name] -= 1

    def free_node(self, name: str) -> None:
        """Give a node's name back, since the node is gone."""
        self._node_names.uses[name] -= 1

    def rename(self, value: ir.Value, hint: str | None = None) -> None:
        """Give a value that moved to another scope, or stood in no graph yet, a unique name.

        It keeps its own where nothing else of the model bears it.
        """
        if value.name and self._names.uses[value.name] > 0:
            self.free(value.name)
        value.name = self.unique(hint or value.name or "value")

    def initializer(self, graph: ir.Graph, tensor: ir.TensorProtocol, hint: str) -> ir.Value:
        """A new initializer of a graph (below the main graph, not in a function)."""
        name = self.unique(hint)
        value = ir.Value(
            name=name,
            shape=ir.Shape(tensor.shape.numpy()),
            type=ir.TensorType(tensor.dtype),
            const_value=_named(tensor, name),
        )
        graph.register_initializer(value)
        return value

    def holds_initializers(self, graph: ir.Graph) -> bool:
        """False inside functions, where constants are Constant nodes."""
        return self.root(graph) is self.model.graph

    def changed(
        self, rule: str, before: Iterable[ir.Node | str], after: Iterable[ir.Node | str] = ()
    ) -> None:
        """Record a rewrite: nodes, or names of what is no node, that went and came."""
        self.record.rewrites.append(Rewrite(rule, _labels(before), _labels(after)))
        if self.rewrites_left is not None:
            self.rewrites_left -= 1


def _labels(items: Iterable[ir.Node | str]) -> tuple[str, ...]:
    return tuple(item if isinstance(item, str) else ir.label(item) for item in items)


def _named(tensor: ir.TensorProtocol, name: str) -> ir.TensorProtocol:
    """The tensor under a name of its own: tensors are shared between values, names are not."""
    if tensor.name == name:
        return tensor
    twin = copy.copy(tensor)
    twin.name = name
    return twin


class _Names:
    """How often each name is in use; remembers which numbers a hint has had."""

    def __init__(self) -> None:
        self.uses: Counter[str] = Counter()
        self._numbers: Counter[str] = Counter()

    def take(self, hint: str) -> str:
        name = hint
        while self.uses[name] > 0:
            self._numbers[hint] += 1
            name = f"{hint}_{self._numbers[hint]}"
        self.uses[name] = 1
        return name


def _all_names(model: ir.Model) -> tuple[_Names, _Names]:
    """The names of all values and of all nodes."""
    values, nodes = _Names(), _Names()
    for graph in ir.graphs(model):
        values.uses.update(v.name for v in graph.inputs if v.name)
        values.uses.update(list(graph.initializers))
        for node in graph:
            values.uses.update(v.name for v in node.outputs if v.name)
            if node.name:
                nodes.uses[node.name] += 1
    return values, nodes
