"""What is remembered of pruning for whoever refits afterwards."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import cast

from graphopt import ir
from graphopt.pruner.adjusting import Kept
from graphopt.pruner.atoms import Axis
from graphopt.pruner.groups import Groups

__all__ = ["RECORD", "Positions", "Record", "positions", "record_of"]

RECORD = "graphopt.pruning"
"""Key of a pruned model's `meta`: a Record. It lives as long as the process, not in files."""

Positions = dict[str, dict[int, Axis]]
"""Value name → axis → which positions of the unpruned model's axis are left."""


@dataclass(frozen=True)
class Record:
    """What recovery needs to know: the model before anything was pruned, and what is left of it."""

    teacher: ir.Model
    kept: Positions
    ranks: dict[str, int] = field(default_factory=dict[str, int])
    """Layers, by their results' names, that recovery is to make two of these ranks of."""


def record_of(model: ir.Model) -> Record | None:
    """What was noted when a model was pruned; None where it was not, or was loaded since."""
    found: object = cast("Mapping[str, object]", model.meta).get(RECORD)
    return found if isinstance(found, Record) else None


def positions(groups: Groups, kept: Kept, earlier: Record | None) -> Positions:
    """What is left of each axis that lost something, through all rounds of pruning so far."""
    found: Positions = {}
    for value, axes in groups.trace.axes.items():
        name = value.name or ""
        older = earlier.kept.get(name, {}) if earlier is not None else {}
        for index, axis in enumerate(axes):
            base = older.get(index)
            left = kept.positions(axis)
            if base is not None and len(base) == len(axis):
                left = base[left]
            elif len(left) == len(axis):
                continue
            found.setdefault(name, {})[index] = left
    return found
