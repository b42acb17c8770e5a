"""What `graphopt inspect` tells of a model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx

from graphopt import files
from graphopt.inspection import inspect
from tests._shared import shared
from tests._text import model, proto

NET = """
<ir_version: 10, opset_import: ["" : 20, "vendor" : 1], producer_name: "tests">
net (float[batch,8] x, bool p) => (float[batch,4] y, v) <float[8,4] w, float two = {2}> {
  a = MatMul (x, w)
  y = If (p) <
    then_branch = yes () => (float[batch,4] u) { u = Mul (a, two) },
    else_branch = no () => (float[batch,4] n) { n = Neg (a) }
  >
  v = vendor.Magic (y)
}
"""


def net() -> onnx.ModelProto:
    made = proto(NET.replace("float[8,4] w, ", ""))
    made.graph.initializer.append(onnx.numpy_helper.from_array(np.ones((8, 4), np.float32), "w"))
    return made


def test_signature_operators_and_weights() -> None:
    found = inspect(net())
    assert [(p.name, p.type, p.shape) for p in found.inputs] == [
        ("x", "FLOAT", "[batch, 8]"),
        ("p", "BOOL", "[]"),
    ]
    assert [(p.name, p.shape) for p in found.outputs] == [("y", "[batch, 4]"), ("v", "?")]
    assert found.opsets == {"ai.onnx": 20, "vendor": 1} and found.producer == "tests"
    assert found.nodes == 5 and found.ops["MatMul"] == 1
    assert found.custom_ops == ["vendor.Magic"] and found.control_flow_depth == 1
    assert found.parameters == 33 and found.weight_bytes == 132
    assert found.weights_by_type == {"FLOAT": 33} and not found.external_files


def test_costs_at_sizes() -> None:
    found = inspect(net())
    assert found.sizes == {"batch": 1}
    assert found.flops == 2 * 8 * 4 + 4
    assert inspect(net(), sizes={"batch": 10}).flops == 10 * found.flops
    fixed = inspect(net(), shapes={"x": (3, 8)})
    assert fixed.flops == 3 * found.flops and not fixed.sizes
    assert found.unknown_shapes == 1  # Magic's


def test_a_line_for_each_node() -> None:
    found = inspect(net())
    rows = {row.op: row for row in found.rows}
    assert rows["MatMul"].parameters == 32 and rows["MatMul"].outputs == "FLOAT [batch, 4]"
    assert rows["If"].flops is None and rows["Neg"].scope == "no"
    text = list(found.lines(nodes=True))
    assert any(line.startswith("weights    33 in 132 bytes") for line in text)
    assert sum("-> FLOAT" in line for line in text) == 4
    assert len(text) == len(list(found.lines())) + 1 + len(found.rows)


def test_plain_data() -> None:
    data = json.loads(json.dumps(inspect(net()).to_dict()))
    assert data["inputs"][0]["name"] == "x" and len(data["rows"]) == 5


def test_external_data(tmp_path: Path) -> None:
    one = model("net (float[512] x) => (float[512] y) { y = Add (x, x) }")
    large = onnx.numpy_helper.from_array(np.ones(512, np.float32), "w")
    made = files.to_proto(one)
    made.graph.node[0].input[1] = "w"
    made.graph.initializer.append(large)
    files.save(files.load(made), tmp_path / "m.onnx", external=True)
    (size,) = inspect(tmp_path / "m.onnx").external_files.values()
    assert size == 2048


def test_maps_are_named() -> None:
    found = inspect(shared("corpus/models/sk_digits_rf_zipmap/model.onnx"))
    assert found.outputs[1].type == "sequence of map of INT64 to FLOAT"


def test_functions() -> None:
    text = """
    <ir_version: 10, opset_import: ["" : 20, "own" : 1]>
    net (float[4] x) => (float[4] y) { y = own.Twice (x) }
    <domain: "own", opset_import: ["" : 20]>
    Twice (x) => (y) { y = Add (x, x) }
    """
    found = inspect(proto(text))
    assert found.functions == ["own:Twice"] and not found.custom_ops and found.flops == 4
