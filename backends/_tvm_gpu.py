"""Schedules for GPUs: TVM's rules for products and long sums, and one thread a result for the rest.

TVM has a block of threads add up even the nine numbers of a depthwise convolution, and writes what
a sum leaves to memory before the elementwise operators behind it read it again.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

from graphopt.backends._tvm_executable import last_line
from graphopt.backends._tvm_indices import number, product, same
from graphopt.backends._tvm_loops import by_kind, children, inline_all, is_reduction
from graphopt.backends._tvm_schedule import DONE, Log
from graphopt.backends._tvm_statements import rewrite
from graphopt.errors import GraphoptError

tvm: Any = importlib.import_module("tvm")
_s_tir: Any = importlib.import_module("tvm.s_tir")
_tirx: Any = importlib.import_module("tvm.tirx")
_pipeline: Any = importlib.import_module("tvm.tirx.compilation_pipeline")
_dlight: Any = importlib.import_module("tvm.s_tir.dlight").gpu

THREADS = 256
"""Of a block."""
_SHORT = 64
"""Numbers that one thread adds up, however few results there are."""
_LONG = 1024
"""Numbers that one thread adds up where there are results enough for all threads."""
_MANY = 1 << 15
"""Results that keep a GPU busy with a thread for each."""

_OUTER = ("blockIdx.y", "blockIdx.z")

Rule = Callable[[Any, Any], Any]
"""Of a function and a target to the scheduled function; None where it does not fit."""


def schedule_all(module: Any, aim: Any) -> tuple[Any, Log]:
    """The module with each of its kernels scheduled, and the log of it.

    Raises:
        GraphoptError: a kernel that no rule takes: there are no serial kernels on a GPU.
    """
    log = Log()
    for name, function in list(module.functions.items()):
        is_kernel = isinstance(function, _tirx.PrimFunc)
        if is_kernel and not (function.attrs and DONE in function.attrs):
            module[name] = _one(str(name.name_hint), function, aim, log)
    return module, log


def _one(name: str, function: Any, aim: Any, log: Log) -> Any:
    reasons: list[str] = []
    for rule in _RULES:
        try:
            scheduled = _RULES[rule](function, aim)
            if scheduled is not None and _has_free_sizes(function):
                _lower(scheduled, aim)
        except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
            reasons.append(f"{rule}: {last_line(error)}")
            continue
        if scheduled is not None:
            log.rules[name] = rule
            return scheduled.with_attr(DONE, True)
    raise GraphoptError(f"tvm: no schedule for kernel {name} ({'; '.join(reasons) or 'no rule'})")


def _has_free_sizes(function: Any) -> bool:
    shapes = (getattr(parameter.ty, "shape", ()) for parameter in function.params)
    return any(number(size) is None for shape in shapes for size in shape)


def _lower(function: Any, aim: Any) -> None:
    """Raises what TVM would raise later: room for tiles of some free sizes it cannot bound."""
    attrs = {"global_symbol": "main", "target": aim}
    lower, _, _ = _pipeline.get_tir_pipeline("s_tir")
    lowered = lower(tvm.IRModule({"main": function.with_attrs(attrs)}))

    def check(statement: Any, _: list[Any]) -> Any:
        if isinstance(statement, _tirx.AllocBuffer):
            shape = statement.buffer.ty.shape
            if any(number(size) is None for size in shape):
                raise ValueError(f"room of {list(shape)} numbers in a kernel")
        return None

    for part in lowered.functions.values():
        rewrite(part.body, check)


def _has_threads(function: Any) -> bool:
    """Whether parts of a kernel are shared out to threads already, as sorting is."""
    found: list[Any] = []

    def look(statement: Any, _: list[Any]) -> Any:
        bound = isinstance(statement, _tirx.AttrStmt) and statement.attr_key == "thread_extent"
        is_loop = isinstance(statement, _tirx.For)
        if bound or (is_loop and statement.kind == _tirx.ForKind.THREAD_BINDING):
            found.append(statement)
        return None

    rewrite(function.body, look)
    return bool(found)


def _as_it_is(function: Any, aim: Any) -> Any:
    return function if _has_threads(function) else None


def _theirs(rule: Any) -> Rule:
    def apply(function: Any, aim: Any) -> Any:
        found = rule.apply(function, aim, False)  # a schedule, some of them, or None
        if hasattr(found, "__getitem__"):
            found = found[0]
        return None if found is None else found.mod["main"]

    return apply


def _by_thread(function: Any, aim: Any, *, only_short: bool = False, fused: bool = True) -> Any:
    """One thread for each result, with the sums it needs; None where they would be repeated."""
    if _has_threads(function):
        return None
    schedule = _s_tir.Schedule(function)
    inline_all(schedule, children(schedule)[:-1])
    blocks = children(schedule)
    *before, last = blocks
    loops = {block: by_kind(schedule, block) for block in blocks}
    results = _extents(schedule, loops[last][0])
    if any(not _is_for_each(schedule, block, results) for block in before):
        return None
    if only_short and any(
        not _is_short(_extents(schedule, reduced), results) for _, reduced in loops.values()
    ):
        return None
    for spatial, reduced in loops.values():
        schedule.reorder(*spatial, *reduced)
    outer = loops[last][0] or [schedule.add_unit_loop(last)]
    innermost = _bind(schedule, [schedule.fuse(*outer)] if fused else outer)
    for block in reversed(before):
        for index in range(len(schedule.get(block).writes)):
            schedule.set_scope(block, index, "local")
        schedule.compute_at(block, innermost, preserve_unit_loops=True)
    for block, (_, reduced) in loops.items():
        if reduced:  # where TVM cannot, each round asks whether it is the first
            with contextlib.suppress(RuntimeError):
                schedule.decompose_reduction(block, schedule.get_loops(block)[-len(reduced)])
    return schedule.mod["main"]


def _bind(schedule: Any, loops: list[Any]) -> Any:
    """Share loops out to threads and blocks, the last ones first; returns the innermost."""
    *outer, last = loops
    above, thread = schedule.split(last, [None, THREADS])
    schedule.bind(above, "blockIdx.x")
    schedule.bind(thread, "threadIdx.x")
    rest = outer[: -len(_OUTER)] if len(outer) > len(_OUTER) else []
    for loop, axis in zip(reversed(outer[len(rest) :]), _OUTER, strict=False):
        schedule.bind(loop, axis)
    schedule.reorder(*outer[len(rest) :], above, thread, *rest)
    return [thread, *rest][-1]


def _extents(schedule: Any, loops: list[Any]) -> list[Any]:
    return [schedule.get(loop).extent for loop in loops]


def _is_for_each(schedule: Any, block: Any, results: list[Any]) -> bool:
    """Whether a block sums up what one result needs and no other: there are as many of both."""
    if not is_reduction(schedule, block):
        return False
    spatial = by_kind(schedule, block)[0]
    return same(product(_extents(schedule, spatial)), product(results))


def _is_short(reduced: list[Any], results: list[Any]) -> bool:
    length = number(product(reduced))
    known = product([size for size in map(number, results) if size is not None])
    return length is not None and (length <= _SHORT or (length <= _LONG and known >= _MANY))


_RULES: dict[str, Rule] = {
    "product": _theirs(_dlight.Matmul()),
    "thread for each result": partial(_by_thread, only_short=True),
    "product with a vector": _theirs(_dlight.GEMV()),
    "sum by a block": _theirs(_dlight.Reduction()),
    "rows by a block": _theirs(_dlight.GeneralReduction()),
    "thread for each result, long": _by_thread,
    "thread for each result, axis by axis": partial(_by_thread, fused=False),
    "stage by stage": _theirs(_dlight.Fallback()),
    "threads of its own": _as_it_is,
}
"""The first that fits is taken."""
