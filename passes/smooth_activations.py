"""Move outliers of activations into the weights that read them.

Why: an activation has one scale when it is quantized: a channel far larger than the others leaves
them few of its 256 steps. Weights have a scale for each output and bear the difference better.
Numerics: rounding.
Needs: samples of the inputs; Conv, Gemm and MatMul with constant weights of their own, behind a
normalization, a factor per channel or another linear operator.

How much of a range is moved is chosen for each tensor by the noise that 8 bits would make
(`graphopt.quantizer.smoothing`). `graphopt quantize` does it before it quantizes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from graphopt import ir
from graphopt.context import Context
from graphopt.errors import InputError
from graphopt.pass_manager import Pass
from graphopt.quantizer.smoothing import smooth
from graphopt.samples import Samples


@dataclass(frozen=True)
class SmoothActivations(Pass):
    """SmoothQuant for whatever reads channels that can be scaled."""

    dynamic: bool = False
    """Prepare for ranges found at run time: each sample's own, instead of one for all of them."""
    multiply: bool = False
    """Where nothing else can take the scale, put in a Mul if that is worth its time."""
    samples: int = 64
    """At most so many are used."""

    def run(self, context: Context) -> None:
        """Scale channels of the main graph.

        Raises:
            InputError: no data, or activations that are not finite.
        """
        if context.samples is None:
            raise InputError("smooth-activations needs data: --data")
        if self.samples < 1:
            raise InputError("smooth-activations needs at least one sample")
        nodes = [node for node in context.model.graph if takes_scales(context, node)]
        self.smooth(context, nodes, context.samples)

    def smooth(
        self,
        context: Context,
        nodes: Iterable[ir.Node],
        samples: Samples,
        progress: Callable[[str], None] | None = None,
    ) -> int:
        """Scale what some of the nodes read; how many tensors that were."""
        return smooth(
            context,
            nodes,
            samples.take(self.samples),
            dynamic=self.dynamic,
            multiply=self.multiply,
            progress=progress,
        )


def takes_scales(context: Context, node: ir.Node) -> bool:
    """Whether a node is a linear operator on floats whose weights can be scaled."""
    if node.op_type not in ("Conv", "Gemm", "MatMul") or node.domain:
        return False
    x, tensor = node.inputs[0], ir.constant(node.inputs[1])
    if x is None or tensor is None or ir.constant(x) is not None or ir.attribute(node, "transA", 0):
        return False
    float32 = tensor.dtype == context.shapes.dtype(x) == ir.DataType.FLOAT
    return float32 and len(tensor.shape) == (2 if node.op_type != "Conv" else len(tensor.shape))
