"""Scale channels so that neighbouring layers share the range of the weights.

Why: a channel that is a hundred times smaller than its neighbours has no bits left once all of
them are quantized with one scale; where a Relu or a pool stands between two layers, it can be
made as large as the others.
Numerics: rounding.
Needs: linear operators with constant weights, and between them only operators that commute with
a positive scale per channel.
"""

from __future__ import annotations

from dataclasses import dataclass

from graphopt.context import Context
from graphopt.pass_manager import Pass
from graphopt.quantizer.equalization import equalize


@dataclass(frozen=True)
class EqualizeChannels(Pass):
    """Cross-layer equalization."""

    clips: bool = False
    """Let channels through Clip (Relu6), which becomes a Min with a bound per channel."""

    def run(self, context: Context) -> None:
        """Equalize the main graph."""
        equalize(context, clips=self.clips)
