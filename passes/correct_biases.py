"""Take the shifts that quantization makes in the means of channels out of the biases.

Why: rounded weights and clipped activations do not only add noise, they move the mean of a channel,
which later layers never get rid of; a bias takes it back at no cost.
Numerics: lossy; it brings the results closer to those of the float model.
Needs: `quantize-static` earlier in the same pipeline, and data; biases of Conv, ConvTranspose or
Gemm.

`graphopt quantize` does it where it lowers the noise at the outputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from graphopt.context import Context
from graphopt.errors import InputError
from graphopt.pass_manager import Pass
from graphopt.quantizer.bias_correction import correct_biases, remembered


@dataclass(frozen=True)
class CorrectBiases(Pass):
    """Empirical bias correction of a quantized model."""

    lossy: ClassVar[bool] = True

    samples: int = 64
    """At most so many are used."""

    def run(self, context: Context) -> None:
        """Correct the biases of the main graph.

        Raises:
            InputError: no data.
        """
        before = remembered(context.model)
        if before is None:
            context.record.refusals.setdefault("nothing was quantized before it", set()).add(
                "model"
            )
            return
        if context.samples is None or self.samples < 1:
            raise InputError("correct-biases needs data: --data")
        correct_biases(context, before, context.samples.take(self.samples))
