"""Schedules for what is no product: elementwise stages, reductions and pooling.

Reductions along the last axis sum in as many lanes as a register has and add those up at the end;
others keep the last axis in the lanes.
"""

from __future__ import annotations

import contextlib
import importlib
import math
from dataclasses import dataclass
from typing import Any

from graphopt.backends._tvm_indices import number
from graphopt.backends._tvm_tiles import Registers

_ir: Any = importlib.import_module("tvm.ir")

PARALLEL_ELEMENTS = 16384
"""Fewer are done before another thread has woken up."""
_LONG_SUM = 2048
_FEW = 4
"""Elements of an axis that are not worth another order of loops."""
_SQUARE = 64
"""Elements of a row that are written before the next row's are read."""
_SPATIAL = 0
_UNKNOWN_EXTENT = 64


@dataclass(frozen=True)
class Machine:
    """What loops are shaped for."""

    registers: Registers
    threads: int


def children(schedule: Any) -> list[Any]:
    """The blocks of a function, in order."""
    return list(schedule.get_child_blocks(schedule.get_sblock("root")))


def kinds(schedule: Any, block: Any) -> list[int]:
    """For each axis of a block whether it is spatial (0) or reduced (2)."""
    return [int(axis.iter_type) for axis in schedule.get(block).iter_vars]


def by_kind(schedule: Any, block: Any) -> tuple[list[Any], list[Any]]:
    """A block's loops: the spatial ones, then the reduced ones."""
    loops, sorts = schedule.get_loops(block), kinds(schedule, block)
    spatial = [loop for loop, kind in zip(loops, sorts, strict=True) if kind == _SPATIAL]
    return spatial, [loop for loop, kind in zip(loops, sorts, strict=True) if kind != _SPATIAL]


def is_reduction(schedule: Any, block: Any) -> bool:
    """Whether a block sums, or takes an extreme, along some axis."""
    return any(kind != _SPATIAL for kind in kinds(schedule, block))


def extent(schedule: Any, loop: Any) -> int:
    """A loop's number of rounds; a guess where it is symbolic."""
    return number(schedule.get(loop).extent) or _UNKNOWN_EXTENT


def is_static(schedule: Any, loop: Any) -> bool:
    """Whether a loop's number of rounds is known."""
    return number(schedule.get(loop).extent) is not None


def dtype_of(schedule: Any, block: Any) -> str:
    """The dtype of what a block writes."""
    return str(schedule.get(block).writes[0].source.dtype)


def inline_all(schedule: Any, blocks: list[Any]) -> None:
    """Compute each block where it is read, apart from those that cannot be."""
    for block in blocks:
        if not is_reduction(schedule, block):
            with contextlib.suppress(RuntimeError):  # after which the schedule is as it was
                schedule.compute_inline(block)


def lanes_for(schedule: Any, loop: Any, widest: int) -> int:
    """The widest vector that divides a loop; 1 where none does."""
    return math.gcd(extent(schedule, loop), widest) if is_static(schedule, loop) else 1


def elementwise(schedule: Any, block: Any, machine: Machine) -> None:
    """Vectors along the last axis, or along all where each element only depends on its like."""
    loops = schedule.get_loops(block)
    if not loops:
        return
    widest = machine.registers.lanes(dtype_of(schedule, block))
    total = math.prod(extent(schedule, loop) for loop in loops)
    last = loops[-1]
    across = _crossed(schedule, block)
    if across is not None:
        outer = _transpose(schedule, block, across, widest)
        if total >= PARALLEL_ELEMENTS:
            parallel(schedule, outer, machine.threads)
        return
    if _is_pure(schedule, block) and lanes_for(schedule, last, widest) < widest:
        last = schedule.fuse(*loops) if len(loops) > 1 else last
        loops = [last]
    lanes = lanes_for(schedule, last, widest)
    outer = loops[:-1]
    if lanes > 1:
        rest, inner = schedule.split(last, [None, lanes])
        schedule.vectorize(inner)
        outer = [*outer, rest]
    elif not is_static(schedule, last) and total >= widest:
        rest, inner = schedule.split(last, [None, widest])
        schedule.vectorize(inner)
        outer = [*outer, rest]
    elif len(loops) == 1:
        outer = loops
    if total >= PARALLEL_ELEMENTS and outer:
        parallel(schedule, outer, machine.threads)


def _crossed(schedule: Any, block: Any) -> int | None:
    """The axis along which something is stored that the block writes along its last one."""
    details = schedule.get(block)
    names = [str(axis.var) for axis in details.iter_vars]
    loops = schedule.get_loops(block)
    for read in details.reads:
        last = str(read.region[-1].min) if read.region else ""
        if last not in names[:-1] or len(loops) != len(names):
            continue
        ends = (loops[names.index(last)], loops[-1])
        if all(is_static(schedule, loop) and extent(schedule, loop) >= _FEW for loop in ends):
            return names.index(last)
    return None


def _transpose(schedule: Any, block: Any, across: int, widest: int) -> list[Any]:
    """Squares of two axes, so that lines of the cache are used up; returns the loops over them."""
    *outer, last = schedule.get_loops(block)
    crossed = outer.pop(across)
    bare = isinstance(schedule.get(block).body.value, _ir.TensorLoad)
    lanes = lanes_for(schedule, last, _SQUARE if bare else widest)
    above, column = schedule.split(crossed, [None, lanes_for(schedule, crossed, widest)])
    parts, row = schedule.split(last, [None, lanes])
    outer = [*outer, above, parts]
    if bare:
        schedule.reorder(*outer, row, column)
        schedule.unroll(column)
    else:
        schedule.reorder(*outer, column, row)
        if lanes > 1:
            schedule.vectorize(row)
    return outer


def parallel(schedule: Any, loops: list[Any], threads: int) -> tuple[Any, int]:
    """Share the rounds of the outermost loops out to threads.

    Returns the fused loop, and how many loops it was made of.
    """
    taken, rounds = 0, 1
    for loop in loops:
        rounds *= extent(schedule, loop)
        taken += 1
        if rounds >= 8 * threads or (rounds >= threads and rounds % threads == 0):
            break
    fused = schedule.fuse(*loops[:taken]) if taken > 1 else loops[0]
    schedule.parallel(fused)
    return fused, taken


def _is_pure(schedule: Any, block: Any) -> bool:
    """Whether everything that a block reads has the indices of what it writes."""
    details = schedule.get(block)
    written = [str(part.min) for part in details.writes[0].region]
    return all([str(part.min) for part in read.region] == written for read in details.reads)


def reduce(schedule: Any, block: Any, machine: Machine) -> None:
    """Sum in vector registers, along the reduced axis or beside it."""
    spatial, reduced = by_kind(schedule, block)
    widest = machine.registers.lanes(dtype_of(schedule, block))
    if kinds(schedule, block)[-1] != _SPATIAL and _reads_last(schedule, block):
        lanes = lanes_for(schedule, reduced[-1], widest)
        if lanes > 1 and _across(schedule, block, spatial, reduced, lanes, machine):
            return
    terms = math.prod(extent(schedule, loop) for loop in reduced)
    if len(reduced) > 1 and terms >= _LONG_SUM and len(schedule.get(block).writes) == 1:
        # sums of sums: one after the other, rounding errors would add up
        partial, count = schedule.rfactor(reduced[0], 0), len(spatial)
        *kept, first = schedule.get_loops(partial)[: count + 1]
        rest = schedule.get_loops(partial)[count + 1 :]
        _beside(schedule, partial, [first, *kept], rest, widest, machine)
        *kept, last = schedule.get_loops(block)
        _beside(schedule, block, kept, [last], widest, machine)
        return
    _beside(schedule, block, spatial, reduced, widest, machine)


def _reads_last(schedule: Any, block: Any) -> bool:
    """Whether the last, reduced axis is the one along which the input is stored."""
    details = schedule.get(block)
    axis = str(details.iter_vars[-1].var)
    return any(read.region and str(read.region[-1].min) == axis for read in details.reads)


def _across(
    schedule: Any, block: Any, spatial: list[Any], reduced: list[Any], lanes: int, machine: Machine
) -> bool:
    """Sums in the lanes of a register, which are added up by a second block."""
    if len(schedule.get(block).writes) > 1:
        return False
    rows = math.prod(extent(schedule, loop) for loop in spatial)
    _, inner = schedule.split(reduced[-1], [None, lanes])
    partial = schedule.rfactor(inner, len(spatial))
    *others, lane = schedule.get_loops(partial)
    outer, sums = others[: len(spatial)], others[len(spatial) :]
    schedule.reorder(*outer, *sums, lane)
    schedule.vectorize(lane)
    if outer and rows * extent(schedule, sums[-1]) * lanes >= PARALLEL_ELEMENTS:
        parallel(schedule, outer, machine.threads)
    schedule.decompose_reduction(partial, sums[0])
    return True


def _beside(
    schedule: Any,
    block: Any,
    spatial: list[Any],
    reduced: list[Any],
    widest: int,
    machine: Machine,
) -> None:
    """Each lane sums for an output of its own."""
    work = math.prod(extent(schedule, loop) for loop in (*spatial, *reduced))
    if not spatial:
        schedule.decompose_reduction(block, reduced[0])
        return
    lanes = lanes_for(schedule, spatial[-1], widest)
    outer = spatial
    if lanes > 1:
        columns = extent(schedule, spatial[-1]) // lanes
        several = next(count for count in (4, 3, 2, 1) if columns % count == 0)
        rest, vectors, lane = schedule.split(spatial[-1], [None, several, lanes])
        outer = [*spatial[:-1], rest]
        schedule.reorder(*outer, *reduced, vectors, lane)
        schedule.unroll(vectors)
        schedule.vectorize(lane)
    else:
        schedule.reorder(*outer, *reduced)
    if work >= PARALLEL_ELEMENTS:
        parallel(schedule, outer, machine.threads)
    schedule.decompose_reduction(block, reduced[0])
