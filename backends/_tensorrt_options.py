"""How an engine is built."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Literal, Self

from graphopt import profiles
from graphopt.backends import BackendOptions
from graphopt.errors import InputError


@dataclass(frozen=True)
class Options(BackendOptions):
    """How an engine is built."""

    shapes: str = ""
    """Ranges of free sizes, `x=1x3/4x3/8x3`: smallest, usual (built for), largest."""
    optimization: int = 3
    """0 to 5: how long the builder searches."""
    workspace_mb: int = 0
    """Of scratch memory on the GPU, in MB; 0 is the library's own limit."""
    tf32: bool = False
    """Multiply float32 with 10 bits of mantissa where the GPU has it: faster, no longer exact."""
    sparse: bool = False
    """Use kernels for weights of which 2 in 4 are zero."""
    strip_weights: bool = False
    """Leave the weights out of the engine, for refitting."""
    compatibility: Literal["none", "ampere", "same"] = "none"
    """Run on newer GPUs too: from Ampere on, or of the same compute capability."""

    def __post_init__(self) -> None:
        if not 0 <= self.optimization <= 5 or self.workspace_mb < 0:
            raise InputError("optimization is 0 to 5, workspace_mb 0 or more")
        profiles.parse(self.shapes)

    def ranges(self) -> str:
        """`shapes`."""
        return self.shapes

    def for_piece(self, ranges: str, dims: Collection[str]) -> Self:
        """The part's own ranges."""
        return replace(self, shapes=ranges)
