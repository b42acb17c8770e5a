"""What shape inference claims, against the ONNX node tests and against runs of real models."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import cast

import numpy as np
import onnx
import pytest
from onnx.backend.test.case.node import collect_testcases
from onnx.backend.test.case.test_case import TestCase

from graphopt import files, ir
from graphopt.dims import Dim
from graphopt.errors import GraphoptError
from graphopt.shapes import Shapes

from ._agreement import Everything, agreement
from ._shared import shared


@pytest.mark.parametrize("form", ["static", "dynamic", "constant"])
def test_conformance(form: str) -> None:
    """The ONNX node tests: every claim about an output holds, and most outputs are known."""
    outputs = ranked = 0
    wrong: list[str] = []
    for case in _node_cases():
        assert case.model is not None and case.data_sets is not None
        inputs, expected = cast("tuple[list[object], list[object]]", case.data_sets[0])
        proto, feeds = _in_form(case.model, inputs, form)
        found = ir.from_proto(proto)
        shapes = Shapes(found)
        results = [
            (output, array)
            for output, value in zip(found.graph.outputs, expected, strict=True)
            if (array := _array(value)) is not None
        ]
        outputs += len(results)
        ranked += sum(shapes.shape(output) is not None for output, _ in results)
        given = [(v, feeds[v.name]) for v in found.graph.inputs if v.name and v.name in feeds]
        wrong += [f"{case.name}: {e}" for e in agreement(shapes, results + given).errors]
    assert not wrong
    assert ranked >= {"static": 0.99, "dynamic": 0.95, "constant": 0.99}[form] * outputs


def _node_cases() -> list[TestCase]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return collect_testcases(None)


def _array(value: object) -> ir.Array | None:
    """A tensor of a test case; numbers are tensors without axes, sequences are none."""
    if isinstance(value, np.ndarray | np.generic):
        return np.asarray(cast("ir.Array", value))
    return None


def _in_form(
    source: onnx.ModelProto, inputs: list[object], form: str
) -> tuple[onnx.ModelProto, Mapping[str, ir.Array]]:
    """The model with outputs of no declared shape; its inputs as they are, symbolic or constant."""
    proto = onnx.ModelProto()
    proto.CopyFrom(source)
    proto.ir_version = max(proto.ir_version, 10)
    for output in proto.graph.output:
        if output.type.HasField("tensor_type"):
            output.type.tensor_type.ClearField("shape")
    arrays = {
        info.name: array
        for info, value in zip(source.graph.input, inputs, strict=False)
        if (array := _array(value)) is not None
    }
    kept: list[onnx.ValueInfoProto] = []
    for position, info in enumerate(proto.graph.input):
        if form == "constant" and info.name in arrays:
            array = arrays.pop(info.name)
            proto.graph.initializer.append(onnx.numpy_helper.from_array(array, info.name))
            continue
        if form == "dynamic" and info.type.HasField("tensor_type"):
            for axis, size in enumerate(info.type.tensor_type.shape.dim):
                size.dim_param = f"d{position}_{axis}"
        kept.append(info)
    del proto.graph.input[:]
    proto.graph.input.extend(kept)
    return proto, arrays


def test_corpus_agrees_with_what_runs_give() -> None:
    """On the samples, and on samples twice as long along every symbolic axis where they run."""
    wrong: list[str] = []
    outputs = ranked = longer = 0
    for path in sorted(shared("corpus/models").iterdir()):
        found = files.load(path / "model.onnx")
        shapes, session = Shapes(found), Everything(found)
        with np.load(path / "inputs.npz", allow_pickle=False) as samples:
            feeds = dict(samples)
        results = session.run(feeds)
        wrong += [f"{path.name}: {e}" for e in agreement(shapes, results).errors]
        outputs += len(results)
        ranked += sum(shapes.shape(v) is not None for v, _ in results)
        assert all(shapes.dtype(v) is not None for v, _ in results)
        if all(shapes.is_static(v) for v in found.graph.inputs):
            continue
        try:
            results = session.run(_twice(shapes, found, feeds))
        except GraphoptError:  # not every symbolic axis is free
            continue
        longer += 1
        wrong += [f"{path.name}: {e}" for e in agreement(shapes, results).errors]
    assert not wrong
    assert ranked >= 0.99 * outputs and longer >= 15


def _twice(
    shapes: Shapes, model: ir.Model, feeds: Mapping[str, ir.Array]
) -> Mapping[str, ir.Array]:
    """The samples, repeated along every symbolic axis."""
    longer = dict(feeds)
    for source in model.graph.inputs:
        for axis, size in enumerate(shapes.shape(source) or ()):
            if isinstance(size, Dim) and source.name in longer:
                longer[source.name] = np.concatenate([longer[source.name]] * 2, axis)
    return longer
