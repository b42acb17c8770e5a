"""LSTM and GRU of 8 bits: in integers where that pays, else weights alone."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import pytest

from graphopt import files, ir
from graphopt.context import Context
from graphopt.passes.quantize_weights import QuantizeWeights
from graphopt.quantization import Quantization, quantize
from graphopt.quantizer.recurrent import lstms
from graphopt.target import Target

onnx: Any = importlib.import_module("onnx")

_GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}


def recurrent(kind: str, hidden: int, *, directions: int = 1, **attributes: Any) -> ir.Model:
    """One LSTM, GRU or RNN on [T, 1, 96], with a bias and all of its outputs."""
    helper: Any = onnx.helper
    rng = np.random.default_rng(3)
    rows = _GATES[kind] * hidden
    shapes: dict[str, tuple[int, ...]]
    shapes = {"w": (directions, rows, 96), "r": (directions, rows, hidden)}
    shapes["b"] = (directions, 2 * rows)
    weights = [
        onnx.numpy_helper.from_array(
            (rng.standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float32), name
        )
        for name, shape in shapes.items()
    ]
    if directions == 2:
        attributes["direction"] = "bidirectional"
    names = ["y", "h", "c"] if kind == "LSTM" else ["y", "h"]
    node = helper.make_node(kind, ["x", *shapes], names, hidden_size=hidden, **attributes)
    state = [directions, 1, hidden]
    outputs = [helper.make_tensor_value_info("y", 1, ["T", *state])]
    outputs += [helper.make_tensor_value_info(name, 1, state) for name in names[1:]]
    x = helper.make_tensor_value_info("x", 1, ["T", 1, 96])
    graph = helper.make_graph([node], "g", [x], outputs, weights)
    imports = [helper.make_opsetid("", 17)]
    return files.load(helper.make_model(graph, opset_imports=imports, ir_version=8))


def samples() -> dict[str, Any]:
    """Sequences for them."""
    return {"x": np.random.default_rng(5).standard_normal((6, 7, 1, 96)).astype(np.float32)}


@pytest.mark.parametrize("directions", [1, 2])
def test_an_lstm_becomes_integers(directions: int) -> None:
    model = recurrent("LSTM", 96, directions=directions)
    report = Quantization()
    result = quantize(model, samples(), force=True, seconds=0, report=report)
    assert report.method == "dynamic" and "recurrences" in report.reason
    assert [n.op_type for n in result.graph] == ["DynamicQuantizeLSTM"]
    assert [v.name for v in result.graph.outputs] == ["y", "h", "c"]
    assert report.kernels is not None and report.kernels.integer == 1
    assert report.score is not None and (report.score.sqnr_db or 0) > 33
    assert report.bytes_after < report.bytes_before / 3


def test_where_it_does_not_pay_it_stays() -> None:
    cpu = Target.parse("cpu")
    assert not lstms(Context(recurrent("LSTM", 16), target=cpu))
    assert not lstms(Context(recurrent("LSTM", 96), target=Target.parse("portable")))
    assert not lstms(Context(recurrent("LSTM", 96, layout=1), target=cpu))
    model = recurrent("LSTM", 96)
    (node,) = lstms(Context(model, target=cpu))
    assert not lstms(Context(model, target=cpu), {ir.label(node)})


def test_a_gru_has_no_integer_kernel() -> None:
    report = Quantization()
    result = quantize(recurrent("GRU", 96), samples(), seconds=0, report=report)
    assert [n.op_type for n in result.graph] == ["GRU"]
    assert "no integer kernels for its GRU: --method weights" in report.refused


def test_a_budget_keeps_it_in_floats() -> None:
    report = Quantization()
    result = quantize(
        recurrent("LSTM", 96),
        samples(),
        metric=lambda outputs, labels: float(outputs[0]["y"].sum()),
        max_drop=-1e9,
        seconds=0,
        report=report,
    )
    assert "no choice" in report.refused and [n.op_type for n in result.graph] == ["LSTM"]


@pytest.mark.parametrize(("kind", "bits"), [("GRU", 8), ("LSTM", 8), ("RNN", 8), ("GRU", 4)])
def test_weights_have_a_scale_for_each_row(kind: str, bits: int) -> None:
    report = Quantization()
    options = QuantizeWeights(bits=bits, symmetric=True)
    result = quantize(recurrent(kind, 96), samples(), options=options, seconds=0, report=report)
    rows = _GATES[kind] * 96
    scales = [ir.array(n.inputs[1]) for n in result.graph if n.op_type == "DequantizeLinear"]
    assert [s.size for s in scales if s is not None] == [rows, rows]
    assert report.bytes_after < report.bytes_before * (0.3 if bits == 8 else 0.18)
    assert report.score is not None
    assert (report.score.sqnr_db or 0) > (35 if bits == 8 else 14)
