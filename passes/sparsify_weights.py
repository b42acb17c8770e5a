"""Set weights to zero: a share of them, or all but N of each M in a row.

Why: zeros take no room in a compressed file, and 2:4 is twice as fast on tensor cores that know it.
On a CPU nothing gets faster: to that end prune channels.
Numerics: lossy; the report says how far results moved.
Needs: samples for `sparsegpt` (which is the default where there are any) and `wanda`. Layers that
share weights with what is no Conv, Gemm or MatMul stay as they are; of layers that share them
among each other the first one's inputs count.

With `sparsegpt` layers go one after the other: each is first adapted to what those before it now
give it, and then loses weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from graphopt import files, gram, ir
from graphopt.context import Context
from graphopt.errors import InputError
from graphopt.pass_manager import Pass
from graphopt.passes._grams import by_parts
from graphopt.pruner.drifting import drift
from graphopt.pruner.estimating import operations
from graphopt.pruner.sparsity import Floats, Method, Pattern, caught_up, sparsify
from graphopt.wildcards import check, fits, names

_EFFORT = 4e12
"""Operations that looking at the samples takes, about; beyond that there are fewer steps."""
_BYTES = 1 << 28
"""Of sums held at once."""
_LEAST = 256  # weights below which there is nothing to gain

Layers = dict[ir.Value, list[ir.Node]]


@dataclass(frozen=True)
class SparsifyWeights(Pass):
    """`sparsity` is a share of each layer's weights (0.5), or a pattern (2:4: two of four stay).

    `method` is magnitude, wanda or sparsegpt; `keep` lists patterns of nodes and weights that stay.
    """

    lossy: ClassVar[bool] = True
    sparsity: str = "0.5"
    method: Literal["", "magnitude", "wanda", "sparsegpt"] = ""
    keep: tuple[str, ...] = ()

    def run(self, context: Context) -> None:
        check(context.model, self.keep)
        pattern = Pattern.parse(str(self.sparsity))
        method = self._method(context)
        layers = self._layers(context, pattern)
        firsts = [nodes[0] for nodes in layers.values()]
        if method == "magnitude":
            for node in firsts:
                _store(context, node, pattern, method, None)
            return
        if method == "sparsegpt":
            _catch_up(context, firsts, pattern)
            return
        for part, grams in by_parts(context, firsts):
            for node in part:
                _store(context, node, pattern, method, grams[ir.label(node)].xtx)

    def _method(self, context: Context) -> Method:
        if not self.method:
            return "magnitude" if context.samples is None else "sparsegpt"
        if self.method != "magnitude" and context.samples is None:
            raise InputError(f"sparsify-weights with {self.method} needs data: --data")
        return self.method

    def _layers(self, context: Context, pattern: Pattern) -> Layers:
        """The linear operators of the main graph by their weights, in order."""
        found: Layers = {}
        for node in context.model.graph:
            weight = node.inputs[1] if node.op_type in gram.LINEAR and not node.domain else None
            if weight is None or fits(self.keep, *names(weight)):
                continue
            array = ir.array(weight)
            if array is None or not weight.is_initializer() or array.size < _LEAST:
                continue
            users = list(weight.consumers())
            if any(u.op_type not in gram.LINEAR or u.inputs[1] is not weight for u in users):
                context.record.refuse(node, "its weights have other uses")
            elif len({_form(user) for user in users}) > 1:
                context.record.refuse(node, "its weights are used in two ways")
            elif not pattern.fits(gram.weight_matrix(node, array).shape[2]):
                context.record.refuse(node, f"its rows are no multiple of {pattern.m} long")
            else:
                found.setdefault(weight, []).append(node)
        return found


def _form(node: ir.Node) -> tuple[object, ...]:
    """What a weight's place in the matrix depends on."""
    return node.op_type, ir.attribute(node, "group", 1), ir.attribute(node, "transB", 0)


def _catch_up(context: Context, nodes: Sequence[ir.Node], pattern: Pattern) -> None:
    """Take layers in steps, each adapted first to what the steps before it left of its inputs."""
    assert context.samples is not None
    whole = files.copy(context.model)
    each = 2 * operations(whole, context.samples) * len(context.samples)
    steps = max(int(_EFFORT / max(each, 1)), 1)
    for part in _steps(nodes, steps):
        context.check_time()
        sums = drift(context.model, whole, part, context.samples)
        for node in part:
            _store(context, node, pattern, "sparsegpt", *sums[ir.label(node)])


def _steps(nodes: Sequence[ir.Node], count: int) -> Iterator[list[ir.Node]]:
    """About so many parts, more where sums take too much room; readers of a value stay together."""
    inputs: dict[ir.Value | None, list[ir.Node]] = {}
    for node in nodes:
        inputs.setdefault(node.inputs[0], []).append(node)
    most = -(-len(inputs) // count)
    part: list[list[ir.Node]] = []
    held = 0
    for readers in inputs.values():
        size = 0
        for node in readers:
            array = ir.array(node.inputs[1])
            assert array is not None
            groups, _, k = gram.weight_matrix(node, array).shape
            size = max(size, 16 * groups * k * k)
        if part and (len(part) == most or held + size > _BYTES):
            yield [node for some in part for node in some]
            part, held = [], 0
        part.append(readers)
        held += size
    if part:
        yield [node for some in part for node in some]


def _store(
    context: Context,
    node: ir.Node,
    pattern: Pattern,
    method: Method,
    xtx: Floats | None,
    cross: Floats | None = None,
) -> None:
    weight = node.inputs[1]
    array = ir.array(weight)
    assert weight is not None and array is not None and weight.dtype is not None
    whole = gram.weight_matrix(node, array)
    if xtx is not None and cross is not None:
        whole = caught_up(whole, xtx, cross)
    matrix = sparsify(whole, pattern, method, xtx)
    data: Any = gram.weight_tensor(node, matrix, array.shape).astype(weight.dtype.numpy())
    weight.const_value = ir.Tensor(data, dtype=weight.dtype, name=weight.name)
    users = list(weight.consumers())
    context.changed(method, users, users)
