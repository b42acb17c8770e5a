"""Hand what a channel never falls below on to the biases of the next layer.

Why: behind a Relu ranges begin at 0; a channel with a high bias uses only the upper part of its
range, and every other channel of the tensor pays for that with coarser steps.
Numerics: lossy where an input goes below the lowest value that samples have; else rounding.
Needs: samples of the inputs; Conv or Gemm with a bias, Relu, and Conv without padding or Gemm.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from graphopt.context import Context
from graphopt.errors import InputError
from graphopt.pass_manager import Pass
from graphopt.quantizer.absorption import absorb_biases


@dataclass(frozen=True)
class AbsorbBiases(Pass):
    """High-bias absorption."""

    lossy: ClassVar[bool] = True

    samples: int = 64
    """At most so many are used."""

    def run(self, context: Context) -> None:
        """Move biases of the main graph.

        Raises:
            InputError: no data.
        """
        if context.samples is None or self.samples < 1:
            raise InputError("absorb-biases needs data: --data")
        absorb_biases(context, context.samples.take(self.samples))
