"""Native compilation: children, trust, the cache, cutting, and what can go wrong on the way.

ONNX Runtime stands in for a native backend, so that none need be installed.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import parser

from graphopt import artifact, backends, compilation, digests, files, ir, pieces, places, trust
from graphopt.errors import (
    GraphoptError,
    InputError,
    MemoryLimitError,
    MissingError,
    TimeLimitError,
)
from graphopt.measurement import measure
from graphopt.report import Report
from graphopt.target import Target

TEXT = """
<ir_version: 10, opset_import: ["" : 18]>
g (float[n,2] x) => (float[n,2] y, float[n,2] h)
<float[2] one = {1, 1}, float[2,2] w = {1, 2, 3, 4}>
{
    [first] a = MatMul(x, w)
    [odd] h = Sin(a)
    [last] b = MatMul(h, w)
    y = Add(b, one)
}
"""
X = np.array([[1, 2], [0.5, -1], [3, 0]], np.float32)
W = np.array([[1, 2], [3, 4]], np.float32)


@pytest.fixture
def source() -> ir.Model:
    """A model in memory."""
    return files.load(parser.parse_model(TEXT))


@pytest.fixture(autouse=True)
def native(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """ONNX Runtime counts as native; caches and keys are the test's."""
    monkeypatch.setattr(type(backends.get("ort")), "native_code", True)
    for kind in ("CACHE", "STATE"):
        monkeypatch.setenv(f"XDG_{kind}_HOME", str(tmp_path_factory.mktemp(kind)))


def compile(model: ir.Model, folder: Path, **arguments: Any) -> Path:
    """Compile as it is."""
    return compilation.compile(model, "cpu", folder, backend="ort", level=0, **arguments)


def check(folder: Path) -> None:
    """It computes the right thing."""
    found = compilation.load(folder).run({"x": X})
    assert list(found) == ["y", "h"]
    h = np.sin(X @ W)
    np.testing.assert_allclose(np.asarray(found["h"]), h, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(np.asarray(found["y"]), h @ W + 1, rtol=1e-4, atol=1e-5)


def test_what_this_installation_built_needs_no_trust(source: ir.Model, tmp_path: Path) -> None:
    folder = compile(source, tmp_path / "a")
    check(folder)
    check(folder.rename(tmp_path / "moved"))


def test_what_came_from_elsewhere_needs_trust(
    source: ir.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = compile(source, tmp_path / "a")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "other user"))
    with pytest.raises(InputError, match=r"machine code .* trust it \(--trust\) or do not"):
        compilation.load(folder)
    compilation.load(folder, trust=True)
    compile(source, tmp_path / "b")  # now there is a key, but another one
    with pytest.raises(InputError, match="machine code"):
        compilation.load(folder)


@pytest.mark.parametrize("signature", ["", "0" * 64, "\xe4"])
def test_a_forged_signature(source: ir.Model, tmp_path: Path, signature: str) -> None:
    folder = compile(source, tmp_path / "a")
    (folder / artifact.SIGNATURE).write_text(signature)
    with pytest.raises(InputError, match="machine code"):
        compilation.load(folder)


def test_a_changed_manifest_or_file(source: ir.Model, tmp_path: Path) -> None:
    folder = compile(source, tmp_path / "a")
    path = folder / "model.onnx"
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(InputError, match=r"model\.onnx was changed"):
        compilation.load(folder)
    data = json.loads((folder / artifact.MANIFEST).read_text())
    data["files"]["model.onnx"] = digests.sha256(path)
    (folder / artifact.MANIFEST).write_text(artifact.sealed(data))
    with pytest.raises(InputError, match="machine code"):
        compilation.load(folder)


def test_a_key_that_others_can_read_is_not_used(source: ir.Model, tmp_path: Path) -> None:
    folder = compile(source, tmp_path / "a")
    key = places.state("") / "key"
    assert key.stat().st_mode & 0o077 == 0
    key.chmod(0o644)
    assert not trust.is_own(folder)


def test_a_signature_that_is_a_pipe(source: ir.Model, tmp_path: Path) -> None:
    folder = compile(source, tmp_path / "a")
    signature = folder / artifact.SIGNATURE
    signature.unlink()
    os.mkfifo(signature)
    assert not trust.is_own(folder)


def test_code_for_another_machine(source: ir.Model, tmp_path: Path) -> None:
    target = "arm64:cortex-a76" if Target.parse("cpu").arch == "x86_64" else "cuda:sm_89"
    folder = compilation.compile(source, target, tmp_path / "a", backend="ort", level=0)
    with pytest.raises(MissingError, match=r"a cannot run here: .*(aarch64|CUDA)"):
        compilation.load(folder)


def test_a_backend_that_is_not_installed(
    source: ir.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = compile(source, tmp_path / "a")

    def absent(self: object) -> str:
        return "it is not installed: pip install it"

    monkeypatch.setattr(type(backends.get("ort")), "is_available", absent)
    with pytest.raises(MissingError, match="needs the backend onnxruntime: it is not installed"):
        compilation.load(folder)


def test_the_same_is_not_compiled_twice(
    source: ir.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compile(source, tmp_path / "a")

    def never(*arguments: object) -> dict[str, str]:
        raise AssertionError("compiled again")

    monkeypatch.setattr(pieces.Compiler, "compile", never)
    check(compile(source, tmp_path / "b"))
    for other in ({"cache": False}, {"options": {"threads": 1}}, {"fallback": False}):
        with pytest.raises(AssertionError, match="compiled again"):
            compile(source, tmp_path / "c", **other)
    source.graph[1].attributes.clear()
    source.graph[1].op_type = "Cos"
    with pytest.raises(AssertionError, match="compiled again"):
        compile(source, tmp_path / "c")


def test_what_somebody_put_into_the_cache_is_not_used(source: ir.Model, tmp_path: Path) -> None:
    compile(source, tmp_path / "a")
    (entry,) = places.cache("compiled").iterdir()
    path = entry / "model.onnx"
    path.write_bytes(path.read_bytes().replace(b"Sin", b"Cos"))
    check(compile(source, tmp_path / "b"))
    assert path.read_bytes() == (tmp_path / "b" / "model.onnx").read_bytes()  # replaced
    shutil.rmtree(entry)
    entry.mkdir()
    check(compile(source, tmp_path / "c"))


def test_the_cache_is_bounded(
    source: ir.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compile(source, tmp_path / "a")
    (first,) = places.cache("compiled").iterdir()
    half = first.with_name(".half")  # as a process leaves it that is killed meanwhile
    half.mkdir()
    for path in (first, half):
        os.utime(path, (0, 0))
    size = sum(path.stat().st_size for path in first.iterdir())
    monkeypatch.setenv("GRAPHOPT_CACHE_BYTES", str(size * 3 // 2))
    compile(source, tmp_path / "b", options={"threads": 1})
    (second,) = places.cache("compiled").iterdir()
    assert second != first


def test_a_compiler_that_hangs(source: ir.Model, tmp_path: Path) -> None:
    with pytest.raises(TimeLimitError, match=r"onnxruntime compiler took more than 0\.01 s"):
        compile(source, tmp_path / "a", time_limit=0.01)
    assert list(tmp_path.iterdir()) == []


def test_a_compiler_that_crashes(
    source: ir.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = pieces.child.call

    def crash(function: str, arguments: Mapping[str, Any], **rest: Any) -> Any:
        return call("tests._child:crash", {"number": 11}, **rest)

    monkeypatch.setattr(pieces.child, "call", crash)
    with pytest.raises(GraphoptError, match=r"onnxruntime compiler crashed with SIGSEGV \(log: "):
        compile(source, tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk(source: ir.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(folder: Path, manifest: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(artifact, "write", full)
    with pytest.raises(GraphoptError, match=r"a: No space left on device"):
        compile(source, tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def nodes(manifest: artifact.Manifest) -> list[int]:
    """How many each part has."""
    return [part.nodes for part in artifact.compiled(manifest.parts)]


@pytest.fixture
def partial(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """A backend that takes no Sin and no Relu, whose pieces are recorded."""
    compiled: list[list[str]] = []

    def some(self: pieces.Compiler, model: ir.Model, options: Any, folder: Path) -> dict[str, str]:
        refused = {
            ir.label(node): f"no {node.op_type}"
            for node in model.graph
            if node.op_type in ("Sin", "Relu")
        }
        if not refused:
            compiled.append([node.op_type for node in model.graph])
            if "Softmax" in compiled[-1]:
                raise GraphoptError("the compiler crashed")
            self.backend.compile(model, self.target, options, folder)
        return refused

    monkeypatch.setattr(pieces.Compiler, "compile", some)
    return compiled


def test_what_a_backend_does_not_take_falls_back(
    source: ir.Model, tmp_path: Path, partial: list[list[str]]
) -> None:
    report = Report()
    folder = compile(source, tmp_path / "a", report=report)
    check(folder)
    manifest = artifact.read(folder)
    assert partial == [["MatMul"], ["MatMul", "Add"]]
    assert manifest.fallback == {"odd": "no Sin"}
    assert nodes(manifest) == [1, 1, 2]
    assert report.notes[-1] == "onnxruntime runs odd: no Sin"
    executable = compilation.load(folder)
    assert executable.benchmark({"x": X}, 3).shape == (3,)
    assert {row.op for row in executable.profile({"x": X}, 2)} >= {"MatMul", "Sin"}
    with pytest.raises(InputError, match="input 'x' is missing"):
        executable.run({})
    check(compile(source, tmp_path / "b"))  # out of the cache
    assert len(partial) == 2


@pytest.mark.usefixtures("partial")
def test_the_size_of_a_model_that_was_cut_is_that_of_its_pieces(
    source: ir.Model, tmp_path: Path
) -> None:
    folder = compile(source, tmp_path / "a")
    found = measure(folder, {"x": X}, latency=False, process=False).models[0]
    assert found.bytes == sum(path.stat().st_size for path in folder.glob("part*/*"))


def test_a_piece_is_checked_like_any_file(
    source: ir.Model, tmp_path: Path, partial: list[list[str]]
) -> None:
    folder = compile(source, tmp_path / "a")
    (folder / "part1" / "more.so").touch()
    with pytest.raises(InputError, match=r"part1/more\.so is not in its manifest"):
        compilation.load(folder)


def test_without_fallback_the_nodes_are_named(
    source: ir.Model, tmp_path: Path, partial: list[list[str]]
) -> None:
    with pytest.raises(GraphoptError, match="does not take the model: node odd: no Sin"):
        compile(source, tmp_path / "a", fallback=False)


def test_a_piece_whose_compiler_fails_falls_back_too(
    tmp_path: Path, partial: list[list[str]]
) -> None:
    text = """
    <ir_version: 10, opset_import: ["" : 18]>
    g (float[n,4] x) => (float[n,4] y) {
        a = Exp(x) b = Neg(a) c = Abs(b) [odd] d = Sin(c)
        [soft] e = Softmax(d) f = Neg(e) y = Exp(f)
    }"""
    folder = compile(files.load(parser.parse_model(text)), tmp_path / "a")
    found = artifact.read(folder)
    assert found.fallback["soft"] == "the compiler fails with it: the compiler crashed"
    assert nodes(found) == [3, 4]


def test_the_node_that_a_compiler_fails_with_is_found(
    tmp_path: Path, partial: list[list[str]]
) -> None:
    chain = "\n".join(f"[n{i}] v{i + 1} = Exp(v{i}) [m{i}] w{i} = Neg(v{i})" for i in range(12))
    text = f"""
    <ir_version: 10, opset_import: ["" : 18]>
    g (float[n,4] v0) => (float[n,4] y, {", ".join(f"float[n,4] w{i}" for i in range(12))}) {{
        {chain}
        [soft] s = Softmax(v7) t = Tanh(v12) y = Add(s, t)
    }}"""
    found = artifact.read(compile(files.load(parser.parse_model(text)), tmp_path / "a"))
    assert "soft" in found.fallback
    assert len(found.fallback) < 8
    assert sum(nodes(found)) == 27


def test_a_compiler_that_fails_with_everything(
    source: ir.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> dict[str, str]:
        raise GraphoptError("it is broken")

    monkeypatch.setattr(pieces.Compiler, "compile", fail)
    with pytest.raises(GraphoptError, match="it is broken"):
        compile(source, tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_a_compiler_without_memory_is_not_asked_again(
    source: ir.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []

    def fail(*arguments: object) -> dict[str, str]:
        asked.append(arguments)
        raise MemoryLimitError("it ran out of memory")

    monkeypatch.setattr(pieces.Compiler, "compile", fail)
    with pytest.raises(MemoryLimitError, match=r"^it ran out of memory$"):
        compile(source, tmp_path / "a")
    assert len(asked) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_model_of_which_nothing_is_taken(tmp_path: Path, partial: list[list[str]]) -> None:
    text = """
    <ir_version: 10, opset_import: ["" : 18]>
    g (float[n,4] x) => (float[n,4] y) { [one] a = Sin(x) [two] y = Relu(a) }"""
    said = "node one: no Sin; node two: no Relu; nothing is left that is worth compiling"
    with pytest.raises(GraphoptError, match=said):
        compile(files.load(parser.parse_model(text)), tmp_path / "a")
