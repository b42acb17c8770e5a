"""Replace calls of the model's own functions by their bodies.

Why: exporters write a function for each module; passes and backends see through none of them.
Numerics: exact.
Needs: operators that mean the same in the opsets of function and caller; no recursion.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from graphopt import ir
from graphopt.context import Context
from graphopt.pass_manager import Pass
from graphopt.passes._inlining import all_of, below, inline, obstacle
from graphopt.passes.eliminate_dead import called_functions

_Key = tuple[str, str, str]


@dataclass(frozen=True)
class InlineFunctions(Pass):
    """Expands calls, those in bodies included, and drops the functions that nothing calls then."""

    max_nodes: int = 200_000
    """How many nodes may come of it: functions that call each other twice grow without bound."""

    def run(self, context: Context) -> None:
        functions = context.model.functions
        if not functions:
            return
        inliner = _Inliner(context, self.max_nodes)
        inliner.expand(context.model.graph)
        inliner.drop()
        for function in list(functions.values()):
            inliner.expand(function.graph)
        inliner.drop()
        if inliner.inlined:
            context.refresh()


@dataclass
class _Inliner:
    context: Context
    left: int
    inlined: set[_Key] = field(default_factory=set[_Key])

    def __post_init__(self) -> None:
        self.sizes = _sizes(self.context.model)

    def expand(self, root: ir.Graph) -> None:
        """Inline every call below the main graph or a function's graph, where it may be."""
        functions = self.context.model.functions
        calls = [(n, False) for n in below(root) if n.op_identifier() in functions]
        while calls:
            call, counted = calls.pop()
            function = functions[call.op_identifier()]
            if self.context.exhausted:
                return
            size = 0 if counted else self.sizes.get(function.identifier())
            reason = self._obstacle(call, function, root, size)
            if reason:
                self.context.record.refuse(call, f"{function.name}: {reason}")
                continue
            self.left -= size or 0
            made = inline(self.context, call, function, root, "function_body")
            self.inlined.add(function.identifier())
            calls += [
                (n, True) for top in made for n in all_of(top) if n.op_identifier() in functions
            ]

    def drop(self) -> None:
        """Remove the functions of which no call is left."""
        functions, called = self.context.model.functions, called_functions(self.context.model)
        for key in [key for key in functions if key in self.inlined - called]:
            del functions[key]

    def _obstacle(
        self, call: ir.Node, function: ir.Function, root: ir.Graph, size: int | None
    ) -> str:
        """Why a call has to stay, or an empty text."""
        if size is None:
            return "it calls itself, or one that does"
        reason = obstacle(self.context, call, function, root)
        if not reason and size > self.left:
            return f"{size} nodes would come of it, {self.left} may"
        return reason


def _sizes(model: ir.Model) -> dict[_Key, int]:
    """Nodes that a call of each function expands to, without those that never end."""
    functions = model.functions
    bodies = {
        key: [n.op_identifier() for n in below(function.graph)]
        for key, function in functions.items()
    }
    sizes: dict[_Key, int] = {}
    while True:
        ready = [
            key
            for key, body in bodies.items()
            if key not in sizes and all(k in sizes for k in body if k in functions)
        ]
        if not ready:
            return sizes
        sizes.update({key: sum(sizes.get(k, 1) for k in bodies[key]) for key in ready})
