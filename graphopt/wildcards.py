"""Nodes and weights as users name them: by name or type, with `*` for any text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase

from graphopt import ir
from graphopt.errors import InputError

__all__ = ["check", "fits", "named", "names"]


def fits(patterns: Iterable[str], *names: str | None) -> bool:
    """Whether one of the patterns is, or stands for, one of the names."""
    return any(name == p or fnmatchcase(name or "", p) for p in patterns for name in names)


def names(weights: ir.Value | None) -> Iterator[str]:
    """What constant weights go by: their own name, and their readers' labels and types."""
    if weights is not None:
        yield weights.name or ""
        for node in weights.consumers():
            yield from (ir.label(node), node.op_type)


def check(model: ir.Model, patterns: Iterable[str]) -> None:
    """Raise InputError, naming it, for a pattern that fits no node, type or constant."""
    for pattern in patterns:
        for node in ir.all_nodes(model):
            weights = (v.name for v in node.inputs if v is not None and ir.constant(v) is not None)
            if fits([pattern], ir.label(node), node.op_type, *weights):
                break
        else:
            raise InputError(f"no node or weight is named {pattern!r}")


def named(model: ir.Model, patterns: Iterable[str]) -> tuple[str, ...]:
    """The labels of nodes, those in bodies included, whose label or type patterns fit.

    Raises:
        InputError: a pattern that fits none of them.
    """
    kinds = {ir.label(node): node.op_type for node in ir.nested_nodes(model)}
    found: dict[str, None] = {}
    for pattern in patterns:
        hits = [label for label, kind in kinds.items() if fits([pattern], label, kind)]
        if not hits:
            raise InputError(f"no node is named {pattern!r}")
        found.update(dict.fromkeys(hits))
    return tuple(found)
