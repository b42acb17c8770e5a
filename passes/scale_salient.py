"""Make weights larger that meet large activations, before they are rounded to few bits.

Why: of the weights that are stored with 4 bits or less, a hundredth matters more than all others;
scaled up they are rounded more finely, and a normalization or a linear operator before them takes
the scale back.
Numerics: rounding.
Needs: samples of the inputs; Conv, Gemm and MatMul with constant weights of their own, behind a
normalization, a factor per channel or another linear operator. `quantize-weights` with the same
bits and blocks behind it.
"""

from __future__ import annotations

from dataclasses import dataclass

from graphopt.context import Context
from graphopt.errors import InputError
from graphopt.pass_manager import Pass
from graphopt.passes.smooth_activations import takes_scales
from graphopt.quantizer.rounding import Scheme
from graphopt.quantizer.salience import scale_salient


@dataclass(frozen=True)
class ScaleSalient(Pass):
    """Activation-aware scaling of weights (AWQ)."""

    bits: int = 4
    block: int = 32
    """Weights of a row that share a scale; 0 for the whole row."""
    symmetric: bool = False
    multiply: bool = False
    """Where nothing else can take the scale, put in a Mul if that halves the noise."""
    samples: int = 64
    """At most so many are used."""

    def run(self, context: Context) -> None:
        """Scale channels of the main graph.

        Raises:
            InputError: no data, activations that are not finite, or bits that there are not.
        """
        if context.samples is None or self.samples < 1:
            raise InputError("scale-salient needs data: --data")
        if not 2 <= self.bits <= 8 or self.block < 0:
            raise InputError("scale-salient is for weights of 2 to 8 bits, in blocks of at least 0")
        nodes = [node for node in context.model.graph if takes_scales(context, node)]
        scheme = Scheme(self.bits, self.symmetric, self.block)
        samples = context.samples.take(self.samples)
        scale_salient(context, nodes, samples, scheme, multiply=self.multiply)
