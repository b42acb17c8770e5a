"""Slices with constant bounds, read and written at any opset."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from graphopt import ir
from graphopt.dims import DimLike
from graphopt.rewriting import Op

END = 2**63 - 1


@dataclass(frozen=True)
class Span:
    """What a Slice takes of one axis. Negative numbers count from the end, as the file has them."""

    start: int
    end: int
    step: int

    def resolved(self, size: DimLike) -> Span | None:
        """The same with bounds within 0..size; None where that depends on an unknown size.

        Only for positive steps; `end` is END where everything from `start` on is taken.
        """
        if self.step < 1:
            return None
        if isinstance(size, int):
            start = self.start + size if self.start < 0 else self.start
            end = self.end + size if self.end < 0 else self.end
            start, end = min(max(start, 0), size), min(max(end, 0), size)
            return Span(start, max(end, start), self.step)
        if self.start < 0 or self.end < 0:
            return None
        return Span(self.start, max(self.end, self.start), self.step)

    def then(self, inner: Span) -> Span:
        """A span of this span, both resolved, as one."""
        start = self.start + inner.start * self.step
        if inner.end >= END // 2:
            return Span(start, self.end, self.step * inner.step)
        end = self.start + inner.end * self.step
        return Span(start, max(start, min(self.end, end)), self.step * inner.step)


def spans(op: Op, node: ir.Node) -> dict[int, Span] | None:
    """What a Slice takes, by non-negative axis; None where its operands are not constant."""
    if node.op_type != "Slice" or node.domain or node.inputs[0] is None:
        return None
    rank = op.rank(node.inputs[0])
    if rank is None:
        return None
    if op.opset < 10:
        starts, ends = op.attr(node, "starts"), op.attr(node, "ends")
        axes, steps = op.attr(node, "axes"), None
    else:
        operands: list[list[int] | None] = []
        for value in [*node.inputs[1:5], None, None][:4]:
            constant = op.const(value)
            if value is not None and constant is None:
                return None
            operands.append(None if constant is None else constant.reshape(-1).tolist())
        starts, ends, axes, steps = operands
    if starts is None or ends is None:
        return None
    axes = [a % rank for a in axes] if axes is not None else list(range(len(starts)))
    steps = steps if steps is not None else [1] * len(starts)
    if len(set(axes)) != len(axes):
        return None
    bounds = zip(starts, ends, steps, strict=True)
    return {axis: Span(*bound) for axis, bound in zip(axes, bounds, strict=True)}


def sliced(op: Op, value: ir.Value, taken: Mapping[int, Span]) -> ir.Value:
    """A Slice of a value."""
    axes = sorted(taken)
    starts, ends = [taken[a].start for a in axes], [taken[a].end for a in axes]
    steps = [taken[a].step for a in axes]
    if op.opset < 10:
        return op.Slice(value, starts=starts, ends=ends, axes=axes)
    if all(step == 1 for step in steps):
        return op.Slice(value, starts, ends, axes)
    return op.Slice(value, starts, ends, axes, steps)


def split(op: Op, value: ir.Value, axis: int, lengths: list[int]) -> list[ir.Value]:
    """A Split into parts of these lengths."""
    if op.opset < 13:
        attributes = {"axis": axis, "split": lengths}
        return list(op.build("Split", [value], attributes, outputs=len(lengths)))
    return list(op.build("Split", [value, lengths], {"axis": axis}, outputs=len(lengths)))
