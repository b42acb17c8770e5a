"""The contract that every backend keeps, run over all that are installed here."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import parser

from graphopt import artifact, backends, compilation, files, ir
from graphopt.artifact import TensorInfo
from graphopt.backends import Backend
from graphopt.errors import GraphoptError, InputError, MissingError
from graphopt.pass_manager import Pass
from graphopt.target import Target

MODEL = """
<ir_version: 10, opset_import: ["" : 18]>
affine (float[batch,3] x) => (float[batch,2] y, float[2,batch] z)
<float[3,2] w = {1, 2, 3, 4, 5, 6}, float[2] b = {0.5, -0.5}>
{
  h = MatMul(x, w)
  y = Add(h, b)
  z = Transpose<perm = [1, 0]>(y)
}
"""
WEIGHTS = np.array([[1, 2], [3, 4], [5, 6]], np.float32)
BIAS = np.array([0.5, -0.5], np.float32)
CPU = Target.parse("cpu")


def model(text: str = MODEL) -> ir.Model:
    """A model from its text."""
    return files.load(parser.parse_model(text))


@pytest.fixture(params=backends.names())
def backend(request: pytest.FixtureRequest) -> Backend:
    """Each backend that can be used here."""
    found = backends.get(request.param)
    reason = found.is_available()
    if reason is not None:
        pytest.skip(f"{found.name}: {reason}")
    return found


@pytest.fixture
def runs_here(backend: Backend) -> None:
    """Leaves out those that are for other devices than this machine's CPU."""
    reason = backend.can_compile(CPU) or backend.can_run(CPU)
    if reason is not None:
        pytest.skip(f"{backend.name}: {reason}")


@pytest.fixture
def folder(backend: Backend, runs_here: None, tmp_path: Path) -> Path:
    """The model, compiled for this machine."""
    source = files.to_proto(model())
    return compilation.compile(source, CPU, tmp_path / "a", backend=backend.name, level=0)


def test_the_name_is_the_modules(backend: Backend) -> None:
    assert backend.name in backends.names()
    assert backends.get(backend.name) is backend
    assert all(backend.versions().values())


def test_options_are_frozen_data_with_defaults(backend: Backend) -> None:
    defaults = backends.make_options(backend, {})
    assert dataclasses.asdict(defaults) == backends.describe_options(backend)
    for name, default in backends.describe_options(backend).items():
        text = str(default).lower() if isinstance(default, bool) else str(default)
        assert backends.make_options(backend, {name: text}) == defaults
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(defaults, name, default)
        with pytest.raises(InputError, match=name):
            backends.make_options(backend, {name: object()})
    with pytest.raises(InputError, match="no option 'surprise'"):
        backends.make_options(backend, {"surprise": 1})


@pytest.mark.parametrize("name", Target.names())
def test_what_it_cannot_do_has_a_reason(backend: Backend, name: str) -> None:
    target = Target.parse(name)
    for reason in (backend.can_compile(target), backend.can_run(target)):
        assert reason is None or (reason.strip() and "\n" not in reason)


def test_legalize_gives_passes(backend: Backend) -> None:
    found: Sequence[Any] = backend.legalize(CPU)
    assert all(isinstance(item, Pass) for item in found)


def test_it_computes(backend: Backend, folder: Path) -> None:
    executable = compilation.load(folder, trust=True)
    for batch in (1, 4):
        x = np.arange(3 * batch, dtype=np.float32).reshape(batch, 3)
        found = executable.run({"x": x})
        assert list(found) == ["y", "z"]
        y, z = found["y"], found["z"]
        assert isinstance(y, np.ndarray)
        assert isinstance(z, np.ndarray)
        np.testing.assert_allclose(y, x @ WEIGHTS + BIAS, rtol=1e-5)
        np.testing.assert_allclose(z, y.T)
        assert y.dtype == np.float32


def test_it_keeps_the_signature(backend: Backend, folder: Path) -> None:
    executable = compilation.load(folder, trust=True)
    assert executable.inputs == (TensorInfo("x", "float32", ("batch", 3)),)
    assert executable.outputs == (
        TensorInfo("y", "float32", ("batch", 2)),
        TensorInfo("z", "float32", (2, "batch")),
    )


@pytest.mark.parametrize(
    ("feeds", "message"),
    [
        ({}, "input 'x' is missing"),
        ({"x": np.zeros((1, 3), np.float32), "u": np.zeros(1)}, "no input is named 'u'"),
        ({"x": np.zeros((1, 3))}, "takes float32, got float64"),
        ({"x": np.zeros((1, 4), np.float32)}, r"takes float32 \[batch, 3\], got \[1, 4\]"),
        ({"x": np.zeros(3, np.float32)}, r"got \[3\]"),
        ({"x": np.array([["a", "b", "c"]])}, "takes float32, got string"),
    ],
)
def test_feeds_that_do_not_fit(
    backend: Backend, folder: Path, feeds: dict[str, Any], message: str
) -> None:
    executable = compilation.load(folder, trust=True)
    with pytest.raises(InputError, match=message):
        executable.run(feeds)
    with pytest.raises(InputError, match=message):
        executable.benchmark(feeds, 1)
    with pytest.raises(InputError, match=message):
        executable.profile(feeds)


def test_it_times_runs_and_nodes(backend: Backend, folder: Path) -> None:
    executable = compilation.load(folder, trust=True)
    feeds = {"x": np.ones((1, 3), np.float32)}
    times = executable.benchmark(feeds, 7)
    assert times.shape == (7,)
    assert (times > 0).all()
    rows = executable.profile(feeds, 3)
    assert rows
    for row in rows:
        assert row.node
        assert row.op
        assert row.calls == 1
        assert row.microseconds >= 0
    assert len({row.node for row in rows}) == len(rows)


@pytest.mark.usefixtures("runs_here")
def test_a_run_that_fails_is_one_line(
    backend: Backend, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    text = """
    <ir_version: 10, opset_import: ["" : 18]>
    g (float[2,3] x, int64[n] i) => (float[n,3] y) { y = Gather(x, i) }
    """
    compilation.compile(model(text), CPU, tmp_path / "a", backend=backend.name, level=0)
    executable = compilation.load(tmp_path / "a", trust=True)
    with pytest.raises(GraphoptError) as caught:
        executable.run({"x": np.zeros((2, 3), np.float32), "i": np.array([7], np.int64)})
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


@pytest.mark.usefixtures("runs_here")
def test_the_callers_model_stays(backend: Backend, tmp_path: Path) -> None:
    given = model()
    before = files.to_proto(given).SerializeToString(deterministic=True)
    backend.supports(given, CPU)
    compilation.compile(given, CPU, tmp_path / "a", backend=backend.name)
    assert files.to_proto(given).SerializeToString(deterministic=True) == before


@pytest.mark.usefixtures("runs_here")
def test_compiling_twice_gives_the_same_files(backend: Backend, tmp_path: Path) -> None:
    for name in "ab":
        compilation.compile(model(), CPU, tmp_path / name, backend=backend.name)
    first, second = (artifact.read(tmp_path / name) for name in "ab")
    assert first.files == second.files


@pytest.mark.usefixtures("runs_here")
def test_it_names_the_nodes_it_does_not_take(
    backend: Backend, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert backend.supports(model(), CPU) == {}
    unknown = model("""
        <ir_version: 10, opset_import: ["" : 18, "acme" : 1]>
        g (float[2] x, bool c) => (float[2] z) <float[2] u>
        {
            y = Relu(x)
            [odd] u = acme.Twist <turns = 3> (y)
            z = If (c) <
                then_branch = t () => (float[2] a) { [inner] a = acme.Bend (u) },
                else_branch = e () => (float[2] b) { b = Identity (u) }
            >
        }
        """)
    refused = backend.supports(unknown, CPU)
    assert set(refused) == {"odd", "inner"}
    assert all(reason and "\n" not in reason for reason in refused.values())
    with pytest.raises(GraphoptError, match="odd") as caught:
        compilation.compile(unknown, CPU, tmp_path / "a", backend=backend.name, level=0)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")


def test_what_was_compiled_elsewhere(
    backend: Backend, folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "another user"))
    if backend.native_code:
        with pytest.raises(InputError, match="machine code"):
            compilation.load(folder)
    else:
        compilation.load(folder)
    compilation.load(folder, trust=True)


def test_what_was_changed_afterwards(backend: Backend, folder: Path) -> None:
    name = next(iter(artifact.read(folder).files))
    with (folder / name).open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)
        file.seek(-1, 2)
        file.write(bytes([last[0] ^ 1]))
    with pytest.raises(InputError, match=f"{name} was changed"):
        compilation.load(folder, trust=True)


def test_what_is_for_another_machine(backend: Backend, tmp_path: Path) -> None:
    """Where it compiles for one: it is refused before anything of it is run."""
    for name in ("arm64:cortex-a76", "cuda:sm_89", "cuda:sm_120"):
        target = Target.parse(name)
        if backend.can_compile(target) is None and backend.can_run(target) is not None:
            break
    else:
        pytest.skip(f"{backend.name} compiles only for what runs here")
    known = backends.describe_options(backend)
    options = {"shapes": "x=4x3"} if "shapes" in known else {}
    made = compilation.compile(
        model(), target, tmp_path / "a", backend=backend.name, level=0, options=options
    )
    with pytest.raises(MissingError, match="cannot run here"):
        compilation.load(made, trust=True)


def test_names_that_are_no_backend() -> None:
    for name in ("", "tvmm", "_onnxruntime_support", "__init__", "../onnxruntime"):
        with pytest.raises(InputError, match=r"unknown backend .*onnxruntime"):
            backends.get(name)
    assert backends.get("ort") is backends.get("onnxruntime")
