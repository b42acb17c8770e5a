"""Clip the outermost weights.

Why: a few far-out weights set the range of a whole tensor, and with it the step of its integers;
quantized afterwards the others keep more of their precision.
Numerics: lossy; the report says how far results moved.
Needs: nothing. Weights of one axis, such as biases and scales, stay as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from graphopt import ir
from graphopt.context import Context
from graphopt.errors import InputError
from graphopt.gram import LINEAR, weight_matrix, weight_tensor
from graphopt.pass_manager import Pass
from graphopt.wildcards import check, fits, names

_LEAST = 256  # weights below which a share of them is none


@dataclass(frozen=True)
class ClipWeights(Pass):
    """`share` is that of weights which are clipped, to the largest magnitude of the others.

    With `sigmas` the limit is instead so many standard deviations. It is of each tensor, with
    `per_channel` of each output channel. `keep` lists patterns of nodes and weights to leave alone.
    """

    lossy: ClassVar[bool] = True
    share: float = 0.001
    sigmas: float = 0.0
    per_channel: bool = False
    keep: tuple[str, ...] = ()

    def run(self, context: Context) -> None:
        check(context.model, self.keep)
        if not 0 <= self.share < 1 or self.sigmas < 0:
            raise InputError("clip-weights: share is 0 to below 1, sigmas at least 0")
        seen: set[ir.Value] = set()
        for node in context.model.graph:
            weight = node.inputs[1] if node.op_type in LINEAR and not node.domain else None
            array = ir.array(weight)
            if weight is None or array is None or weight in seen or array.size < _LEAST:
                continue
            if fits(self.keep, *names(weight)):
                continue
            seen.add(weight)
            if weight.is_graph_input() or not weight.is_initializer() or array.dtype.kind != "f":
                context.record.refuse(node, "its weights are no floats of its own")
                continue
            clipped = self._clipped(node, array)
            if not np.array_equal(clipped, array):
                weight.const_value = ir.tensor(clipped, name=weight.name)
                context.changed("clip-weights", [node], [node])

    def _clipped(self, node: ir.Node, array: ir.Array) -> ir.Array:
        matrix: Any = weight_matrix(node, array)
        axes = (2,) if self.per_channel else None
        size = np.abs(matrix.astype(np.float64))
        if self.sigmas:
            limit = self.sigmas * matrix.astype(np.float64).std(axis=axes, keepdims=True)
        else:
            limit = np.quantile(size, 1 - self.share, axis=axes, keepdims=True, method="lower")
        return weight_tensor(node, np.clip(matrix, -limit, limit), array.shape).astype(array.dtype)
