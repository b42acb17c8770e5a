"""The schedule of products and convolutions: one register tile for all of them."""

from __future__ import annotations

import importlib
import math
from typing import Any

from graphopt.backends._tvm_free import join_rows
from graphopt.backends._tvm_indices import number, ravel, same, simple
from graphopt.backends._tvm_indices import product as count
from graphopt.backends._tvm_loops import (
    PARALLEL_ELEMENTS,
    Machine,
    by_kind,
    elementwise,
    extent,
    is_static,
    parallel,
)
from graphopt.backends._tvm_statements import prefetch

_ir: Any = importlib.import_module("tvm.ir")
_tirx: Any = importlib.import_module("tvm.tirx")
_s_tir: Any = importlib.import_module("tvm.s_tir")

PRODUCT, PADDED = "product", "padded"
_PARALLEL_WORK = 60_000
"""Multiplications below which another thread is not worth waking."""
_MUCH = 20
"""Operations on a sum from which on not all sums are kept in registers."""
_OPERANDS = ("a", "b", "condition", "true_value", "false_value", "value", "body")
_IMAGE_AXES = 4


def multiply(schedule: Any, machine: Machine) -> tuple[Any, str]:
    """Schedule a function with a block `product`; what follows is computed with its tiles.

    Returns the function and the kernel's name.

    Raises:
        RuntimeError: a step that TVM refuses.
    """
    root = schedule.get_sblock("root")
    blocks = schedule.get_child_blocks(root)
    names = [str(schedule.get(block).name_hint) for block in blocks]
    at = names.index(PRODUCT)
    product, tail = blocks[at], blocks[at + 1 :]
    before: list[Any] = []
    for block, name in zip(blocks[:at], names[:at], strict=True):
        if name.startswith(PADDED):
            before.append(block)
        else:  # something that only the tail reads
            schedule.compute_inline(block)
    outputs = [block for block in tail if _is_output(schedule, block)]
    result = last_alike(schedule, tail) if len(outputs) == 1 else _first(schedule, tail, outputs)
    for block in tail:
        if block is not result and block not in outputs:
            schedule.compute_inline(block)
    rest = [block for block in outputs if block is not result]
    annotations = schedule.get(product).annotations
    words = {name: str(annotations[name]) for name in ("kernel", "dot")}
    notes = {str(key): int(value) for key, value in annotations.items() if key not in words}
    for name in words:
        schedule.unannotate(product, name)
    if notes["flat"]:
        schedule, (result, product, *others) = _flatten(schedule, [result, product, *before, *rest])
        before, rest = others[: len(before)], others[len(before) :]
    _Product(schedule, machine, product, result, before, notes, words["dot"]).run()
    for block in rest:
        elementwise(schedule, block, machine)
    function = schedule.mod["main"]
    by_columns = not notes["rows_first"] and not {"depthwise", "stacked"} & set(notes)
    if by_columns and not words["dot"]:
        function = prefetch(function, f"{PRODUCT}_update")
    return function, words["kernel"]


def last_alike(schedule: Any, tail: list[Any]) -> Any:
    """The last stage that has as many elements as the product and depends on it.

    What follows spreads it over more, as a gate is over a feature map, and has loops of its own.
    """

    def size(block: Any) -> Any:
        return count(list(schedule.get(block).writes[0].source.ty.shape))

    names = {str(schedule.get(block).name_hint): block for block in tail}
    alike = [tail[0]]
    for block in alike:
        for consumer in schedule.get_consumers(block):
            name = str(schedule.get(consumer).name_hint)
            if names[name] not in alike and same(size(consumer), size(tail[0])):
                alike.append(names[name])
    return max(alike, key=tail.index)


def _is_output(schedule: Any, block: Any) -> bool:
    written = schedule.get(block).writes[0].source
    return any(written.same_as(parameter) for parameter in schedule.mod["main"].params)


def _first(schedule: Any, tail: list[Any], outputs: list[Any]) -> Any:
    """Of several outputs the first, if the others depend on it alone, else what all depend on."""
    end = tail.index(outputs[0])
    names = [str(schedule.get(block).name_hint) for block in tail]
    reach = [
        names.index(str(schedule.get(consumer).name_hint))
        for block in tail[:end]
        for consumer in schedule.get_consumers(block)
    ]
    return tail[0] if any(index > end for index in reach) else outputs[0]


def _flatten(schedule: Any, blocks: list[Any]) -> tuple[Any, list[Any]]:
    """Number the rows of the first block, a result, as its product's; the schedule and blocks then.

    TVM sees that a row's number is the product's where sizes are known; where not, it is told so,
    which takes a new schedule.
    """
    *rows, _ = (simple(size) for size in schedule.get(blocks[0]).writes[0].source.ty.shape)

    def flat(*index: Any) -> list[Any]:
        return [ravel(index[:-1], rows), index[-1]]

    mapping = _tirx.IndexMap.from_func(flat, ndim=len(rows) + 1)
    schedule.transform_block_layout(blocks[0], mapping)
    if all(number(size) is not None for size in rows):
        return schedule, blocks
    names = [str(schedule.get(block).name_hint) for block in blocks]
    joined = join_rows(schedule.mod["main"], rows)
    schedule = _s_tir.Schedule(_ir.IRModule({"main": joined}))
    return schedule, [schedule.get_sblock(name) for name in names]


def _operations(value: Any) -> int:
    """How many operations and numbers an expression is made of, apart from what it loads."""
    if isinstance(value, _ir.TensorLoad):
        return 0
    parts = [getattr(value, name) for name in _OPERANDS if hasattr(value, name)]
    operands = [*parts, *getattr(value, "args", ())]
    return bool(operands) + sum(map(_operations, operands))


class _Product:
    """One product: its block, the stage that stores it, what comes before, its tile, its dot."""

    def __init__(
        self,
        schedule: Any,
        machine: Machine,
        product: Any,
        result: Any,
        before: list[Any],
        notes: dict[str, int],
        dot: str,
    ) -> None:
        self._schedule, self._machine = schedule, machine
        self._product, self._result, self._before = product, result, before
        self._tile, self._dot = notes, dot
        self._depthwise = bool(notes.get("depthwise"))
        self._shared: Any = None

    def run(self) -> None:
        """Cut the loops, order them, and put the result's stage into them."""
        s, product = self._schedule, self._product
        if self._depthwise and not self._tile["band"]:
            for block in self._before:
                s.compute_inline(block)
            self._before = []
        outer, row, block, lane, sums = self._loops()
        work = math.prod(extent(s, loop) for loop in s.get_loops(product))
        high, rows = s.split(row, [None, self._tile["rows"]])
        vectors, lanes = s.split(lane, [None, self._tile["lanes"]])
        stack = outer if self._tile.get("stacked") else []  # each has a right side of its own
        if self._depthwise:
            order, bands = self._banded(outer, high, block)
        elif self._tile["rows_first"]:
            order, bands = [*outer, high, block], None
        else:
            order, bands = [*stack, block, *outer[len(stack) :], high], None
        group = [sums.pop()] if self._dot else []
        written: list[Any] = []
        if self._tile["unroll"] > 1 and not self._depthwise:
            several = math.gcd(extent(s, sums[-1]), self._tile["unroll"])
            sums[-1], inner = s.split(sums[-1], [None, several])
            written.append(inner)
        s.reorder(*order, *sums, *written, rows, vectors, lanes, *group)
        s.set_scope(product, 0, "local")
        self._store(order)
        for loop in (*written, rows, vectors):
            s.unroll(loop)
        if not self._dot:
            s.vectorize(lanes)
        if self._depthwise:
            for loop in sums:
                s.unroll(loop)
        taken = self._share(order, work, bands)
        start = s.decompose_reduction(product, sums[0])
        self._clear(start, len(order) - taken + 1 if taken else len(order))
        if self._dot:
            s.tensorize(lanes, self._dot)
        self._fill(bands)

    def _loops(self) -> tuple[list[Any], Any, Any, Any, list[Any]]:
        """The product's loops by what they are for."""
        spatial, sums = by_kind(self._schedule, self._product)
        if self._tile.get("stacked"):
            *outer, row, column = spatial
            width = self._tile["vectors"] * self._tile["lanes"]
            block, lane = self._schedule.split(column, [None, width])
        else:
            *outer, row, block, lane = spatial
        return outer, row, block, lane, sums

    def _banded(self, outer: list[Any], high: Any, block: Any) -> tuple[list[Any], Any]:
        """Depthwise loops, in bands of rows for which the input is padded at once."""
        s = self._schedule
        *batch, row = outer
        inner = [block, high] if self._tile["rows_first"] else [high, block]
        if not self._before or not is_static(s, row):
            return [*batch, row, *inner], None
        size, most = extent(s, row), self._tile["band"]
        band = next(count for count in range(most, 0, -1) if size % count == 0)
        if band < 3 and size > most:
            band = most
        bands, inside = s.split(row, [None, band])
        return [*batch, bands, inside, *inner], bands

    def _store(self, order: list[Any]) -> None:
        """The result's stage: vectors along the columns, everything unrolled.

        Where much is computed of each sum, the sums leave their registers first, and are taken up
        one after the other: written out for all, it would need them.
        """
        s, at, depth = self._schedule, order[-1], len(order)
        much = _operations(s.get(self._result).body.value) > _MUCH
        if much:
            reads = [str(read.source.name) for read in s.get(self._result).reads]
            sums = str(s.get(self._product).writes[0].source.name)
            kept = s.cache_read(self._result, reads.index(sums), "local")
            s.reverse_compute_at(kept, at, preserve_unit_loops=True)
            self._write_out(s.get_loops(kept)[depth:], self._tile["lanes"])
        s.reverse_compute_at(self._result, at, preserve_unit_loops=True)
        columns = number(s.get(self._result).writes[0].source.ty.shape[-1])
        lanes = math.gcd(columns, self._tile["lanes"]) if columns else 1
        self._write_out(s.get_loops(self._result)[depth:], lanes, serial=much)

    def _write_out(self, loops: list[Any], lanes: int, serial: bool = False) -> None:
        s = self._schedule
        if lanes > 1:
            rest, inner = s.split(loops[-1], [None, lanes])
            s.vectorize(inner)
            loops = [*loops[:-1], rest]
        else:
            loops = loops[:-1]
        for loop in [] if serial else loops:
            s.unroll(loop)

    def _share(self, order: list[Any], work: int, bands: Any) -> int:
        """Share tiles out to threads; returns how many loops were fused."""
        if work < _PARALLEL_WORK:
            return 0
        candidates = order[: order.index(bands) + 1] if bands is not None else order
        fused, taken = parallel(self._schedule, candidates, self._machine.threads)
        if taken == len(candidates):
            self._shared = fused
        return taken

    def _clear(self, start: Any, depth: int) -> None:
        """The stage that sets the sums to zero."""
        s = self._schedule
        loops = s.get_loops(start)[depth:]
        for loop in loops[:-1]:
            s.unroll(loop)
        s.vectorize(loops[-1])

    def _fill(self, bands: Any) -> None:
        """The stages before: padding, by itself or band by band."""
        s = self._schedule
        for block in self._before:
            if bands is not None:
                at = bands if self._shared is None else self._shared
                s.compute_at(block, at, preserve_unit_loops=True)
                self._vectorize_copy(block)
            else:
                self._pad(block)

    def _pad(self, block: Any) -> None:
        """A padded copy: each row in three parts, of which the middle asks for no edge."""
        s = self._schedule
        loops = s.get_loops(block)
        if len(loops) < _IMAGE_AXES or not all(is_static(s, loop) for loop in loops[-2:]):
            elementwise(s, block, self._machine)
            return
        total = math.prod(extent(s, loop) for loop in loops)
        *outer, wide, deep = loops
        s.annotate(s.fuse(wide, deep), "pragma_loop_partition_hint", 1)
        if total >= PARALLEL_ELEMENTS:
            parallel(s, outer, self._machine.threads)

    def _vectorize_copy(self, block: Any) -> None:
        s = self._schedule
        last = s.get_loops(block)[-1]
        lanes = math.gcd(extent(s, last), self._tile["lanes"])
        if is_static(s, last) and lanes > 1:
            _, inner = s.split(last, [None, lanes])
            s.vectorize(inner)
