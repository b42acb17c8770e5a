"""Computing constants: which nodes may be computed, how large they get, and their values.

Below the passes, so that folding never reaches up to a backend. `evaluate` is a table of numpy
functions for the cheap operators; `evaluate_many` computes the others, in one ONNX Runtime session
for all of them where it can. A model of 250 bytes can ask for gigabytes or for hours:
`output_bytes` predicts the first, what cannot be predicted runs within 96 MB and 10 seconds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from graphopt import ir
from graphopt.batch import ARENA_BYTES, Batch
from graphopt.ir import Array
from graphopt.numpy_ops import evaluate
from graphopt.runner import Runner
from graphopt.sizes import OutputType, output_bytes, output_types

__all__ = ["Runner", "captured", "deterministic", "evaluate", "evaluate_many", "output_bytes"]

_RANDOM = frozenset(
    (
        *("Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform"),
        *("RandomUniformLike",),
    )
)
_DOMAINS = frozenset(("", "ai.onnx", "ai.onnx.ml"))
_TRIPS = 10_000  # iterations of a constant Loop, those of loops inside it multiplied


def deterministic(node: ir.Node) -> bool:
    """True where a node computes the same from the same inputs, each time and on each machine.

    False for random operators, for Dropout in training mode, for domains other than ONNX's own,
    and for control flow around any of these.
    """
    if node.domain not in _DOMAINS or node.op_type in _RANDOM:
        return False
    if node.op_type == "Dropout":
        mode = node.inputs[2] if len(node.inputs) > 2 else None
        training = ir.array(mode)
        if mode is not None and (training is None or bool(training.any())):
            return False
        if not ir.attribute(node, "is_test", 1):  # opset 6 and earlier
            return False
    return all(deterministic(inner) for graph in ir.subgraphs(node) for inner in graph)


def captured(node: ir.Node) -> Iterator[ir.Value]:
    """The values of outer scopes that the subgraphs of a node use, each once, in order of use."""
    stack = list(ir.subgraphs(node))
    inside = set(stack)
    used: dict[ir.Value, None] = {}
    while stack:
        graph = stack.pop()
        used.update((v, None) for inner in graph for v in inner.inputs if v is not None)
        used.update((v, None) for v in graph.outputs)
        nested = [sub for inner in graph for sub in ir.subgraphs(inner)]
        inside.update(nested)
        stack += nested
    return (v for v in used if v.graph not in inside)


def evaluate_many(
    nodes: Sequence[ir.Node], opsets: Mapping[str, int], limit_bytes: int
) -> dict[ir.Value, Array]:
    """The outputs of nodes whose inputs are constants or outputs of other nodes among them.

    `nodes` are in topological order and follow `opsets`, the imports of their root. Left out are
    nodes that are not deterministic, that have other inputs or that fail, nodes whose outputs are
    predicted to exceed `limit_bytes`, values that turn out to exceed it, and what is no tensor.
    Strings are arrays of bytes objects, as the IR has them.
    """
    batch = Batch(opsets, limit_bytes)
    alone: list[ir.Node] = []
    types: dict[ir.Value, OutputType] = {}
    left = ARENA_BYTES // 2
    for node in nodes:
        outer = list(captured(node))
        if not batch.knows(node, outer) or not deterministic(node) or _trips(node) > _TRIPS:
            continue
        size = _predict(node, opsets, types)
        if size is not None and size > limit_bytes:
            continue
        if size is None or size <= left:
            left -= size or 0
            batch.add(node, outer)
        elif node.op_type != "Einsum":  # its intermediate results may be far larger
            alone.append(node)
    batch.run()
    for node in alone:
        single = Batch(opsets, limit_bytes, limited=False)
        single.add(node, ())
        single.run()
        batch.results.update(single.results)
    return batch.results


def _predict(
    node: ir.Node, opsets: Mapping[str, int], types: dict[ir.Value, OutputType]
) -> int | None:
    """The bytes of a node's outputs; `types` has those of values computed before, and gets them."""
    inputs = [None if v is None else types.get(v, ir.array(v)) for v in node.inputs]
    if any(v is not None and known is None for v, known in zip(node.inputs, inputs, strict=True)):
        return None
    found = output_types(node, inputs, opsets)
    if found is not None:
        types.update(zip((v for v in node.outputs if v.name), found, strict=True))
    arrays = [known for known in inputs if not isinstance(known, OutputType)]
    if len(arrays) == len(inputs):
        return output_bytes(node, arrays, opsets)
    return None if found is None else sum(t.bytes for t in found)


def _trips(node: ir.Node) -> float:
    """How often at most the innermost body below a node is run; infinity where nobody knows."""
    inner = max((_trips(n) for graph in ir.subgraphs(node) for n in graph), default=1)
    if node.op_type != "Loop":
        return inner
    limit = ir.array(node.inputs[0])
    return inner * (float("inf") if limit is None else max(1, int(limit.reshape(-1)[0])))
