"""Nodes with constant inputs, computed together: one ONNX Runtime session, the reference last."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any, cast

import numpy as np
import onnx

from graphopt import ir
from graphopt.ir import Array
from graphopt.runner import NUMPY_TYPES, from_ort, onnxruntime, session
from graphopt.sizes import output_types

__all__ = ["ARENA_BYTES", "Batch"]

ARENA_BYTES = 96 << 20
"""What a session of unpredictable nodes may allocate."""

_SECONDS = 10.0  # for control flow, whose work is no function of its size
_INLINE_BYTES = 1 << 12  # smaller constants travel in the protobuf: kernels look at their values
_REFERENCE_ELEMENTS = 1 << 14  # the reference is Python, and slow
_ALONE_AFTER = 8  # failures after which each node runs in a session of its own


@cache
def _limit_arena() -> bool:
    """Give ONNX Runtime, once in a process, the limited arena; False where another one is there."""
    ort = onnxruntime()
    same_as_requested = 1
    config = ort.OrtArenaCfg(
        {
            "max_mem": ARENA_BYTES,
            "arena_extend_strategy": same_as_requested,
            "initial_chunk_size_bytes": -1,
            "max_dead_bytes_per_chunk": -1,
        }
    )
    kind, place = ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, ort.OrtMemType.DEFAULT
    try:
        ort.create_and_register_allocator(ort.OrtMemoryInfo("Cpu", kind, 0, place), config)
    except Exception:  # noqa: BLE001  ONNX Runtime's exceptions share no base class
        return False
    return True


class Batch:
    """Nodes in topological order, and their results once they have run.

    `limited` batches stay within ARENA_BYTES; a node that needs more fails like any other.
    """

    def __init__(
        self, opsets: Mapping[str, int], limit_bytes: int, *, limited: bool = True
    ) -> None:
        self.results: dict[ir.Value, Array] = {}
        self._opsets = opsets
        self._limit_bytes = limit_bytes
        self._limited = limited
        self._nodes: list[ir.Node] = []
        self._produced: set[ir.Value] = set()
        self._captured: dict[str, ir.Value] = {}

    def knows(self, node: ir.Node, outer: Iterable[ir.Value]) -> bool:
        """Whether all that a node reads is constant or comes out of this batch.

        `outer` is what its subgraphs capture. It must be constant and its name that of no other
        value captured here, since subgraphs know it by its name.
        """
        inputs = (v for v in node.inputs if v is not None)
        return all(v in self._produced or ir.constant(v) is not None for v in inputs) and all(
            ir.constant(v) is not None and self._captured.get(v.name or "", v) is v for v in outer
        )

    def add(self, node: ir.Node, outer: Iterable[ir.Value]) -> None:
        """Take in a node that `knows` accepts."""
        self._captured.update((v.name or "", v) for v in outer)
        self._nodes.append(node)
        self._produced.update(node.outputs)

    def run(self) -> None:
        """Compute what can be; a node that fails takes along those that need its outputs."""
        if self._limited and self._nodes and not _limit_arena():
            return
        for _ in range(_ALONE_AFTER):
            if not self._nodes:
                return
            failed = self._attempt(self._nodes)
            if failed is None:
                return
            if failed is _SOMEWHERE:
                break
            self._drop(failed)
        for node in self._nodes:
            self._attempt([node])

    def _attempt(self, nodes: Sequence[ir.Node]) -> ir.Node | None:
        """Run nodes in one session and keep their results.

        Returns the node that failed, _SOMEWHERE if nobody knows which, or None.
        """
        program = _Program(nodes, self._captured, self.results)
        if program.missing:
            return nodes[0]
        model = program.serialize(self._opsets)
        try:
            running = session(model, shared_arena=self._limited)
        except Exception as error:  # noqa: BLE001
            failed = _named_node(error, nodes)
            if failed is not _SOMEWHERE:
                self._refer(failed)
            return failed
        try:
            timed = any(True for node in nodes for _ in ir.subgraphs(node))
            outputs = _run(running, list(program.outputs), program.feeds, timed)
        except Exception as error:  # noqa: BLE001
            return _named_node(error, nodes)
        for value, output in zip(program.outputs.values(), outputs, strict=True):
            if _bytes(output) <= self._limit_bytes:
                array = from_ort(output)
                if array is not None:
                    self.results[value] = _with_bytes(array)
        return None

    def _refer(self, node: ir.Node) -> None:
        """Compute one node that ONNX Runtime has no kernel for with ONNX's reference, if small."""
        inputs = [None if v is None else self._array(v) for v in node.inputs]
        known = all(v is None or a is not None for v, a in zip(node.inputs, inputs, strict=True))
        types = output_types(node, inputs, self._opsets) if known else None
        size = sum(a.size for a in inputs if a is not None)
        if types is None or size > _REFERENCE_ELEMENTS or any(True for _ in ir.subgraphs(node)):
            return
        if sum(t.bytes for t in types) > self._limit_bytes:
            return
        from onnx.reference import ReferenceEvaluator

        program = _Program([node], {}, self.results)
        try:
            model = onnx.ModelProto.FromString(program.serialize(self._opsets))
            with np.errstate(all="ignore"):
                reference: Any = ReferenceEvaluator(model)
                outputs: list[object] = reference.run(list(program.outputs), program.feeds)
        except Exception:  # noqa: BLE001  it raises what it likes
            return
        for value, output, expected in zip(program.outputs.values(), outputs, types, strict=True):
            if not isinstance(output, np.ndarray):
                continue
            array = cast(Array, output)
            if array.shape == expected.shape and array.dtype == expected.dtype.numpy():
                self.results[value] = array

    def _array(self, value: ir.Value) -> Array | None:
        return self.results[value] if value in self.results else ir.array(value)

    def _drop(self, failed: ir.Node) -> None:
        """Remove a node that failed and those that need outputs of it which nobody computed."""
        gone: set[ir.Value] = set()
        kept: list[ir.Node] = []
        for node in self._nodes:
            if node is failed or any(v in gone for v in node.inputs):
                gone.update(v for v in node.outputs if v not in self.results)
            else:
                kept.append(node)
        self._nodes = kept


_SOMEWHERE = ir.Node("", "Somewhere", [])


def _named_node(error: Exception, nodes: Sequence[ir.Node]) -> ir.Node:
    """The node that ONNX Runtime's message names, under the name that _Program gave it."""
    found = re.search(r"graphopt\.n(\d+)\b", str(error))
    if found is not None:
        return nodes[int(found[1])]
    return nodes[0] if len(nodes) == 1 else _SOMEWHERE


def _run(running: Any, names: list[str], feeds: Mapping[str, Array], timed: bool) -> list[Any]:
    ort = onnxruntime()
    options = ort.RunOptions()
    options.log_severity_level = 4
    options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
    values = {k: ort.OrtValue.ortvalue_from_numpy(a) for k, a in feeds.items()}
    if not timed:
        return list(running.run_with_ort_values(names, values, options))

    def stop() -> None:
        options.terminate = True

    timer = threading.Timer(_SECONDS, stop)
    timer.start()
    try:
        return list(running.run_with_ort_values(names, values, options))
    finally:
        timer.cancel()


def _bytes(output: Any) -> int:
    return int(output.tensor_size_in_bytes()) if output.has_value() and output.is_tensor() else 0


def _with_bytes(array: Array) -> Array:
    """Strings as the IR has them, which is encoded."""
    if array.dtype.char != "O":
        return array
    texts = [t.encode() if isinstance(t, str) else t for t in array.ravel().tolist()]
    result = np.empty(len(texts), object)
    result[:] = texts
    return result.reshape(array.shape)


class _Program:
    """Nodes as a model of their own: values and nodes renamed, constants inside or to be fed."""

    def __init__(
        self,
        nodes: Sequence[ir.Node],
        captured: Mapping[str, ir.Value],
        known: Mapping[ir.Value, Array],
    ) -> None:
        self.feeds: dict[str, Array] = {}
        self.outputs: dict[str, ir.Value] = {}
        self.missing = False
        self._graph = onnx.GraphProto(name="constants")
        self._names: dict[ir.Value, str] = {}
        self._known = known
        for name, value in captured.items():
            self._define(name, value)
        for index, node in enumerate(nodes):
            self._append(index, node)

    def serialize(self, opsets: Mapping[str, int]) -> bytes:
        """The model; its IR version is of no consequence to nodes."""
        imports = [onnx.helper.make_opsetid(d, v) for d, v in opsets.items()]
        model = onnx.ModelProto(ir_version=10, graph=self._graph, opset_import=imports)
        return model.SerializeToString()

    def _append(self, index: int, node: ir.Node) -> None:
        proto = ir.serde.serialize_node(node)
        proto.name = f"graphopt.n{index}"
        for i, value in enumerate(node.inputs):
            if value is None:
                continue
            if value not in self._names:
                self._names[value] = f"graphopt.v{len(self._names)}"
                self._define(self._names[value], value)
            proto.input[i] = self._names[value]
        for i, value in enumerate(node.outputs):
            if value.name:
                proto.output[i] = self._names[value] = f"graphopt.v{len(self._names)}"
                self.outputs[proto.output[i]] = value
                self._graph.output.add(name=proto.output[i])
        self._graph.node.append(proto)

    def _define(self, name: str, value: ir.Value) -> None:
        array = self._known.get(value)
        tensor = ir.constant(value) if array is None else _tensor(array)
        if tensor is None:
            self.missing = True
        elif tensor.nbytes > _INLINE_BYTES and tensor.dtype in NUMPY_TYPES:
            shape = [int(d) for d in tensor.shape.numpy()]
            info = onnx.helper.make_tensor_value_info(name, int(tensor.dtype), shape)
            self._graph.input.append(info)
            self.feeds[name] = np.ascontiguousarray(tensor.numpy()).reshape(shape)
        else:
            proto = ir.serde.serialize_tensor(tensor)
            proto.name = name
            self._graph.initializer.append(proto)


def _tensor(array: Array) -> ir.TensorProtocol:
    if array.dtype.char == "O":
        return ir.onnx_ir.StringTensor(cast(Any, array))
    return ir.tensor(cast(Any, array))
