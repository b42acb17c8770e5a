"""Rules of control flow and of attention operators."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from graphopt import ir
from graphopt.pruner.atoms import Axis, fixed
from graphopt.pruner.rules_linear import LINEAR
from graphopt.pruner.rules_move import MOVES
from graphopt.pruner.rules_pointwise import POINTWISE
from graphopt.pruner.tracing import Axes, Rule, Trace, Unknown

__all__ = ["RULES", "packed_parts"]


def _tie(trace: Trace, node: ir.Node, a: Axes, b: Axes) -> None:
    """Two values that are one: carried from run to run, or results of two branches."""
    if len(a) == len(b) and all(len(p) == len(q) for p, q in zip(a, b, strict=True)):
        for one, other in zip(a, b, strict=True):
            trace.unite(one, other, node)
        return
    for axis in (*a, *b):
        trace.atoms.freeze(axis, f"of changing shape at {ir.label(node)}")


def _branches(trace: Trace, node: ir.Node) -> Sequence[Axes]:
    found: list[Axes] = []
    for graph in ir.subgraphs(node):
        trace.graph(graph)
        results = [trace.of(value) for value in graph.outputs]
        if not found:
            found = results
            continue
        for one, other in zip(found, results, strict=True):
            _tie(trace, node, one, other)
    return found


def _loop(trace: Trace, node: ir.Node) -> Sequence[Axes]:
    """Carried values keep their axes; results of each run are stacked on a new first axis."""
    body = next(iter(ir.subgraphs(node)))
    carried = list(node.inputs[2:])
    for value in body.inputs[:2]:
        trace.axes[value] = trace.fixed(value)
    return _run_body(trace, node, body, carried, body.inputs[2:], body.outputs[1:])


def _scan(trace: Trace, node: ir.Node) -> Sequence[Axes]:
    if any(node.attributes.get(f"scan_{kind}_axes") for kind in ("input", "output")):
        raise Unknown("scanned along other axes than the first")
    if ir.opset(trace.model.graph) < 9:
        raise Unknown("of an old opset")
    body = next(iter(ir.subgraphs(node)))
    count = int(str(ir.attribute(node, "num_scan_inputs", 0)))
    states = len(node.inputs) - count
    for value, inner in zip(node.inputs[states:], body.inputs[states:], strict=True):
        axes = trace.of(value)
        trace.freeze(value, f"scanned by {ir.label(node)}", [0])
        trace.axes[inner] = axes[1:]
    carried = list(node.inputs[:states])
    return _run_body(trace, node, body, carried, body.inputs[:states], body.outputs)


def _run_body(
    trace: Trace,
    node: ir.Node,
    body: ir.Graph,
    carried: Sequence[ir.Value | None],
    inner: Sequence[ir.Value],
    results: Sequence[ir.Value],
) -> Sequence[Axes]:
    for value, name in zip(carried, inner, strict=True):
        before = trace.of(value)
        if value is not None and ir.constant(value) is not None:
            trace.freeze(value, f"a constant start of {ir.label(node)}")
        expected = trace.fixed(name)
        same = len(before) == len(expected) and all(
            len(p) == len(q) for p, q in zip(before, expected, strict=True)
        )
        if not same:
            _tie(trace, node, before, expected)
        trace.axes[name] = before if same else expected
    trace.graph(body)
    found: list[Axes] = []
    for index, value in enumerate(results):
        axes = trace.of(value)
        if index < len(carried):
            _tie(trace, node, trace.axes[inner[index]], axes)
            found.append(trace.axes[inner[index]])
        else:
            found.append([fixed(0), *axes])
    return found


def _heads(trace: Trace, axis: Axis, heads: int, node: ir.Node) -> Axis:
    """One atom per head of an axis of heads, each of which stays or goes as a whole."""
    if not axis.size or len(axis) % heads:
        raise Unknown("the width is unknown")
    table = axis.reshape(heads, -1)
    for column in range(1, table.shape[1]):
        trace.unite(np.ascontiguousarray(table[:, 0]), np.ascontiguousarray(table[:, column]), node)
    return np.ascontiguousarray(table[:, 0])


def _share(trace: Trace, queries: Axis, keys: Axis, node: ir.Node) -> None:
    """Heads of queries that read the same keys go together, so that their ratio stays."""
    for offset in range(len(queries) // len(keys)):
        part = np.ascontiguousarray(queries[offset :: len(queries) // len(keys)])
        trace.unite(part, keys, node)


def _count(node: ir.Node, *names: str) -> int:
    for name in names:
        value = ir.attribute(node, name)
        if isinstance(value, int) and value > 0:
            return value
    raise Unknown("the number of heads is missing")


def _attention(trace: Trace, node: ir.Node) -> Sequence[Axes]:
    """Heads are pruned whole; their width, which scales the scores, stays.

    ai.onnx Attention: Q, K, V of [N, T, heads * size] or [N, heads, T, size]; MultiHeadAttention
    and GroupQueryAttention: the former only.
    """
    q, k, v = (trace.of(node.inputs[i]) for i in range(3))
    if len(q) == 4 and len(k) == 4:
        query, key, value = q[1], k[1], v[1]
        for axis in (q[3], k[3], v[3]):
            trace.atoms.freeze(axis, f"the width of the heads of {ir.label(node)}")
    elif len(q) == len(k) == len(v) == 3:
        heads = _count(node, "q_num_heads", "num_heads")
        shared = ir.attribute(node, "kv_num_heads")
        shared = shared if isinstance(shared, int) and shared else heads
        query = _heads(trace, q[2], heads, node)
        key, value = (_heads(trace, item[2], shared, node) for item in (k, v))
    else:
        raise Unknown("packed inputs")
    trace.unite(key, value, node)
    _share(trace, query, key, node)
    _further(trace, node, query, key, [q, k, v])
    first = [q[0], query, q[2], v[3]] if len(q) == 4 else [q[0], q[1], _values(trace, node, q, v)]
    trace.vanishing.add(node.outputs[0])
    cache = [[fixed(0), key, fixed(0), fixed(0)] for _ in node.outputs[1:]]
    return [first, *cache]


def _values(trace: Trace, node: ir.Node, q: Axes, v: Axes) -> Axis:
    """The width of the result: the values' columns, each head's repeated for its queries."""
    heads = _count(node, "q_num_heads", "num_heads")
    shared = ir.attribute(node, "kv_num_heads")
    shared = shared if isinstance(shared, int) and shared else heads
    return np.repeat(v[2].reshape(shared, -1), heads // shared, axis=0).ravel()


def _further(trace: Trace, node: ir.Node, query: Axis, key: Axis, packed: Sequence[Axes]) -> None:
    """Masks may differ by head; caches have the keys' heads; a bias is as wide as q, k and v."""
    for index, value in enumerate(node.inputs[3:], 3):
        if value is None:
            continue
        axes = trace.of(value)
        cache = index in ((4, 5) if not node.domain else (6, 7))
        if node.op_type == "GroupQueryAttention":
            cache = index in (3, 4)
        if len(axes) == 4 and len(axes[1]) > 1:
            trace.unite(axes[1], key if cache else query, node)
        elif node.op_type == "MultiHeadAttention" and index == 3:
            trace.unite(axes[0], np.concatenate([part[2] for part in packed]), node)


def _packed_attention(trace: Trace, node: ir.Node) -> Sequence[Axes]:
    """com.microsoft Attention: one matrix [width, queries, keys and values side by side]."""
    if any(value is not None for value in (*node.inputs[4:5], *node.inputs[6:])):
        raise Unknown("a cache")
    if len(node.outputs) > 1:
        raise Unknown("a cache that is put out")
    x, weights = trace.of(node.inputs[0]), trace.of(node.inputs[1])
    heads = _count(node, "num_heads")
    trace.unite(x[2], weights[0], node)
    q, k, v = packed_parts(node, weights[1])
    query, key, value = (_heads(trace, part, heads, node) for part in (q, k, v))
    trace.unite(query, key, node)
    trace.unite(key, value, node)
    bias = trace.of(node.inputs[2]) if len(node.inputs) > 2 else []
    if bias:
        trace.unite(bias[0], weights[1], node)
    scores = trace.of(node.inputs[5]) if len(node.inputs) > 5 else []
    if len(scores) == 4 and len(scores[1]) > 1:
        trace.unite(scores[1], query, node)
    trace.vanishing.add(node.outputs[0])
    return [[x[0], x[1], v]]


def packed_parts(node: ir.Node, axis: Axis) -> list[Axis]:
    """The columns of queries, keys and values of com.microsoft Attention."""
    sizes = node.attributes.get("qkv_hidden_sizes")
    ends = np.cumsum(sizes.as_ints())[:2].tolist() if sizes is not None else 3
    if sizes is None and len(axis) % 3:
        raise Unknown("the width is unknown")
    return [np.ascontiguousarray(part) for part in np.split(axis, ends)]


def _rotary(trace: Trace, node: ir.Node) -> Sequence[Axes]:
    """RotaryEmbedding: the width of the heads stays."""
    x = trace.of(node.inputs[0])
    if len(x) == 4:
        trace.atoms.freeze(x[3], f"the width of the heads of {ir.label(node)}")
    else:
        _heads(trace, x[2], _count(node, "num_heads"), node)
    return [list(x)]


RULES: dict[tuple[str, str], Rule] = {
    **LINEAR,
    **POINTWISE,
    **MOVES,
    ("", "Attention"): _attention,
    ("", "If"): _branches,
    ("", "Loop"): _loop,
    ("", "RotaryEmbedding"): _rotary,
    ("", "Scan"): _scan,
    ("com.microsoft", "Attention"): _packed_attention,
    ("com.microsoft", "GroupQueryAttention"): _attention,
    ("com.microsoft", "MultiHeadAttention"): _attention,
    ("com.microsoft", "RotaryEmbedding"): _rotary,
}
