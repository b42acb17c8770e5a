"""Replace a matrix by the product of two thin ones.

Why: at rank r a layer of k inputs and n outputs multiplies r * (k + n) times, not k * n times.
Numerics: lossy; the report says how far results moved.
Needs: nothing; with samples the factors fit the layer's outputs instead of its weights. Layers for
which no rank saves anything, and convolutions in groups, stay as they are.

The truncated singular value decomposition is the best product of a rank (Eckart and Young, 1936).
With samples it is that of the weights after the Cholesky factor of XᵀX, which makes it the best for
the outputs (as in Wang et al., "SVD-LLM", 2024).
"""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from graphopt import gram, ir
from graphopt.context import Context
from graphopt.driver import drop_initializer, remove, replace_value
from graphopt.errors import InputError
from graphopt.gram import Gram
from graphopt.pass_manager import Pass
from graphopt.passes._grams import by_parts
from graphopt.pruner.sparsity import Floats

_DAMPING = 1e-4
_LEAST = 1024  # weights below which a second kernel costs more than is saved


@dataclass(frozen=True)
class FactorizeWeights(Pass):
    """`energy` is the share of squared singular values that stays, which decides the rank.

    With `ratio` it is instead the share of a layer's weights that stay. `keep` lists patterns of
    nodes to leave alone.
    """

    lossy: ClassVar[bool] = True
    energy: float = 0.99
    ratio: float = 0.0
    keep: tuple[str, ...] = ()

    def run(self, context: Context) -> None:
        if not 0 < self.energy <= 1 or not 0 <= self.ratio < 1:
            raise InputError("factorize-weights: energy is above 0 to 1, ratio 0 to below 1")
        layers = [node for node in context.model.graph if self._applies(node)]
        for part, grams in by_parts(context, layers):
            for node in part:
                self._factorize(context, node, grams.get(ir.label(node)))

    def _applies(self, node: ir.Node) -> bool:
        weight = node.inputs[1] if node.op_type in ("MatMul", "Gemm", "Conv") else None
        array = ir.array(weight)
        return (
            weight is not None
            and array is not None
            and not node.domain
            and not any(fnmatch.fnmatchcase(ir.label(node), p) for p in self.keep)
            and array.size >= _LEAST
            and (array.ndim == 2 if node.op_type != "Conv" else array.ndim > 2)
            and ir.attribute(node, "group", 1) == 1
            and not weight.is_graph_input()
            and ir.use_count(weight) == 1
        )

    def _factorize(self, context: Context, node: ir.Node, sums: Gram | None) -> None:
        weight = node.inputs[1]
        array = ir.array(weight)
        assert weight is not None and array is not None
        matrix = gram.weight_matrix(node, array)[0].astype(np.float64)
        out, k = matrix.shape
        root = np.eye(k) if sums is None else _root(sums.xtx[0])
        left, values, right = np.linalg.svd(matrix @ root, full_matrices=False)
        rank = self._rank(values.astype(np.float64), out, k)
        if rank * (out + k) >= 0.95 * out * k:
            context.record.refuse(node, "no rank that keeps enough is smaller")
            return
        first = np.linalg.solve(root.T, right[:rank].T).T.astype(np.float64)  # [rank, k]
        second = (left[:, :rank] * values[:rank]).astype(np.float64)  # [out, rank]
        made = _nodes(context, node, array, first, second)
        context.changed("factorize", [node], made)
        replace_value(context, node.outputs[0], made[-1].outputs[0], fresh=True)
        remove(context, node)
        if weight.graph is not None and not weight.uses():
            drop_initializer(context, weight)

    def _rank(self, values: Floats, out: int, k: int) -> int:
        if self.ratio:
            return max(1, int(self.ratio * out * k / (out + k)))
        shares = np.cumsum(values**2) / max(float(np.sum(values**2)), 1e-300)
        return int(np.searchsorted(shares, self.energy * (1 - 1e-12))) + 1


def _root(xtx: Floats) -> Floats:
    """A lower factor of XᵀX, regularized: [k, k]."""
    xtx = xtx.copy()
    xtx[np.diag_indices(len(xtx))] += _DAMPING * float(np.mean(np.diag(xtx))) + 1e-12
    return np.linalg.cholesky(xtx).astype(np.float64)


def _nodes(
    context: Context, node: ir.Node, array: ir.Array, first: Floats, second: Floats
) -> list[ir.Node]:
    """Two operators of the node's kind: the first takes its place in space, the second its bias."""
    graph = node.graph
    assert graph is not None
    dtype = array.dtype
    attributes = dict(node.attributes)
    if node.op_type == "Conv":
        ones = (1,) * (array.ndim - 2)
        weights = first.reshape(-1, *array.shape[1:]), second.reshape(*second.shape, *ones)
        given = [list(attributes.values()), []]
    else:
        turned = bool(ir.attribute(node, "transB", 0))
        weights = (first, second) if turned else (first.T, second.T)
        kept = {"transA", "transB", "alpha"} if node.op_type == "Gemm" else set[str]()
        given = [[a for n, a in attributes.items() if n in kept]]
        given.append([a for n, a in attributes.items() if n in ("transB", "beta")])
    source: ir.Value | None = node.inputs[0]
    made: list[ir.Node] = []
    for part, tensor in enumerate(weights):
        data: Any = np.ascontiguousarray(tensor.astype(dtype))
        hint = node.inputs[1].name if node.inputs[1] is not None else node.op_type
        value = context.initializer(graph, ir.tensor(data), f"{hint}_{'ab'[part]}")
        bias = node.inputs[2:] if part else ()
        name = context.unique_node(f"{ir.label(node)}_{'ab'[part]}")
        new = ir.Node("", node.op_type, [source, value, *bias], given[part], name=name)
        new.outputs[0].name = context.unique(f"{node.outputs[0].name}_{'ab'[part]}")
        new.meta[ir.SOURCES] = ir.sources(node)
        graph.insert_before(node, new)
        context.shapes.update(new, context.root(graph))
        made.append(new)
        source = new.outputs[0]
    return made
