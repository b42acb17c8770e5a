"""How far the inputs of layers have moved while the layers before them were pruned."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from graphopt import ir
from graphopt.errors import InputError
from graphopt.gram import column_blocks, geometry
from graphopt.taps import tap

__all__ = ["drift"]

Floats = npt.NDArray[np.float64]


def drift(
    model: ir.Model,
    earlier: ir.Model,
    nodes: Sequence[ir.Node],
    samples: Iterable[Mapping[str, npt.NDArray[Any]]],
) -> dict[str, tuple[Floats, Floats]]:
    """XᵀX of what operators read, and X₀ᵀX with what they read in an earlier state of the model.

    By label, each [groups, k, k], summed over all rows. The earlier model has values of the same
    names. `samples` are gone through twice at once.

    Raises:
        InputError: an input that holds values which are not finite, or that does not fit.
        GraphoptError: a model does not run.
    """
    keys = {ir.label(node): geometry(node) for node in nodes}
    readers = {keys[ir.label(node)]: node for node in nodes}
    names = list(dict.fromkeys(v.name or "" for n in nodes if (v := n.inputs[0]) is not None))
    found: dict[tuple[object, ...], tuple[Floats, Floats]] = {}
    for now, was in zip(tap(model, names, samples), tap(earlier, names, samples), strict=True):
        for key, node in readers.items():
            name = node.inputs[0].name if node.inputs[0] is not None else None
            blocks = (column_blocks(node, sample[name or ""]) for sample in (now, was))
            for rows, old in zip(*blocks, strict=True):
                parts = [np.matmul(x.transpose(0, 2, 1), rows) for x in (rows, old)]
                if not all(np.isfinite(part.sum(dtype=np.float64)) for part in parts):
                    raise InputError(f"{name!r} holds values that are not finite")
                if key not in found:
                    found[key] = np.zeros(parts[0].shape), np.zeros(parts[1].shape)
                for total, part in zip(found[key], parts, strict=True):
                    total += part
    return {label: found[key] for label, key in keys.items() if key in found}
