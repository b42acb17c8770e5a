"""Set weights to zero: a share of them, or all but N of each M in a row.

Why: zeros take no room in a compressed file, and 2:4 is twice as fast on tensor cores that know it.
On a CPU nothing gets faster: to that end prune channels.
Numerics: lossy; the report says how far results moved.
Needs: samples for `sparsegpt` (which is the default where there are any) and `wanda`. Layers that
share weights with what is no Conv, Gemm or MatMul stay as they are.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from graphopt import gram, ir, taps
from graphopt.context import Context
from graphopt.errors import InputError
from graphopt.gram import Gram
from graphopt.pass_manager import Pass
from graphopt.pruner.sparsity import Floats, Method, Pattern, sparsify

_GRAM_BYTES = 1 << 28
"""Of XᵀX held at once. Later layers then see the zeros of earlier ones, too."""
_LEAST = 256  # weights below which there is nothing to gain

Layers = dict[ir.Value, list[ir.Node]]


@dataclass(frozen=True)
class SparsifyWeights(Pass):
    """`sparsity` is a share of each layer's weights (0.5), or a pattern (2:4: two of four stay).

    `method` is magnitude, wanda or sparsegpt; `keep` lists patterns of nodes to leave alone.
    """

    lossy: ClassVar[bool] = True
    sparsity: str = "0.5"
    method: Literal["", "magnitude", "wanda", "sparsegpt"] = ""
    keep: tuple[str, ...] = ()

    def run(self, context: Context) -> None:
        pattern = Pattern.parse(str(self.sparsity))
        method = self._method(context)
        layers = self._layers(context, pattern)
        for part in _parts(layers) if method != "magnitude" else [list(layers)]:
            context.check_time()
            grams: dict[str, Gram] = {}
            if method != "magnitude":
                assert context.samples is not None
                nodes = [node for weight in part for node in layers[weight]]
                inputs = dict.fromkeys(node.inputs[0] for node in nodes)
                wanted = [value for value in inputs if value is not None]
                feeds = taps.tap(context.model, wanted, context.samples)
                grams = gram.accumulate(nodes, feeds)
            for weight in part:
                xtx = sum((grams[ir.label(n)].xtx for n in layers[weight] if grams), start=0.0)
                _store(context, weight, layers[weight], pattern, method, np.asarray(xtx))

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
            if weight is None or any(fnmatch.fnmatchcase(ir.label(node), p) for p in self.keep):
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


def _parts(layers: Layers) -> Iterator[Sequence[ir.Value]]:
    """The weights in order, as many at a time as have room for their XᵀX."""
    part: list[ir.Value] = []
    held = 0
    for weight, nodes in layers.items():
        array = ir.array(weight)
        assert array is not None
        groups, _, k = gram.weight_matrix(nodes[0], array).shape
        size = 8 * groups * k * k
        if part and held + size > _GRAM_BYTES:
            yield part
            part, held = [], 0
        part.append(weight)
        held += size
    if part:
        yield part


def _store(
    context: Context,
    weight: ir.Value,
    nodes: Sequence[ir.Node],
    pattern: Pattern,
    method: Method,
    xtx: Floats,
) -> None:
    array = ir.array(weight)
    assert array is not None and weight.dtype is not None
    matrix = sparsify(gram.weight_matrix(nodes[0], array), pattern, method, xtx)
    tensor = gram.weight_tensor(nodes[0], matrix, array.shape).astype(weight.dtype.numpy())
    weight.const_value = ir.Tensor(tensor, dtype=weight.dtype, name=weight.name)
    context.changed(method, nodes, nodes)
