"""Turn the channels of residual streams so that none of them is far larger than the others.

Why: a few channels of a transformer's residual stream are often tens of times larger than the
rest, and leave it few of the steps that 8 bits have; weights of 4 bits lose for the same reason.
An orthogonal matrix, folded into the weights on both sides, spreads them over all channels.
Numerics: rounding.
Needs: a stream that nothing but embeddings, products and constants write, and nothing but products
read, through RMS or layer normalizations, or directly. What follows a norm that other norms see
through an addition (as in BERT) cannot turn, since the factors of the first one stand between.

See `graphopt.quantizer.rotation`. Streams whose channels are about alike, by their weights and on
samples where there are some, stay as they are.
"""

from __future__ import annotations

from dataclasses import dataclass

from graphopt.context import Context
from graphopt.errors import InputError
from graphopt.pass_manager import Pass
from graphopt.quantizer.rotation import rotate


@dataclass(frozen=True)
class RotateResidual(Pass):
    """Rotation of residual streams (QuaRot) by Hadamard matrices."""

    seed: int = 0
    """Of the random order and signs."""
    always: bool = False
    """Also where no channel stands out, and again where that was done before."""

    def run(self, context: Context) -> None:
        """Rotate the streams of the main graph."""
        if self.seed < 0:
            raise InputError(f"rotate-residual: seed is 0 or more, not {self.seed}")
        rotate(context, seed=self.seed, always=self.always)
