"""Rewriting of loop nests that schedules cannot express: prefetches, and where sums are kept."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

from graphopt.backends._tvm_indices import number, product, ravel, simple

tvm: Any = importlib.import_module("tvm")
tirx: Any = importlib.import_module("tvm.tirx")
_s_tir: Any = importlib.import_module("tvm.s_tir")
_pipeline: Any = importlib.import_module("tvm.tirx.compilation_pipeline")

PIPELINE = "graphopt"
"""The name under which TVM finds the lowering of `register`."""
_LINE = 64
"""Bytes of a line of the cache."""
_MOST_LINES = 4
"""Prefetches per round of the sum: where more would be needed, memory is the limit anyway."""
_STACK_BYTES = 4096

Change = Callable[[Any, list[Any]], Any]
"""Of a statement and the loops around it to what stands in for it; None to look inside."""


def rewrite(statement: Any, change: Change, loops: Sequence[Any] = ()) -> Any:
    """A statement with parts of it changed, from the outside to the inside."""
    around = list(loops)
    changed = change(statement, around)
    if changed is not None:
        return changed
    s = statement
    if isinstance(s, tirx.For):
        body = rewrite(s.body, change, [*around, s])
        return _loop(s, body)
    if isinstance(s, tirx.SeqStmt):
        return tirx.SeqStmt([rewrite(part, change, around) for part in s.seq])
    if isinstance(s, tirx.AttrStmt):
        return tirx.AttrStmt(s.node, s.attr_key, s.value, rewrite(s.body, change, around))
    if isinstance(s, tirx.IfThenElse):
        other = None if s.else_case is None else rewrite(s.else_case, change, around)
        return tirx.IfThenElse(s.condition, rewrite(s.then_case, change, around), other)
    if isinstance(s, _s_tir.SBlockRealize):
        return block_with(s, rewrite(s.block.body, change, around), s.block.init)
    return s


def block_with(realized: Any, body: Any, init: Any) -> Any:
    """A block with another body and another stage that sets its sums."""
    b = realized.block
    parts = (init, b.alloc_buffers, b.match_buffers, b.annotations)
    block = _s_tir.SBlock(b.iter_vars, b.reads, b.writes, b.name_hint, body, *parts)
    return _s_tir.SBlockRealize(realized.iter_values, realized.predicate, block)


def _loop(s: Any, body: Any) -> Any:
    return tirx.For(
        s.loop_var, s.min, s.extent, s.kind, body, s.thread_binding, s.annotations, s.step
    )


def prefetch(function: Any, block: str) -> Any:
    """A scheduled product that loads the next block of its weights while it computes with one.

    The hardware only learns of a block when the first tile of rows reads it, and waits for memory
    then; here every round of the sum asks for its share of the next one.

    Args:
        function: whose outermost loop is over blocks of packed weights, alone or fused.
        block: the name of the block that sums.
    """

    def change(statement: Any, loops: list[Any]) -> Any:
        found = _innermost(statement, block)
        if found is None:
            return None
        fetches = _fetches(found, [*loops, statement], function.params)
        return _loop(statement, tirx.SeqStmt([*fetches, statement.body])) if fetches else statement

    return function.with_body(rewrite(function.body, change))


def _innermost(statement: Any, block: str) -> Any:
    """The block below a serial loop, with only unrolled and vector loops in between."""
    serial = (tirx.ForKind.SERIAL, tirx.ForKind.PARALLEL)
    if not isinstance(statement, tirx.For) or statement.kind not in serial:
        return None
    inner = statement.body
    while isinstance(inner, tirx.For) and inner.kind not in serial:
        inner = inner.body
    if isinstance(inner, _s_tir.SBlockRealize) and inner.block.name_hint == block:
        return inner
    return None


def _fetches(realized: Any, loops: list[Any], params: Any) -> list[Any]:
    """Prefetches for a round of the sum; none where sizes are unknown or there is nothing next."""
    weights = _weights(realized.block, params)
    sizes = [number(loop.extent) for loop in loops]
    if weights is None or None in sizes:
        return []
    buffer, axis = weights
    blocks, *shape = (int(size) for size in buffer.ty.shape)
    first, rounds = sizes[0] or 1, product(sizes)
    if blocks < 2 or first % blocks:
        return []
    size = int(product(shape))
    lane = int(tvm.DataType(str(buffer.ty.dtype)).bits) // 8
    share = -(-size * blocks // rounds)
    lines = -(-share * lane // _LINE)
    if lines > _MOST_LINES:
        return []
    at = realized.iter_values[axis]
    inside = loops[0].loop_var - at * (first // blocks)
    done = ravel([inside, *(loop.loop_var for loop in loops[1:])], [first // blocks, *sizes[1:]])
    start = (at + 1) * size + done * share
    zeros = [0] * len(shape)
    return [_fetch(buffer[(*zeros, simple(start + line * _LINE // lane))]) for line in range(lines)]


def _weights(block: Any, params: Any) -> Any:
    """The argument [blocks, ..., lanes] that a block reads, and which of its axes counts blocks."""
    spatial = {
        str(axis.var): index for index, axis in enumerate(block.iter_vars) if axis.iter_type == 0
    }
    for read in block.reads:
        first, last = (str(read.region[index].min) for index in (0, -1))
        given = any(read.source.same_as(parameter) for parameter in params)
        if given and first in spatial and last in spatial:
            return read.source, spatial[first]
    return None


def _fetch(element: Any) -> Any:
    """Of the element's line, for reading, into the caches from the second on."""
    read, locality, data = (tirx.const(value, "int32") for value in (0, 2, 1))
    address = tirx.address_of(element)
    return tirx.Evaluate(
        tirx.call_llvm_intrin("void", "llvm.prefetch.p0", address, read, locality, data)
    )


def keep_sums_on_stack(function: Any) -> Any:
    """Local buffers as variables of the function, which the compiler then holds in registers.

    TVM takes those of more than 1 kB from the heap, and other effects between them, such as a
    prefetch, then make it store every sum in every round.
    """

    def change(statement: Any, loops: list[Any]) -> Any:
        if not isinstance(statement, tirx.AllocBuffer):
            return None
        kind = statement.buffer.ty
        size, dtype = number(product(list(kind.shape))), tvm.DataType(str(kind.dtype))
        bytes_ = None if size is None else size * int(dtype.bits) * int(dtype.lanes) // 8
        if kind.storage_scope != "local" or bytes_ is None or bytes_ > _STACK_BYTES:
            return statement
        notes = {"disable_lower_builtin": tirx.const(True, "bool")}
        return tirx.AllocBuffer(statement.buffer, {**statement.annotations, **notes})

    return function.with_body(rewrite(function.body, change))


def register() -> None:
    """Let TVM know its own lowering with `keep_sums_on_stack` before the last steps."""
    lower, host, device = _pipeline.get_tir_pipeline("s_tir")

    def with_stack() -> Any:
        def apply(function: Any, *_: Any) -> Any:
            return keep_sums_on_stack(function)

        stack = tirx.transform.prim_func_pass(apply, opt_level=0, name="keep_sums_on_stack")
        return tvm.transform.Sequential([stack, host()])

    _pipeline.register_tir_pipeline(PIPELINE, lambda: (lower, with_stack, device))
