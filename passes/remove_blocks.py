"""Take out the residual blocks that change least what passes through them.

Why: in deep models some blocks hardly turn the vectors that they are added to; without them the
model is shallower, which saves time at any batch and on any device.
Numerics: lossy; the report says how far results moved.
Needs: samples. A block is what lies between a value and an Add of that value again; one that other
nodes or an output look into stays.

The measure is block influence, one less the mean cosine between a block's input and its output
(Men et al., "ShortGPT", 2024).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from graphopt import ir, taps
from graphopt.context import Context
from graphopt.driver import is_dead, remove, replace_value
from graphopt.errors import InputError
from graphopt.pass_manager import Pass
from graphopt.wildcards import check, fits


@dataclass(frozen=True)
class _Block:
    """`add` adds what `inner` computes from `entry` to `entry`."""

    add: ir.Node
    entry: ir.Value
    inner: frozenset[ir.Node]


@dataclass(frozen=True)
class RemoveBlocks(Pass):
    """Removes `count` blocks, or with `influence` all whose influence is below it.

    `keep` lists patterns of names of the Adds that close blocks which stay.
    """

    lossy: ClassVar[bool] = True
    count: int = 1
    influence: float = 0.0
    keep: tuple[str, ...] = ()

    def run(self, context: Context) -> None:
        check(context.model, self.keep)
        if self.count < 1 or not 0 <= self.influence <= 2:
            raise InputError("remove-blocks: count is 1 or more, influence 0 to 2")
        if context.samples is None:
            raise InputError("remove-blocks needs data: --data")
        found = [block for block in _blocks(context) if not fits(self.keep, ir.label(block.add))]
        influence = _influence(context, found)
        ranked = sorted(range(len(found)), key=lambda place: influence[place])
        if self.influence:
            chosen = [place for place in ranked if influence[place] < self.influence]
        else:
            chosen = ranked[: self.count]
        for place in sorted(chosen, reverse=True):  # a block's entry may close the one above it
            block = found[place]
            context.changed("remove_block", [block.add, *block.inner])
            replace_value(context, block.add.outputs[0], block.entry)
            for node in reversed(list(context.model.graph)):
                if (node in block.inner or node is block.add) and is_dead(node):
                    remove(context, node)


def _blocks(context: Context) -> list[_Block]:
    """The innermost residual blocks of the main graph, in order."""
    order = {node: place for place, node in enumerate(context.model.graph)}
    found: list[_Block] = []
    for add in order:
        if add.op_type != "Add" or add.domain:
            continue
        for entry, branch in (tuple(add.inputs), tuple(reversed(add.inputs))):
            if entry is None or branch is None or ir.constant(entry) is not None:
                continue
            shape = context.shapes.shape(entry)
            if shape is None or shape != context.shapes.shape(add.outputs[0]):
                continue
            inner = _between(entry, branch, order)
            if inner and _closed(inner, add):
                found.append(_Block(add, entry, inner))
                break
    return found


def _between(entry: ir.Value, branch: ir.Value, order: dict[ir.Node, int]) -> frozenset[ir.Node]:
    """The nodes on paths from a value to another; empty where there is no path."""
    producer = entry.producer()
    first = order.get(producer, -1) if producer is not None else -1
    above: set[ir.Node] = set()
    stack = [branch.producer()]
    while stack:
        node = stack.pop()
        if node is None or node in above or order.get(node, -1) <= first:
            continue
        above.add(node)
        stack += [v.producer() for v in node.inputs if v is not None and v is not entry]
    below: set[ir.Node] = set()
    for node in sorted(above, key=order.__getitem__):
        if any(v is entry or (v is not None and v.producer() in below) for v in node.inputs):
            below.add(node)
    return frozenset(below)


def _closed(inner: frozenset[ir.Node], add: ir.Node) -> bool:
    """Whether nothing but the Add uses what the block computes, and it has no bodies."""
    return all(
        not any(True for _ in ir.subgraphs(node))
        and all(
            not value.is_graph_output()
            and all(user in inner or user is add for user in value.consumers())
            for value in node.outputs
        )
        for node in inner
    )


def _influence(context: Context, blocks: Sequence[_Block]) -> list[float]:
    """One less the mean cosine of the vectors before and after each block."""
    assert context.samples is not None
    values = [value for block in blocks for value in (block.entry, block.add.outputs[0])]
    if not values:
        return []
    totals, counts = np.zeros(len(blocks)), np.zeros(len(blocks))
    for sample in taps.tap(context.model, list(dict.fromkeys(values)), context.samples):
        for place, block in enumerate(blocks):
            before, after = (
                _vectors(sample[value.name or ""]) for value in (block.entry, block.add.outputs[0])
            )
            lengths = np.linalg.norm(before, axis=1) * np.linalg.norm(after, axis=1)
            cosines = np.sum(before * after, axis=1) / np.maximum(lengths, 1e-30)
            totals[place] += float(cosines.sum())
            counts[place] += len(cosines)
    return [float(figure) for figure in 1 - totals / np.maximum(counts, 1)]


def _vectors(array: ir.Array) -> Any:
    """Rows to compare: the last axis of sequences, the channels of images."""
    plain: Any = array.astype(np.float64)
    if array.ndim >= 4:
        plain = np.moveaxis(plain, 1, -1)
    return plain.reshape(-1, plain.shape[-1]) if array.ndim else plain.reshape(1, 1)
