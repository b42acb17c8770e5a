"""Move Transposes across other operators to where they cancel or become fewer.

Why: a Transpose copies a whole tensor; layout conversions around element-wise operators,
concatenations and reductions meet and vanish once they are moved together.
Numerics: rounding, where a reduction sums in another order; all else is exact.
Needs: ranks of the operands that are moved.
"""

from __future__ import annotations

from graphopt import ir
from graphopt.passes._chains import chain_above, replayed
from graphopt.passes._layout import (
    REDUCTIONS,
    UNARY,
    Perm,
    composed,
    inverted,
    is_identity,
    layout_inputs,
    moved,
    moved_constant,
    permutation,
    reduced_axes,
    transposed,
    view_permutation,
)
from graphopt.passes._slices import split
from graphopt.passes._views import reshaped
from graphopt.rewriting import Op, rewrite

_REGION = 48  # nodes that one Transpose may be moved across


def _is_transpose(node: ir.Node | None) -> bool:
    return node is not None and node.op_type == "Transpose" and not node.domain


def _moves(op: Op, node: ir.Node | None) -> Perm | None:
    """How a Transpose, or a Reshape in place of one, permutes axes."""
    if node is None or node.domain or node.op_type not in ("Transpose", "Reshape"):
        return None
    return permutation(op, node) if node.op_type == "Transpose" else view_permutation(op, node)


class _Region:
    """The operators above a Transpose across which it may be moved, and what that costs.

    Costs count Transposes: those that moving makes, less those that it removes.
    """

    def __init__(self, op: Op, bottom: ir.Node, perm: Perm) -> None:
        self._op = op
        self._perm = perm
        self._bottom = bottom
        self._candidates = self._collect()
        self._costs: dict[ir.Value, int] = {}
        self._built: dict[ir.Value, ir.Value] = {}

    def _collect(self) -> dict[ir.Node, list[int]]:
        """Nodes that feed only each other and the bottom, with the inputs to be permuted."""
        rank, found = len(self._perm), dict[ir.Node, list[int]]()
        stack = [self._bottom.inputs[0]]
        while stack and len(found) < _REGION:
            value = stack.pop()
            node = None if value is None else value.producer()
            if value is None or node is None or node in found:
                continue
            if node.graph is not self._bottom.graph or value.is_graph_output():
                continue
            inputs = layout_inputs(self._op, node, rank) if self._op.rank(value) == rank else None
            if inputs is not None:
                found[node] = inputs
                stack += [node.inputs[index] for index in inputs]
        inside = {*found, self._bottom}
        while lost := [n for n in found if any(u not in inside for u in n.outputs[0].consumers())]:
            for node in lost:
                del found[node]
            inside.difference_update(lost)
        return found

    def saves(self) -> bool:
        """Whether fewer Transposes are left and no operator is computed twice."""
        passed: dict[ir.Node, None] = {}
        fringe: dict[ir.Value, None] = {}
        stack = [self._bottom.inputs[0]]
        while stack:
            value = stack.pop()
            node = None if value is None else value.producer()
            if value is None or node in passed:
                continue
            if node is not None and self._passes(node):
                passed[node] = None
                stack += [node.inputs[index] for index in self._candidates[node]]
            else:
                fringe[value] = None
        inside = {*passed, self._bottom}
        if any(u not in inside for n in passed for u in n.outputs[0].consumers()):
            return False
        slowed = sum(map(self._slows, passed))
        return slowed + sum(self._fringe_cost(value, inside) for value in fringe) < 1

    def _slows(self, node: ir.Node) -> bool:
        """Whether a Softmax leaves the last axis.

        Around such a one ONNX Runtime permutes by itself: no loss only where two Transposes vanish.
        """
        if node.op_type not in ("Softmax", "LogSoftmax"):
            return False
        last = len(self._perm) - 1
        return self._op.attr(node, "axis", -1) in (-1, last) and self._perm[last] != last

    def _passes(self, node: ir.Node) -> bool:
        return node in self._candidates and self._through(node) < 1

    def _cost(self, value: ir.Value) -> int:
        """An estimate, which counts what is shared more than once."""
        if value not in self._costs:
            self._costs[value] = 1
            node = value.producer()
            if node is not None and node in self._candidates:
                self._costs[value] = min(1, self._through(node))
            else:
                inside = {*self._candidates, self._bottom}
                self._costs[value] = self._fringe_cost(value, inside)
        return self._costs[value]

    def _through(self, node: ir.Node) -> int:
        values = dict.fromkeys(node.inputs[index] for index in self._candidates[node])
        above = sum(self._cost(value) for value in values if value is not None)
        return above + self._slows(node)

    def _fringe_cost(self, value: ir.Value, inside: set[ir.Node]) -> int:
        """Transposes gained by permuting a value that nothing is moved across."""
        node = value.producer()
        if ir.constant(value) is not None:
            return 0
        first = _moves(self._op, node)
        if first is None:
            return 1
        goes = not value.is_graph_output() and all(u in inside for u in value.consumers())
        return int(not is_identity(composed(first, self._perm))) - int(goes)

    def permuted(self, value: ir.Value) -> ir.Value:
        """Build the value with its axes permuted."""
        if value not in self._built:
            self._built[value] = self._permuted(value)
        return self._built[value]

    def _permuted(self, value: ir.Value) -> ir.Value:
        op, node = self._op, value.producer()
        constant = moved_constant(op, value, self._perm)
        if constant is not None:
            return constant
        first = _moves(op, node)
        if node is not None and first is not None and node.inputs[0] is not None:
            return transposed(op, node.inputs[0], composed(first, self._perm))
        if node is None or not self._passes(node):
            return op.Transpose(value, perm=self._perm)
        inputs = list(node.inputs)
        for index in self._candidates[node]:
            operand = inputs[index]
            if operand is not None:
                inputs[index] = self.permuted(operand)
        return moved(op, node, self._perm, inputs)


@rewrite.on("Transpose", "Reshape")
def pull_transpose_up(op: Op, node: ir.Node) -> ir.Value | None:
    """Compute what a Transpose is applied to in its layout, where that leaves fewer of them."""
    value, perm = node.inputs[0], _moves(op, node)
    if value is None or perm is None or ir.constant(value) is not None:
        return None
    region = _Region(op, node, perm)
    return region.permuted(value) if region.saves() else None


@rewrite.on("Concat", "Add", "Sub", "Mul", "Div", "Max", "Min", "Where", "Sum", "Pow")
def push_transposes_down(op: Op, node: ir.Node) -> ir.Value | None:
    """Several operands permuted alike: permute the result instead."""
    first = next((v for v in node.inputs if v is not None and ir.constant(v) is None), None)
    if first is None or _permuted(op, first, len(node.inputs)) is None:
        return None
    rank = op.rank(node.outputs[0])
    indices = None if rank is None else layout_inputs(op, node, rank)
    if indices is None:
        return None
    sources: dict[int, ir.Value] = {}
    perms: list[Perm] = []
    back: Perm = []
    for index in indices:
        value = node.inputs[index]
        if value is None or ir.constant(value) is not None:
            continue
        found = _permuted(op, value, sum(v is value for v in node.inputs))
        if found is None:
            return None
        nodes, source, perm = found
        perms.append(perm)
        if perm != perms[0]:
            return None
        sources[index] = replayed(op, nodes, source)
        back = inverted(perm)
    if len(perms) < 2:
        return None
    inputs = list(node.inputs)
    for index in indices:
        value = node.inputs[index]
        assert value is not None
        inputs[index] = sources.get(index) or moved_constant(op, value, back)
    return op.Transpose(moved(op, node, back, inputs), perm=perms[0])


def _permuted(op: Op, value: ir.Value, uses: int) -> tuple[list[ir.Node], ir.Value, Perm] | None:
    """(element-wise operators, x, perm) where a value is these operators on a Transpose of x."""
    found = chain_above(op, value)
    if found is None:
        return None
    nodes, moved_value = found
    producer = moved_value.producer()
    if producer is None or not _is_transpose(producer):
        return None
    perm, source = permutation(op, producer), producer.inputs[0]
    if perm is None or source is None or op.uses(moved_value) > (1 if nodes else uses):
        return None
    return nodes, source, perm


def _only_transposed(op: Op, value: ir.Value | None) -> tuple[Perm, ir.Value] | None:
    """(permutation, source) of what a Transpose makes for one reader only, else None."""
    producer = None if value is None else value.producer()
    if value is None or producer is None or not _is_transpose(producer) or op.uses(value) > 1:
        return None
    perm, source = permutation(op, producer), producer.inputs[0]
    return None if perm is None or source is None else (perm, source)


@rewrite.on(*sorted(REDUCTIONS), "ArgMax", "ArgMin")
def reduce_before_transpose(op: Op, node: ir.Node) -> ir.Value | None:
    """Reduce a tensor before it is permuted: what is left to permute is smaller, or in order."""
    found = _only_transposed(op, node.inputs[0])
    if found is None:
        return None
    perm, source = found
    single = node.op_type.startswith("Arg")
    axes = [op.attr(node, "axis", 0) % len(perm)] if single else reduced_axes(op, node, len(perm))
    if not axes:
        return None
    reduced = moved(op, node, inverted(perm), [source, *node.inputs[1:]])
    if op.attr(node, "keepdims", 1):
        return op.Transpose(reduced, perm=perm)
    stay = [perm[axis] for axis in range(len(perm)) if axis not in axes]
    return transposed(op, reduced, [sorted(stay).index(axis) for axis in stay])


@rewrite.on("MatMul")
def swap_product(op: Op, node: ir.Node) -> ir.Value | None:
    """The product of two transposed matrices is the other way round, transposed once."""
    sources: list[ir.Value] = []
    for value in node.inputs:
        producer = None if value is None else value.producer()
        perm = permutation(op, producer) if producer is not None and _is_transpose(producer) else []
        if value is None or producer is None or not perm or op.uses(value) != 1:
            return None
        swapped = [*range(len(perm) - 2), len(perm) - 1, len(perm) - 2]
        if len(perm) < 2 or perm != swapped or producer.inputs[0] is None:
            return None
        sources.append(producer.inputs[0])
    rank = op.rank(node.outputs[0])
    if rank is None or len(sources) != 2:
        return None
    return op.Transpose(
        op.MatMul(sources[1], sources[0]), perm=[*range(rank - 2), rank - 1, rank - 2]
    )


@rewrite.on("Split")
def split_before_transpose(op: Op, node: ir.Node) -> list[ir.Value | None] | None:
    """Split a tensor before it is permuted, where parts are permuted again anyway."""
    found = _only_transposed(op, node.inputs[0])
    if found is None:
        return None
    perm, source = found
    later = [_permuted_later(op, part) for part in node.outputs]
    left = sum(second is None or not is_identity(composed(perm, second)) for second in later)
    if left > sum(second is not None for second in later):
        return None
    axis = int(op.attr(node, "axis", 0)) % len(perm)
    sizes = [shape[axis] for v in node.outputs if (shape := op.shape(v)) is not None]
    lengths = [size for size in sizes if isinstance(size, int)]
    if len(lengths) < len(node.outputs):
        return None
    return [op.Transpose(part, perm=perm) for part in split(op, source, perm[axis], lengths)]


def _permuted_later(op: Op, value: ir.Value) -> Perm | None:
    """How a value is permuted, where nothing but element-wise operators takes it before."""
    for _ in range(_REGION):
        users = value.consumers()
        if len(users) != 1 or op.uses(value) != 1:
            return None
        user = users[0]
        perm = _moves(op, user)
        if perm is not None:
            return perm
        if user.domain or user.op_type not in UNARY:
            return None
        value = user.outputs[0]
    return None


@rewrite.on("Transpose", benefit=-1)
def transpose_as_reshape(op: Op, node: ir.Node) -> ir.Value | None:
    """A Transpose that keeps the order of all axes larger than 1 is a view."""
    value = node.inputs[0]
    before = None if value is None else op.shape(value)
    perm = permutation(op, node)
    if value is None or before is None or perm is None:
        return None
    moved_axes = [axis for axis in perm if before[axis] != 1]
    if moved_axes != sorted(moved_axes):
        return None
    return reshaped(op, value, tuple(before[axis] for axis in perm))
