"""Which schedule a kernel gets, and what became of each."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from typing import Any

from graphopt.backends import _tvm_loops as loops
from graphopt.backends import _tvm_winograd
from graphopt.backends._tvm_executable import last_line
from graphopt.backends._tvm_extremes import infinite_starts
from graphopt.backends._tvm_free import name_sizes, straighten
from graphopt.backends._tvm_loops import Machine
from graphopt.backends._tvm_products import PRODUCT, multiply
from graphopt.backends._tvm_rows import row_by_row

tvm: Any = importlib.import_module("tvm")
_s_tir: Any = importlib.import_module("tvm.s_tir")
_tirx: Any = importlib.import_module("tvm.tirx")
_ir: Any = importlib.import_module("tvm.ir")
_ffi: Any = importlib.import_module("tvm_ffi")

DONE = "tirx.is_scheduled"
"""The attribute of kernels that are left as they are."""


@dataclass
class Log:
    """What was done to the kernels of a model."""

    rules: dict[str, str] = field(default_factory=dict[str, str])
    """Rule by kernel."""
    kernels: dict[str, str] = field(default_factory=dict[str, str])
    """For products, which one it is: what tuning knows it by."""
    unscheduled: dict[str, str] = field(default_factory=dict[str, str])
    """Why, by kernel: these run as plain loops, correctly and slowly."""
    untiled: dict[str, str] = field(default_factory=dict[str, str])
    """Products without tiles, by kernel: why, and 10 to 200 times slower."""


def schedule_all(module: Any, machine: Machine) -> tuple[Any, Log]:
    """The module with each of its kernels scheduled, and the log of it."""
    log = Log()
    for name, function in list(module.functions.items()):
        if not isinstance(function, _tirx.PrimFunc):
            continue
        if function.attrs and DONE in function.attrs:
            continue
        module[name] = _one(str(name.name_hint), function, machine, log)
    return module, log


def _one(name: str, function: Any, machine: Machine, log: Log) -> Any:
    reasons: list[str] = []
    function = name_sizes(function)
    for rule in (_product, _rows, _stages):
        schedule = _s_tir.Schedule(tvm.IRModule({"main": function}))
        try:
            found = rule(schedule, machine)
            if found is not None:
                _require_lowering(found[0])
        except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
            reasons.append(f"{rule.__name__[1:]}: {last_line(error)}")
            continue
        if found is None:
            continue
        scheduled, kernel = straighten(infinite_starts(found[0])), found[1]
        log.rules[name] = rule.__name__[1:] + (f" ({'; '.join(reasons)})" if reasons else "")
        if kernel:
            log.kernels[name] = kernel
        elif _multiplies(function):
            log.untiled[name] = "; ".join(reasons) or "it has no form that tiles are known for"
        if function.attrs:
            scheduled = scheduled.with_attrs(function.attrs)
        return scheduled.with_attr(DONE, True)
    log.unscheduled[name] = "; ".join(reasons)
    return infinite_starts(function)


def _require_lowering(function: Any) -> None:
    """Raise RuntimeError where TVM would fail with the whole model later, without this name."""
    steps = _s_tir.transform
    lowering = [
        steps.LowerInitBlock(),
        steps.PlanAndUpdateBufferAllocationLocation(),
        steps.ConvertBlocksToOpaque(),
        steps.CompactBufferAllocation(),
    ]
    try:
        tvm.transform.Sequential(lowering)(tvm.IRModule({"main": function}))
    except RuntimeError as error:
        text = "TVM cannot bound what it reads of free sizes"
        raise RuntimeError(f"{text} ({last_line(error)[:80]})") from None


def _multiplies(function: Any) -> bool:
    """Whether a kernel adds up products of two tensors."""
    found: list[Any] = []

    def visit(total: Any) -> None:
        term = total.b
        if isinstance(term, _tirx.Mul) and isinstance(total.a, _ir.TensorLoad):
            parts = [term.a, term.b]
            if all(isinstance(part, _ir.TensorLoad) for part in parts):
                found.append(not term.a.source.same_as(term.b.source))

    _ffi.structural_walk(function, (_tirx.Add, visit))
    return any(found)


def _product(schedule: Any, machine: Machine) -> tuple[Any, str] | None:
    """The function and the kernel's name; None where there is no product."""
    names = [str(schedule.get(block).name_hint) for block in loops.children(schedule)]
    if _tvm_winograd.SUMS in names:
        return _tvm_winograd.schedule(schedule, machine)
    return multiply(schedule, machine) if PRODUCT in names else None


def _rows(schedule: Any, machine: Machine) -> tuple[Any, str] | None:
    """Reductions along the last axis that follow each other, row by row."""
    return (schedule.mod["main"], "") if row_by_row(schedule, machine) else None


def _stages(schedule: Any, machine: Machine) -> tuple[Any, str]:
    """Every stage by itself, elementwise ones in the place where they are read."""
    blocks = loops.children(schedule)
    loops.inline_all(schedule, blocks[:-1])
    for block in loops.children(schedule):
        if not schedule.get_loops(block):  # TVM cannot factor a sum that such a block reads
            schedule.add_unit_loop(block)
    for block in loops.children(schedule):
        if loops.is_reduction(schedule, block):
            loops.reduce(schedule, block, machine)
        else:
            loops.elementwise(schedule, block, machine)
    return schedule.mod["main"], ""
