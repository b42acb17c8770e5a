"""What the rules of reverse mode share: a node's attributes, and sums over what was broadcast."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy.typing as npt

from graphopt import ir

__all__ = ["Array", "Gradients", "Rule", "fit", "integer", "numbers", "real", "window_of"]

Array = npt.NDArray[Any]
Gradients = Sequence[Array | None]
Rule = Callable[[ir.Node, list[Array], Array, Array], Gradients]
"""Node, its inputs, its output, the gradient of that → the gradients of the inputs."""


def fit(gradient: Array, shape: tuple[int, ...]) -> Array:
    """A gradient summed over what was broadcast."""
    extra = gradient.ndim - len(shape)
    if extra:
        gradient = gradient.sum(tuple(range(extra)))
    axes = tuple(i for i, size in enumerate(shape) if size == 1 and gradient.shape[i] != 1)
    return gradient.sum(axes, keepdims=True) if axes else gradient


def numbers(node: ir.Node, name: str, default: Sequence[int]) -> list[int]:
    """An attribute that is a list of integers."""
    attr = node.attributes.get(name)
    return list(default) if attr is None else list(attr.as_ints())


def integer(node: ir.Node, name: str, default: int) -> int:
    """An attribute that is an integer."""
    return int(str(ir.attribute(node, name, default)))


def real(node: ir.Node, name: str, default: float) -> float:
    """An attribute that is a number."""
    return float(str(ir.attribute(node, name, default)))


def window_of(
    place: Sequence[int], steps: Sequence[int], sizes: Sequence[int]
) -> tuple[slice, ...]:
    """Where a place of a kernel reads, for outputs of some sizes."""
    return tuple(
        slice(p, p + (n - 1) * s + 1, s) for p, s, n in zip(place, steps, sizes, strict=True)
    )
