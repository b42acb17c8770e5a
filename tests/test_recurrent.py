"""Recurrent cells in their spellings: each becomes the operator, and computes what it did."""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from graphopt import files, ir
from graphopt.context import Context
from graphopt.pass_manager import PassManager, parse_pipeline
from graphopt.passes import PIPELINES
from graphopt.report import Report
from graphopt.runner import Runner

onnx: Any = importlib.import_module("onnx")
helper = onnx.helper
STEPS, BATCH, WIDTH, SIZE = 4, 3, 5, 6
Made = tuple[str, str]
"""Names of a hidden state and of the state of an LSTM, or nothing."""


@dataclass
class Sketch:
    """A graph in the making, whose random numbers are always the same."""

    opset: int = 17
    nodes: list[Any] = field(default_factory=list[Any])
    weights: dict[str, ir.Array] = field(default_factory=dict[str, ir.Array])
    numbers: Any = field(default_factory=lambda: np.random.default_rng(0))
    count: int = 0
    prefix: str = "v"

    def op(self, op_type: str, *inputs: str, n: int = 1, **attributes: Any) -> Any:
        self.count += 1
        outputs = [f"{self.prefix}{self.count}_{i}" for i in range(n)]
        self.nodes.append(helper.make_node(op_type, inputs, outputs, **attributes))
        return outputs[0] if n == 1 else outputs

    def const(self, array: Any, name: str = "") -> str:
        self.count += 1
        name = name or f"{self.prefix}k{self.count}"
        self.weights[name] = np.asarray(array)
        return name

    def weight(self, name: str, *shape: int) -> str:
        """One that all steps share."""
        if name not in self.weights:
            self.weights[name] = self.numbers.standard_normal(shape).astype(np.float32) * 0.5
        return name

    def ints(self, *values: int) -> str:
        return self.const(np.asarray(values, np.int64))


def _split_gates(s: Sketch, x: str, h: str, count: int) -> list[str]:
    """torch: two Gemms, one of the step and one of the state, and a Split."""
    a = s.op("Gemm", x, s.weight("wi", count * SIZE, WIDTH), s.weight("bi", count * SIZE), transB=1)
    b = s.op("Gemm", h, s.weight("wh", count * SIZE, SIZE), s.weight("bh", count * SIZE), transB=1)
    return s.op("Split", s.op("Add", a, b), s.ints(*[SIZE] * count), n=count, axis=-1)


def _joined_gates(s: Sketch, x: str, h: str, count: int) -> list[str]:
    """TensorFlow: one product of both, and Slices."""
    both = s.op("Concat", x, h, axis=1)
    whole = s.op("MatMul", both, s.weight("w", WIDTH + SIZE, count * SIZE))
    whole = s.op("Add", s.weight("b", count * SIZE), whole)
    cuts = [(i * SIZE, (i + 1) * SIZE) for i in range(count)]
    return [s.op("Slice", whole, s.ints(a), s.ints(b), s.ints(1)) for a, b in cuts]


def _single_gates(s: Sketch, x: str, h: str, count: int) -> list[str]:
    """Keras, or by hand: products for each gate."""
    gates: list[str] = []
    for index in range(count):
        a = s.op("MatMul", x, s.weight(f"w{index}", WIDTH, SIZE))
        b = s.op("MatMul", h, s.weight(f"r{index}", SIZE, SIZE))
        gates.append(s.op("Add", s.op("Add", a, b), s.weight(f"b{index}", SIZE)))
    return gates


GATES = (_split_gates, _joined_gates, _single_gates)


def _lstm(s: Sketch, gates: list[str], state: str, forget: float = 0.0) -> Made:
    i, f, g, o = gates
    if forget:
        f = s.op("Add", f, s.const(np.float32(forget), "forget"))
    kept = s.op("Mul", state, s.op("Sigmoid", f))
    state = s.op("Add", kept, s.op("Mul", s.op("Sigmoid", i), s.op("Tanh", g)))
    return s.op("Mul", s.op("Tanh", state), s.op("Sigmoid", o)), state


def _gru(s: Sketch, x: str, h: str, form: int, late: bool) -> Made:
    """form 0: torch's, 1: Keras's, 2: the gate the other way round, 3: n + z (h - n)."""
    xs = s.op("Gemm", x, s.weight("wi", WIDTH, 3 * SIZE), s.weight("bi", 3 * SIZE))
    r, z, n = s.op("Split", xs, s.ints(*[SIZE] * 3), n=3, axis=1)
    wide = 3 * SIZE if late else 2 * SIZE
    hs = s.op("Gemm", h, s.weight("wh", SIZE, wide), s.weight("bh", wide))
    cut = s.op("Split", hs, s.ints(*[SIZE] * (3 if late else 2)), n=3 if late else 2, axis=1)
    r = s.op("Sigmoid", s.op("Add", r, cut[0]))
    z = s.op("Sigmoid", s.op("Add", cut[1], z))
    again = (
        s.op("Mul", r, cut[2])
        if late
        else s.op("MatMul", s.op("Mul", r, h), s.weight("wn", SIZE, SIZE))
    )
    n = s.op("Tanh", s.op("Add", n, again))
    one = s.const(np.float32(1), "one")
    if form == 0:
        return s.op("Add", s.op("Mul", s.op("Sub", h, n), z), n), ""
    if form == 1:
        rest = s.op("Mul", s.op("Sub", one, z), n)
        return s.op("Add", s.op("Mul", z, h), rest), ""
    if form == 2:
        rest = s.op("Mul", s.op("Sub", one, z), h)
        return s.op("Add", rest, s.op("Mul", n, z)), ""
    return s.op("Add", h, s.op("Mul", z, s.op("Sub", n, h))), ""


Step = Callable[[Sketch, str, str, str], Made]


def lstm(gates: Callable[[Sketch, str, str, int], list[str]], forget: float = 0.0) -> Step:
    return lambda s, x, h, c: _lstm(s, gates(s, x, h, 4), c, forget)


def gru(form: int, late: bool) -> Step:
    return lambda s, x, h, c: _gru(s, x, h, form, late)


def rnn(function: str) -> Step:
    return lambda s, x, h, c: (s.op(function, _single_gates(s, x, h, 1)[0]), "")


CELLS = {
    **{f"LSTM {gates.__name__}": lstm(gates) for gates in GATES},
    "LSTM forget bias": lstm(_joined_gates, 1.0),
    **{
        f"GRU form {form}{' late' * late}": gru(form, late)
        for form in range(4)
        for late in (False, True)
    },
    "RNN tanh": rnn("Tanh"),
    "RNN relu": rnn("Relu"),
}


def _model(s: Sketch, outputs: list[str], dims: list[Any], states: int) -> ir.Model:
    inputs = [helper.make_tensor_value_info("x", 1, dims)]
    batch = dims[1] if dims[0] == STEPS or dims[0] == "t" else dims[0]
    inputs += [helper.make_tensor_value_info(n, 1, [batch, SIZE]) for n in ("h", "c")[:states]]
    weights = [onnx.numpy_helper.from_array(a, n) for n, a in s.weights.items()]
    results = [onnx.ValueInfoProto(name=name) for name in outputs]
    graph = helper.make_graph(s.nodes, "g", inputs, results, weights)
    imports = [helper.make_opsetid("", s.opset)]
    proto = helper.make_model(graph, opset_imports=imports, ir_version=8)
    return files.load(onnx.shape_inference.infer_shapes(proto))


def unrolled(cell: Step, states: int, axis: int, last: bool, opset: int = 17) -> ir.Model:
    """Steps of a sequence along an axis; all states stacked along it, or the last one."""
    s = Sketch(opset)
    zeros = np.zeros((BATCH, SIZE), np.float32)
    h, c = (n if i < states else s.const(zeros) for i, n in enumerate(("h", "c")))
    made: list[str] = []
    for index in range(STEPS):
        x = s.op("Gather", "x", s.const(np.int64(index)), axis=axis)
        h, c = cell(s, x, h, c)
        made.append(h)
    stack = [s.op("Unsqueeze", v, s.ints(axis)) for v in made]
    outputs = [h] if last else [s.op("Concat", *stack, axis=axis)]
    outputs += [c] if c else []
    dims = [STEPS, BATCH, WIDTH] if axis == 0 else [BATCH, STEPS, WIDTH]
    return _model(s, outputs, dims, states)


def iterated(cell: Step, kind: str, states: int, length: Any = STEPS) -> ir.Model:
    """The body of a Scan, or of a Loop that gathers each step."""
    s, body = Sketch(), Sketch(prefix="b")
    scan = kind == "Scan"
    x = "e" if scan else body.op("Gather", "x", "i", axis=0)
    h, c = cell(body, x, "p", "q")
    names = ["p", "q"][:states]
    results = ["g", *[h, c][:states], body.op("Identity", h)]
    infos = [helper.make_tensor_value_info(n, 1, [BATCH, SIZE]) for n in names]
    flags = [helper.make_tensor_value_info(n, t, []) for n, t in (("i", 7), ("g", 9))]
    element = [helper.make_tensor_value_info("e", 1, [BATCH, WIDTH])]
    inner = helper.make_graph(
        body.nodes,
        "body",
        [*infos, *element] if scan else [*flags, *infos],
        [
            helper.make_tensor_value_info(
                n, 9 if n == "g" else 1, [] if n == "g" else [BATCH, SIZE]
            )
            for n in results[1 if scan else 0 :]
        ],
    )
    s.weights |= body.weights
    states_in = ["h", "c"][:states]
    if scan:
        made = s.op("Scan", *states_in, "x", n=states + 1, body=inner, num_scan_inputs=1)
    else:
        trips = s.const(np.int64(STEPS))
        if length != STEPS:
            size = s.op("Shape", "x", start=0, end=1)
            trips = s.op("Squeeze", size)
        made = s.op("Loop", trips, "", *states_in, n=states + 1, body=inner)
    return _model(s, made, [length, BATCH, WIDTH], states)


SHORT = "fold-constants,fuse-recurrent,eliminate-zero-state,eliminate-identity,eliminate-dead"


def optimized(model: ir.Model, pipeline: str = SHORT) -> tuple[Counter[str], Report]:
    """The operators that are left, after it was seen that they compute the same."""
    report = Report()
    passes = parse_pipeline(pipeline)
    result = PassManager(passes).run(Context(files.copy(model)), report)
    rng = np.random.default_rng(1)
    shapes = {"x": [d if isinstance(d, int) else STEPS for d in model.graph.inputs[0].shape or ()]}
    feeds = {
        v.name: rng.standard_normal(shapes.get(v.name or "", [BATCH, SIZE])).astype(np.float32)
        for v in model.graph.inputs
        if v.name
    }
    wanted, found = (Runner(files.load(files.to_proto(m))).run(feeds) for m in (model, result))
    for name, value in wanted.items():
        np.testing.assert_allclose(found[name], value, atol=2e-5)
    return Counter(n.op_type for n in ir.all_nodes(result)), report


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize(("states", "axis", "last"), [(0, 0, False), (2, 1, False), (2, 0, True)])
def test_unrolled(name: str, states: int, axis: int, last: bool) -> None:
    states = min(states, 1 + name.startswith("LSTM"))
    left, _ = optimized(unrolled(CELLS[name], states, axis, last))
    assert left[name.split()[0]] == 1 and sum(left.values()) <= 7, left


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("kind", ["Scan", "Loop"])
def test_iterated(name: str, kind: str) -> None:
    states = 1 + name.startswith("LSTM")
    left, _ = optimized(iterated(CELLS[name], kind, states))
    assert left[name.split()[0]] == 1 and not left[kind], left


@pytest.mark.parametrize("kind", ["Scan", "Loop"])
def test_a_sequence_of_free_length(kind: str) -> None:
    """At level 2 it may have no step, which ONNX Runtime's operators do not take."""
    model = iterated(CELLS["LSTM _split_gates"], kind, 2, "t")
    left, report = optimized(model, ",".join(PIPELINES[2]))
    assert left[kind] == 1
    assert any("may have no step" in str(r) for record in report.passes for r in record.refusals)
    left, _ = optimized(model, ",".join(PIPELINES[3]))
    assert left["LSTM"] == 1 and not left[kind]


def _missing(change: Callable[[list[Any]], None]) -> Counter[str]:
    """What is left of the layer where a model of it has been changed."""
    model = files.to_proto(unrolled(CELLS["LSTM _split_gates"], 2, 0, False, opset=13))
    change(list(model.graph.node))
    return optimized(files.load(model))[0]


def _nth(nodes: list[Any], op_type: str, index: int) -> Any:
    return [node for node in nodes if node.op_type == op_type][index]


def test_near_misses() -> None:
    """Gates with other functions, steps out of order, a state that something else uses."""

    def other_function(nodes: list[Any]) -> None:
        _nth(nodes, "Sigmoid", 4).op_type = "Tanh"

    def other_order(nodes: list[Any]) -> None:
        first, second = (_nth(nodes, "Gather", i) for i in (1, 2))
        first.input[1], second.input[1] = second.input[1], first.input[1]

    def other_state(nodes: list[Any]) -> None:
        _nth(nodes, "Tanh", 3).input[0] = _nth(nodes, "Mul", 1).output[0]

    def gate_used(nodes: list[Any]) -> None:
        _nth(nodes, "Unsqueeze", 1).input[0] = _nth(nodes, "Sigmoid", 5).output[0]

    for change in (other_function, other_order, other_state, gate_used):
        assert _missing(change)["LSTM"] <= 1, change


@pytest.mark.parametrize(("name", "fused"), [("LSTM", True), ("GRU", True), ("RNN", False)])
def test_one_cell(name: str, fused: bool) -> None:
    """A sequence of one step, where that is no slower."""
    s, states = Sketch(), 1 + (name == "LSTM")
    x = s.op("Gather", "x", s.const(np.int64(0)), axis=0)
    cell = next(made for key, made in CELLS.items() if key.startswith(name))
    outputs = list(cell(s, x, "h", "c")[:states])
    left, _ = optimized(_model(s, outputs, [STEPS, BATCH, WIDTH], states))
    assert bool(left[name]) == fused


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dynamo", [False, True])
@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_torch(name: str, dynamo: bool, tmp_path: Path, capfd: object) -> None:
    """Cells of torch in a loop over a sequence, from zeros, as both exporters write them."""
    torch: Any = pytest.importorskip("torch")
    pytest.importorskip("onnxscript" if dynamo else "torch")

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            torch.nn.Module.__init__(self)
            self.cell = getattr(torch.nn, f"{name}Cell")(WIDTH, SIZE)

        def forward(self, x: Any) -> Any:
            state, made = x.new_zeros(x.shape[1], SIZE), list[Any]()
            state = (state, state) if name == "LSTM" else state
            for step in x:
                state = self.cell(step, state)
                made.append(state[0] if name == "LSTM" else state)
            return torch.stack(made)

    path = tmp_path / "net.onnx"
    example = torch.randn(STEPS, BATCH, WIDTH)
    torch.onnx.export(
        Net().eval(), (example,), str(path), input_names=["x"], opset_version=18, dynamo=dynamo
    )
    left, _ = optimized(files.load(path), ",".join(PIPELINES[2]))
    assert left == {name: 1, "Squeeze": 1}
