"""XᵀX of many layers, a part of them at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from graphopt import gram, ir
from graphopt.context import Context
from graphopt.gram import Gram

_BYTES = 1 << 28
"""Of XᵀX held at once."""


def by_parts(
    context: Context, nodes: Iterable[ir.Node]
) -> Iterator[tuple[list[ir.Node], dict[str, Gram]]]:
    """Linear operators with constant weights, in order, and XᵀX of their inputs by label.

    Each part runs the model as it then is, so that later layers see what was done to earlier ones.
    Without samples all operators come at once and there is no XᵀX.
    """
    waiting = list(nodes)
    if context.samples is None:
        yield waiting, {}
        return
    while waiting:
        context.check_time()
        held, count = 0, 0
        for node in waiting:
            array = ir.array(node.inputs[1])
            assert array is not None
            groups, _, k = gram.weight_matrix(node, array).shape
            held += 8 * groups * k * k
            if count and held > _BYTES:
                break
            count += 1
        part, waiting = waiting[:count], waiting[count:]
        yield part, gram.grams(context.model, part, context.samples)
