"""What is told of pruning."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from graphopt.pruner.estimating import Size
from graphopt.pruner.fitting import Fit
from graphopt.pruner.sensitivity import Curves
from graphopt.report import Loss

__all__ = ["PruneReport"]


@dataclass
class PruneReport:
    """What pruning did: sizes before and after, what it cost, what stayed and why."""

    source: str = ""
    before: Size | None = None
    after: Size | None = None
    families: dict[str, tuple[int, int]] = field(default_factory=dict[str, tuple[int, int]])
    """Weight that makes the channels → groups before and after."""
    ranks: dict[str, tuple[int, int]] = field(default_factory=dict[str, tuple[int, int]])
    """Weight of a layer that became two thinner ones → the rank it could have had, and has."""
    resized: dict[str, tuple[str, str]] = field(default_factory=dict[str, tuple[str, str]])
    """Input of images → their size, and that at which the model works now."""
    frozen: dict[str, str] = field(default_factory=dict[str, str])
    """Weight and axis, or input of images → why it stays as it is."""
    unknown: dict[str, int] = field(default_factory=dict[str, int])
    """Operators that pruning has no rule for, and how often they hold something back."""
    curves: Curves = field(default_factory=dict[str, dict[float, float]])
    """Of the sensitivity scan: weight → share of its channels that goes → what outputs lose."""
    masked_error: float | None = None
    """Largest relative difference from the original with all that went set to zero."""
    fits: list[Fit] = field(default_factory=list[Fit])
    training: tuple[float, float] | None = None
    """Error of the outputs before and after training, relative to their variance."""
    loss: Loss | None = None
    accuracy: tuple[float, float] | None = None
    """Before and after, on data with labels."""
    latency_ms: tuple[float, float] | None = None
    """Medians before and after on the target."""
    latency_ratio: float | None = None
    notes: list[str] = field(default_factory=list[str])

    @property
    def drop(self) -> float | None:
        """What was lost: of the accuracy, else of the agreement, else the relative error."""
        if self.accuracy is not None:
            return self.accuracy[0] - self.accuracy[1]
        if self.loss is None:
            return None
        if self.loss.agreement is not None:
            return 1 - self.loss.agreement
        noise = self.loss.sqnr_db
        return 0.0 if noise is None else 10 ** (-noise / 20)

    def to_dict(self) -> dict[str, Any]:
        """Plain data; what is not finite becomes None."""

        def plain(value: object) -> object:
            if isinstance(value, float):
                return value if math.isfinite(value) else None
            if isinstance(value, dict):
                items = cast("dict[str, object]", value).items()
                return {key: plain(item) for key, item in items}
            if isinstance(value, list | tuple):
                return [plain(item) for item in cast("Sequence[object]", value)]
            return value

        data = cast("dict[str, Any]", plain(dataclasses.asdict(self)))
        return {**data, "drop": plain(self.drop)}
