"""What a call of `quantize` did, what it cost and what it gained: plain data."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from graphopt.quantizer.histograms import Histogram
from graphopt.quantizer.kernels import Kernels
from graphopt.quantizer.scoring import Layer, Score
from graphopt.report import finite


@dataclass
class Quantization:
    """What was done, what it cost and what it gained."""

    source: str = ""
    target: str = ""
    method: str = ""
    reason: str = ""
    """Why this method."""
    placement: str = ""
    steps: list[str] = field(default_factory=list[str])
    """What was applied, as pipeline text."""
    samples: int = 0
    where: str = ""
    random: bool = False
    """Calibrated on random data."""
    score: Score | None = None
    """Float model and result on the samples given."""
    layers: list[Layer] = field(default_factory=list[Layer])
    kernels: Kernels | None = None
    """None where the runtime is not on this machine."""
    kept: list[str] = field(default_factory=list[str])
    """Operators that are more exact than the rest, to stay within a budget."""
    rung: str = ""
    """What they are instead: int8, int16, float16, bfloat16 or float."""
    sensitivity: dict[str, float] = field(default_factory=dict[str, float])
    """Noise over signal at the outputs for each operator quantized alone, where a budget asked."""
    tried: list[tuple[str, int, float]] = field(default_factory=list[tuple[str, int, float]])
    """A rung, how many operators were moved to it, the worst first, and the drop then."""
    limit: float | None = None
    """Of the drop."""
    histograms: list[Histogram] = field(default_factory=list[Histogram])
    """Values and ranges of activations and weights, where these were asked for."""
    bytes_before: int = 0
    bytes_after: int = 0
    milliseconds_before: float | None = None
    milliseconds_after: float | None = None
    ratio: float | None = None
    """Median of the time after over before, the two having taken turns."""
    refused: str = ""
    """Why the float model was kept; empty where it was not."""
    notes: list[str] = field(default_factory=list[str])
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data; infinite figures are null."""
        data: dict[str, Any] = finite(dataclasses.asdict(self))
        return data
