"""The schedule of reductions along the last axis that follow each other, such as a softmax's.

All stages of a row are done before the next row is begun, so that they find it in the nearest
cache.
"""

from __future__ import annotations

import math
from typing import Any

from graphopt.backends._tvm_indices import same
from graphopt.backends._tvm_loops import (
    PARALLEL_ELEMENTS,
    Machine,
    by_kind,
    children,
    dtype_of,
    extent,
    inline_all,
    is_reduction,
    is_static,
    lanes_for,
    parallel,
)

_FEWEST_STAGES = 3
_FEW_LANES = 4
"""Sums that are added up one after the other at the end: more would keep the next stage waiting."""


def row_by_row(schedule: Any, machine: Machine) -> bool:
    """Schedule a function row by row if it is such a chain; tells whether it is."""
    for block in children(schedule)[:-1]:
        if len(schedule.get_consumers(block)) == 1:  # others are computed once, and kept
            inline_all(schedule, [block])
    blocks = children(schedule)
    if len(blocks) < _FEWEST_STAGES or not _is_chain(schedule, blocks):
        return False
    *before, last = blocks
    widest = machine.registers.lanes(dtype_of(schedule, last))
    lanes = lanes_for(schedule, schedule.get_loops(last)[-1], widest)
    if lanes == 1:
        return False
    stages: list[Any] = []
    for block in before:
        if is_reduction(schedule, block):
            depth = len(by_kind(schedule, block)[0])
            for width in (lanes, _FEW_LANES):
                reduced = schedule.get_loops(block)[-1]
                if extent(schedule, reduced) > width:
                    _, lane = schedule.split(reduced, [None, width])
                    stages.append(schedule.rfactor(lane, depth))
        stages.append(block)
    *outer, _ = schedule.get_loops(last)
    row = schedule.fuse(*outer) if len(outer) > 1 else outer[0]
    for stage in reversed(stages):
        schedule.set_scope(stage, 0, "local")
        schedule.compute_at(stage, row)
    if math.prod(extent(schedule, loop) for loop in schedule.get_loops(last)) >= PARALLEL_ELEMENTS:
        parallel(schedule, [row], machine.threads)
    for stage in (*stages, last):
        _inside_row(schedule, stage, lanes)
    return True


def _is_chain(schedule: Any, blocks: list[Any]) -> bool:
    """Whether all have the rows of the last, which reduces nothing, and one output each."""
    *rows_of, last = schedule.get_loops(blocks[-1])
    if not rows_of or is_reduction(schedule, blocks[-1]) or not is_static(schedule, last):
        return False
    sizes = [schedule.get(loop).extent for loop in (*rows_of, last)]
    for block in blocks:
        found = [schedule.get(loop).extent for loop in schedule.get_loops(block)]
        if len(found) != len(sizes) or not all(map(same, found, sizes)):
            return False
        spatial, reduced = by_kind(schedule, block)
        if len(reduced) > 1 or len(spatial) < len(rows_of) or len(schedule.get(block).writes) > 1:
            return False
    return any(is_reduction(schedule, block) for block in blocks)


def _inside_row(schedule: Any, block: Any, lanes: int) -> None:
    """Vectors along what is left of a stage: elements, sums in lanes, or the sum of those."""
    _, *loops = schedule.get_loops(block)
    if not is_reduction(schedule, block):
        _, lane = schedule.split(loops[-1], [None, lanes])
        schedule.vectorize(lane)
        return
    first, *others = [loop for loop in loops if extent(schedule, loop) > 1] or loops[-1:]
    if others:  # sums in the lanes, of which the first loop that is left counts the lanes
        schedule.reorder(others[0], first)
        schedule.vectorize(first)
    schedule.decompose_reduction(block, (others or [first])[0])
