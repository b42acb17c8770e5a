"""Take rows out of embedding tables that data hardly use.

Why: of a vocabulary of many languages an application may see a tenth, and the table is often most
of a small model.
Numerics: lossy for tokens that have gone, which stand for the most alike one that is left, or for
one of choice; exact for all others.
Needs: data that use the vocabulary as the application will. Inputs stay as they are: a list of
numbers turns them into those of the smaller table. A table that is used for more than looking up,
such as for the scores of a language model, stays whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from graphopt import ir, taps
from graphopt.context import Context
from graphopt.errors import InputError
from graphopt.pass_manager import Pass
from graphopt.wildcards import check, fits, names

_LEAST = 1024  # elements of a table below which there is nothing to gain
_ROWS = 1024  # that are compared with all others at once

Floats = npt.NDArray[np.float32]
Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class PruneVocabulary(Pass):
    """`ratio` is the share of rows that goes, the rarest first; 0: those the data never use.

    `unknown` is the row that stands for those that have gone, -1 the most alike one; `keep` lists
    patterns of tables, and of nodes that read them, which stay.
    """

    lossy: ClassVar[bool] = True
    ratio: float = 0.0
    unknown: int = -1
    keep: tuple[str, ...] = ()

    def run(self, context: Context) -> None:
        check(context.model, self.keep)
        if not 0 <= self.ratio < 1 or self.unknown < -1:
            raise InputError("prune-vocabulary: ratio is 0 to below 1, unknown -1 or a row")
        if context.samples is None:
            raise InputError("prune-vocabulary needs data: --data")
        tables = self._tables(context)
        if not tables:
            return
        counts = _counts(context, tables)
        for table, nodes in tables.items():
            array = ir.array(table)
            assert array is not None
            left = self._left(counts[table])
            if len(left) < len(array):
                _shrink(context, table, nodes, left, _map(array, left, self.unknown))

    def _tables(self, context: Context) -> dict[ir.Value, list[ir.Node]]:
        """Constants of two axes that only Gathers along the first one read, with these."""
        found: dict[ir.Value, list[ir.Node]] = {}
        for node in context.model.graph:
            table = node.inputs[0] if node.op_type == "Gather" and not node.domain else None
            tensor = ir.constant(table)
            if table is None or tensor is None or table in found or len(tensor.shape) != 2:
                continue
            rows = tensor.shape.numpy()[0]
            if tensor.size < _LEAST or ir.constant(node.inputs[1]) is not None:
                continue
            if fits(self.keep, *names(table)):
                continue
            users = list(table.consumers())
            if not table.is_initializer() or table.is_graph_input() or table.is_graph_output():
                context.record.refuse(node, "its table is no constant of its own")
            elif any(not _looks_up(user, table) for user in users):
                context.record.refuse(node, "its table is used for more than looking up")
            elif self.unknown >= rows:
                raise InputError(f"prune-vocabulary: {table.name!r} has no row {self.unknown}")
            else:
                found[table] = users
        return found

    def _left(self, counts: Rows) -> Rows:
        """The rows that stay, in order."""
        order = np.argsort(-counts, kind="stable")
        count = int(np.count_nonzero(counts))
        if self.ratio:
            count = len(counts) - int(self.ratio * len(counts))
        left = order[: max(count, 1)]
        if self.unknown >= 0 and self.unknown not in left:
            left = np.append(left[:-1] if self.ratio and len(left) > 1 else left, self.unknown)
        found: Rows = np.sort(left).astype(np.int64)
        return found


def _looks_up(node: ir.Node, table: ir.Value) -> bool:
    if node.op_type != "Gather" or node.inputs[0] is not table or node.inputs[1] is table:
        return False
    graph = node.graph
    return ir.attribute(node, "axis", 0) == 0 and graph is table.graph


def _counts(context: Context, tables: dict[ir.Value, list[ir.Node]]) -> dict[ir.Value, Rows]:
    """How often the data use each row."""
    assert context.samples is not None
    names = [node.inputs[1] for nodes in tables.values() for node in nodes]
    wanted = list(dict.fromkeys(value for value in names if value is not None))
    found = {table: np.zeros(_rows(table), np.int64) for table in tables}
    for sample in taps.tap(context.model, wanted, context.samples):
        for table, nodes in tables.items():
            for node in nodes:
                value = node.inputs[1]
                assert value is not None
                rows: Any = sample[value.name or ""].astype(np.int64).ravel() % _rows(table)
                found[table] += np.bincount(rows, minlength=_rows(table))
    return found


def _rows(table: ir.Value) -> int:
    assert table.const_value is not None
    return int(table.const_value.shape.numpy()[0])


def _map(array: ir.Array, left: Rows, unknown: int) -> npt.NDArray[np.int32]:
    """By old number the new one."""
    found = np.full(len(array), -1, np.int32)
    found[left] = np.arange(len(left))
    gone = np.flatnonzero(found < 0)
    if unknown >= 0:
        found[gone] = found[unknown]
        return found
    unit: Floats = array.astype(np.float32)
    unit = unit / np.maximum(np.linalg.norm(unit, axis=1, keepdims=True), 1e-30)
    for start in range(0, len(gone), _ROWS):
        some = gone[start : start + _ROWS]
        found[some] = (unit[some] @ unit[left].T).argmax(1)
    return found


def _shrink(
    context: Context,
    table: ir.Value,
    nodes: Sequence[ir.Node],
    left: Rows,
    numbers: npt.NDArray[np.int32],
) -> None:
    """Keep some rows, and turn numbers into the new ones before each look-up."""
    array = ir.array(table)
    assert array is not None and table.dtype is not None and table.graph is not None
    rows: Any = array[left]
    table.const_value = ir.Tensor(rows, dtype=table.dtype, name=table.name)
    table.shape = ir.Shape([len(left), array.shape[1]])
    lookup = context.initializer(table.graph, ir.tensor(numbers), f"{table.name}_rows")
    for node in nodes:
        ids = node.inputs[1]
        assert ids is not None and node.graph is not None
        name = context.unique_node(f"{table.name}_renumber")
        renumber = ir.Node("", "Gather", [lookup, ids], name=name)
        made = renumber.outputs[0]
        made.name = context.unique(f"{ids.name}_renumbered")
        made.shape, made.type = ids.shape, ir.TensorType(ir.DataType.INT32)
        node.graph.insert_before(node, renumber)
        node.replace_input_with(1, made)
        context.changed("prune-vocabulary", [node], [renumber, node])
