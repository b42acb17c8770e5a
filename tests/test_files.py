"""Loading, copying and saving: nothing is lost, nothing is changed, nothing is half written."""

from __future__ import annotations

import copy
import gc
import os
import signal
import subprocess
import sys
import textwrap
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.numpy_helper
import pytest
from onnx import TensorProto, helper

from graphopt import files, ir
from graphopt.errors import InputError, TimeLimitError
from graphopt.files.external import FileTensor
from tests._models import parse
from tests._shared import shared

AnyArray = np.ndarray[Any, Any]
CHECKER: Any = onnx.checker
SERDE: Any = ir.serde
TEXT = """
<ir_version: 10, opset_import: ["" : 21, "custom" : 3], producer_name: "test",
 metadata_props: ["author" : "me"]>
main (float[N, 4] x, bool c) => (float[N, 4] y, float[N, 4] z)
<float[4] w = {1, 2, 3, 4}, float[1] empty_name = {0}>
{
    [named] a = Add (x, w)
    y = If (c) <
        then_branch = yes () => (float[N, 4] t) { t = Mul (a, w) },
        else_branch = no () => (float[N, 4] e) <float[1] inner = {2}> { e = Mul (a, inner) }
    >
    k = Constant <value = float[4] {5, 6, 7, 8}> ()
    b, unused = custom.Anything <strings = ["p", "q"], level = 2.5> (a, , k)
    z = custom.twice (b)
}
<domain: "custom", opset_import: ["" : 21]>
twice (v) => (r) { r = Add (v, v) }
"""


def small() -> onnx.ModelProto:
    """A model with a subgraph, a function, a custom operator, metadata and an absent input."""
    model = onnx.parser.parse_model(TEXT)
    model.graph.node[0].doc_string = "adds"
    model.graph.node[0].metadata_props.add(key="from", value="layer1")
    model.graph.quantization_annotation.add(tensor_name="w").quant_parameter_tensor_names.add(
        key="SCALE_TENSOR", value="empty_name"
    )
    return model


def weighted(*arrays: AnyArray, ir_version: int = 10) -> onnx.ModelProto:
    """A model whose initializers w0, w1, … are these arrays."""
    inits = [onnx.numpy_helper.from_array(array, f"w{i}") for i, array in enumerate(arrays)]
    nodes = [helper.make_node("Identity", [t.name], [f"y{i}"]) for i, t in enumerate(inits)]
    outputs = [
        helper.make_tensor_value_info(f"y{i}", t.data_type, t.dims) for i, t in enumerate(inits)
    ]
    graph = helper.make_graph(nodes, "g", [], outputs, inits)
    return helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", onnx.defs.onnx_opset_version())],
        ir_version=ir_version,
    )


def read(path: Path) -> onnx.ModelProto:
    """The protobuf message in a file."""
    return onnx.ModelProto.FromString(path.read_bytes())


def externalize(model: onnx.ModelProto, path: Path, *, gap: int = 0, apart: bool = False) -> Path:
    """Write a model and its weights to `weights.bin` beside it, or each to a file of its own."""
    blob = b""
    for tensor in model.graph.initializer:
        data = tensor.raw_data
        if apart:
            (path.parent / tensor.name).write_bytes(data)
        else:
            blob += bytes(gap)
        place = {"location": tensor.name} if apart else {"location": "weights.bin"}
        place |= {"offset": "0" if apart else str(len(blob)), "length": str(len(data))}
        blob += data
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in place.items():
            tensor.external_data.add(key=key, value=value)
    if not apart:
        (path.parent / "weights.bin").write_bytes(blob)
    path.write_bytes(model.SerializeToString())
    return path


def test_nothing_is_lost(tmp_path: Path) -> None:
    source = small()
    before = source.SerializeToString()
    model = files.load(source)
    files.save(model, tmp_path / "m.onnx")
    found = read(tmp_path / "m.onnx")
    CHECKER.check_model(found, full_check=False)
    assert source.SerializeToString() == before
    assert files.to_proto(model) == found
    for part in ("doc_string", "metadata_props", "name"):
        assert getattr(found.graph.node[0], part) == getattr(source.graph.node[0], part)
    assert found.graph.quantization_annotation == source.graph.quantization_annotation
    del found.graph.node[1].attribute[1].g.value_info[:]  # what the initializer says itself
    assert onnx.printer.to_text(found) == onnx.printer.to_text(source)


def element_tensor(kind: ir.DataType, raw: bool) -> TensorProto:
    """Seven elements (some thousands where elements are whole bytes) of any type."""
    if kind == ir.DataType.STRING:
        return TensorProto(name="w0", data_type=kind, dims=[3], string_data=[b"a", b"b\0", b"\xff"])
    if not raw:
        values = np.arange(7) % 2
        return helper.make_tensor(
            "w0", kind, [7], values * (1j if kind.name.startswith("C") else 1)
        )
    size = 7 if kind.bitwidth < 8 else 700
    count = -(-size * kind.bitwidth // 8)
    data = (np.arange(count) % 120).astype(np.uint8)
    data[-1] = 1  # the bits behind the last element are zero
    return TensorProto(name="w0", data_type=kind, dims=[size], raw_data=data.tobytes())


@pytest.mark.parametrize("kind", sorted(set(ir.DataType) - {ir.DataType.UNDEFINED}))
@pytest.mark.parametrize("raw", [True, False])
def test_all_element_types(kind: ir.DataType, raw: bool, tmp_path: Path) -> None:
    tensor = element_tensor(kind, raw)
    model = weighted(np.zeros(1, np.float32), ir_version=onnx.IR_VERSION)
    del model.graph.initializer[:]
    model.graph.initializer.append(tensor)
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("y0", kind, tensor.dims))
    model.graph.node[0].domain = "custom"  # not every type has an operator that takes it
    model.opset_import.add(domain="custom", version=1)
    loaded = files.load(model)
    expected = SERDE.deserialize_tensor(tensor).numpy()
    if kind == ir.DataType.STRING:
        expected = np.array(list(tensor.string_data), object)
    found = loaded.graph.initializers["w0"].const_value
    assert found is not None and found.dtype == kind
    np.testing.assert_array_equal(found.numpy(), expected)
    files.save(loaded, tmp_path / "m.onnx", external=True)
    again = files.load(tmp_path / "m.onnx").graph.initializers["w0"].const_value
    assert again is not None
    np.testing.assert_array_equal(again.numpy(), expected)


def test_initializers_that_are_inputs(tmp_path: Path) -> None:
    model = weighted(np.ones(3, np.float32), ir_version=3)
    model.graph.input.append(helper.make_tensor_value_info("w0", TensorProto.FLOAT, [3]))
    old = files.load(model)
    assert not old.graph.inputs and old.ir_version == 4
    assert ir.constant(old.graph.initializers["w0"]) is not None
    assert not files.to_proto(old).graph.input

    kept = files.copy(files.load(model, keep_signature=True))
    assert not kept.graph.inputs
    assert [info.name for info in files.to_proto(kept).graph.input] == ["w0"]
    kept.graph.initializers.clear()  # as a pass does that folded it away
    files.save(kept, tmp_path / "m.onnx")
    assert [info.name for info in read(tmp_path / "m.onnx").graph.input] == ["w0"]

    model.ir_version = 4
    new = files.load(model)
    assert [v.name for v in new.graph.inputs] == ["w0"]
    assert ir.constant(new.graph.initializers["w0"]) is None


def test_copy_is_apart_and_keeps_lineage() -> None:
    model = files.load(small())
    node = model.graph[0]
    node.meta["graphopt.sources"] = ("first", "second")
    before = files.to_proto(model)
    copied = files.copy(model)
    assert ir.sources(copied.graph[0]) == ("first", "second")
    weights = copied.graph.initializers["w"], model.graph.initializers["w"]
    assert weights[0].const_value is weights[1].const_value
    copied.graph[0].name = "other"
    copied.graph.initializers["w"].name = "v"
    assert files.to_proto(model) == before
    assert files.to_proto(files.load(copied)) == files.to_proto(copied)


def test_unsorted_nodes_are_sorted() -> None:
    model = onnx.parser.parse_model("""<ir_version: 8, opset_import: ["" : 17]>
        g (float[2] x, bool c) => (float[2] y) {
            y = If (c) <then_branch = a () => (float[2] t) { t = Neg (late) },
                        else_branch = b () => (float[2] u) { u = Abs (late) }>
            late = Relu (x)
        }""")
    assert [node.op_type for node in files.load(model).graph] == ["Relu", "If"]


def test_types_that_onnx_ir_lacks() -> None:
    model = onnx.parser.parse_model("""<ir_version: 8, opset_import: ["" : 17, "ai.onnx.ml" : 1]>
        g (float[2] x) => (seq(map(int64, float)) y) {
            y = ai.onnx.ml.ZipMap <classlabels_int64s = [1, 2]> (x)
        }""")
    copied = files.to_proto(files.copy(files.load(model)))
    assert copied.graph.output == model.graph.output


def test_sparse_tensors_become_dense() -> None:
    values = helper.make_tensor("s", TensorProto.FLOAT, [2], [3.0, 4.0])
    indices = helper.make_tensor("i", TensorProto.INT64, [2, 2], [0, 1, 1, 0])
    sparse = helper.make_sparse_tensor(values, indices, [2, 2])
    model = weighted(np.zeros(1, np.float32))
    model.graph.sparse_initializer.append(sparse)
    constant = helper.make_node("Constant", [], ["k"], sparse_value=sparse)
    model.graph.node.extend([constant, helper.make_node("Add", ["s", "k"], ["z"])])
    loaded = files.load(model)
    expected = np.array([[0, 3], [4, 0]], np.float32)
    np.testing.assert_array_equal(ir.array(loaded.graph.initializers["s"]), expected)
    np.testing.assert_array_equal(ir.array(loaded.graph[-2].outputs[0]), expected)


def test_external_data_stay_on_disk(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    arrays: list[AnyArray] = [
        rng.standard_normal(5000).astype(np.float32),
        np.arange(999, dtype=np.int8),
    ]
    # Odd offsets: elements are not aligned in the file.
    path = externalize(weighted(*arrays, arrays[0], np.array(7)), tmp_path / "m.onnx", gap=1)
    loaded = files.load(path)
    tensors = [v.const_value for v in loaded.graph.initializers.values()]
    assert all(isinstance(tensor, FileTensor) for tensor in tensors)
    folder = tmp_path / "out"
    folder.mkdir()
    files.save(loaded, folder / "n.onnx")
    assert sorted(p.name for p in folder.iterdir()) == ["n.onnx", "n.onnx.data"]
    CHECKER.check_model(folder / "n.onnx")
    for source in (loaded, files.load(folder / "n.onnx")):
        for name, array in zip(("w0", "w1", "w2"), (*arrays, arrays[0]), strict=True):
            found = ir.array(source.graph.initializers[name])
            np.testing.assert_array_equal(found, array)
            assert found is not None and found.flags.aligned
    first = (folder / "n.onnx").read_bytes(), (folder / "n.onnx.data").read_bytes()
    files.save(files.load(folder / "n.onnx"), folder / "n.onnx", overwrite=True)
    assert first == ((folder / "n.onnx").read_bytes(), (folder / "n.onnx.data").read_bytes())
    files.save(files.load(folder / "n.onnx"), folder / "one.onnx", external=False)
    assert files.to_proto(files.load(folder / "one.onnx")) == files.to_proto(loaded)


def test_saving_over_the_source_of_the_weights(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    arrays = [np.arange(4000, dtype=np.float32), np.ones(4000, np.float32)]
    files.save(files.load(weighted(*arrays)), path, external=True)
    model = files.load(path)
    values = model.graph.initializers
    values["w0"].const_value, values["w1"].const_value = (
        values["w1"].const_value,
        values["w0"].const_value,
    )
    for _ in range(2):
        files.save(model, path, overwrite=True)
        again = files.load(path).graph.initializers
        np.testing.assert_array_equal(ir.array(again["w0"]), arrays[1])
        np.testing.assert_array_equal(ir.array(again["w1"]), arrays[0])
        np.testing.assert_array_equal(ir.array(values["w0"]), arrays[1])
        assert sorted(p.name for p in tmp_path.iterdir()) == ["m.onnx", "m.onnx.data"]


def test_shared_weights_are_saved_once(tmp_path: Path) -> None:
    model = files.load(weighted(np.ones(5000, np.float32), np.zeros(5000, np.float32)))
    first, second = model.graph.initializers.values()
    second.const_value = copy.copy(first.const_value)
    for name in ("m", "n"):
        files.save(model, tmp_path / f"{name}.onnx", external=True)
        assert (tmp_path / f"{name}.onnx.data").stat().st_size == 20_000
        model = files.load(tmp_path / f"{name}.onnx")
    np.testing.assert_array_equal(ir.array(model.graph.initializers["w1"]), np.ones(5000))


def test_many_data_files(tmp_path: Path) -> None:
    model = weighted(*[np.full(300, i, np.float32) for i in range(150)])
    externalize(model, tmp_path / "m.onnx", apart=True)
    gc.collect()
    descriptors = Path("/proc/self/fd")
    before = len([*descriptors.iterdir()]) if descriptors.exists() else 0
    loaded = files.load(tmp_path / "m.onnx")
    files.save(loaded, tmp_path / "n.onnx")
    assert files.to_proto(files.load(tmp_path / "n.onnx")) == files.to_proto(loaded)
    del loaded
    gc.collect()
    if before:
        assert len([*descriptors.iterdir()]) == before


def test_data_file_that_changed(tmp_path: Path) -> None:
    model = weighted(*[np.full(300, i, np.float32) for i in range(120)])
    externalize(model, tmp_path / "m.onnx", apart=True)
    loaded = files.load(tmp_path / "m.onnx")
    (tmp_path / "w119").write_bytes(bytes(1200))
    os.utime(tmp_path / "w119", ns=(1, 1))
    with pytest.raises(InputError, match="changed since the model was loaded"):
        ir.array(loaded.graph.initializers["w119"])


def test_corpus_is_saved_the_same_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_wait(_: int) -> None:
        """The disk need not have it."""

    monkeypatch.setattr(os, "fsync", no_wait)
    for path in sorted(shared("corpus/models").glob("*/model.onnx")):
        one, two = tmp_path / "one.onnx", tmp_path / "two.onnx"
        files.save(files.load(path), one, overwrite=True)
        files.save(files.load(one), two, overwrite=True)
        assert one.read_bytes() == two.read_bytes(), path


@pytest.mark.slow
def test_a_time_limit_in_the_middle_stays_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """onnx-ir tells of whatever strikes while it reads as an error of its own."""
    files.save(parse("g (float[2] x) => (float[2] y) { y = Relu (x) }"), tmp_path / "m.onnx")

    def expire(*_: object) -> None:
        try:
            raise TimeLimitError("time is up")
        except TimeLimitError as error:
            raise ir.serde.SerdeError("a node") from error

    monkeypatch.setattr(ir.serde, "deserialize_model", expire)
    with pytest.raises(TimeLimitError, match="time is up"):
        files.load(tmp_path / "m.onnx")


def test_node_tests_load() -> None:
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        from onnx.backend.test.case.node import collect_testcases

        cases: Any = collect_testcases(None)
    for case in cases:
        model = files.to_proto(files.load(case.model))
        again = files.to_proto(files.load(model))
        assert model.SerializeToString() == again.SerializeToString(), case.name
        assert model.graph.input == case.model.graph.input, case.name
        assert model.graph.output == case.model.graph.output, case.name


def test_existing_files_stay(tmp_path: Path) -> None:
    model = files.load(weighted(np.ones(2000, np.float32)))
    path = tmp_path / "m.onnx"
    files.save(model, path)
    before = path.read_bytes()
    with pytest.raises(InputError, match="overwriting has to be allowed"):
        files.save(model, path)
    (tmp_path / "n.onnx.data").write_bytes(b"mine")
    with pytest.raises(InputError, match=r"n\.onnx\.data: exists"):
        files.save(model, tmp_path / "n.onnx", external=True)
    assert path.read_bytes() == before
    assert (tmp_path / "n.onnx.data").read_bytes() == b"mine"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.onnx", "n.onnx.data"]


def test_mode_of_a_replaced_file_stays(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.touch()
    path.chmod(0o640)
    files.save(files.load(small()), path, overwrite=True)
    assert path.stat().st_mode & 0o777 == 0o640


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL here")
@pytest.mark.parametrize("external", [False, True])
def test_kill_while_saving(external: bool, tmp_path: Path) -> None:
    """Whenever the process dies, the path holds one of the two models it is writing, whole."""
    path = tmp_path / "m.onnx"
    script = textwrap.dedent(f"""
        import itertools, os
        import numpy as np
        from graphopt import files
        from tests.test_files import weighted
        os.fsync = lambda descriptor: None
        models = [files.load(weighted(np.full(1 << 19, i, np.float32))) for i in (1, 2)]
        print("ready", flush=True)
        for model in itertools.cycle(models):
            files.save(model, {str(path)!r}, overwrite=True, external={external})
    """)
    rng = np.random.default_rng(1)
    seen: set[float] = set()
    for _ in range(5):
        with subprocess.Popen(
            [sys.executable, "-c", script],
            stdout=subprocess.PIPE,
            cwd=Path(__file__).parents[1],
        ) as child:
            assert child.stdout is not None and child.stdout.readline() == b"ready\n"
            time.sleep(rng.uniform(0.02, 0.1))
            child.kill()
        if path.exists():
            array = ir.array(files.load(path).graph.initializers["w0"])
            assert array is not None and array.min() == array.max()
            seen.add(float(array[0]))
    assert seen <= {1.0, 2.0} and seen


def test_what_an_exporter_returns_is_a_model() -> None:
    torch: Any = pytest.importorskip("torch", reason="needs torch")
    pytest.importorskip("onnxscript", reason="torch's exporter needs onnxscript")
    module = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU()).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's own making
        program = torch.onnx.export(module, (torch.zeros(2, 4),), dynamo=True, verbose=False)
    before = [node.op_type for node in program.model.graph]
    model = files.load(program)
    assert [node.op_type for node in model.graph] == before
    assert model.graph is not program.model.graph


def test_what_is_no_model_is_named() -> None:
    nothing: Any = object()
    with pytest.raises(InputError, match="object: no model"):
        files.load(nothing)
