"""Loops and branches that the host steers, against ONNX Runtime's own.

ONNX Runtime stands in for a native backend that takes neither control flow nor Sin.
"""

from __future__ import annotations

import dataclasses
import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from graphopt import artifact, backends, compilation, ir, pieces
from graphopt.backends import Array
from graphopt.errors import GraphoptError, InputError
from graphopt.report import Report
from graphopt.runner import Runner
from tests._text import model

X = np.linspace(-1, 1, 6, dtype=np.float32).reshape(3, 2)
W = "float[2,2] w = {0.5, -1, 0.25, 0.75}"
LOOP = f"""
net (float[n,2] x, int64 trips, bool go, float limit)
=> (float[n,2] y, float[k,n,2] each, int64[m] counts) <{W}> {{
    a = Neg (x)
    [loop] y, each, counts = Loop (trips, go, x) <body = b (int64 i, bool c, float[n,2] s)
    => (bool on, float[n,2] t, float[n,2] e, int64 j) {{
        p = MatMul (s, w)
        q = Sin (p)
        t = Add (q, a)
        r = ReduceMax <keepdims = 0> (t)
        less = Less (r, limit)
        on = And (less, c)
        e = Mul (t, t)
        j = Mul (i, i)
    }}>
}}
"""


@pytest.fixture(autouse=True)
def native(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """The stand-in; caches and keys are the test's."""
    monkeypatch.setattr(type(backends.get("ort")), "native_code", True)
    for kind in ("CACHE", "STATE"):
        monkeypatch.setenv(f"XDG_{kind}_HOME", str(tmp_path_factory.mktemp(kind)))

    def take(self: pieces.Compiler, model: ir.Model, options: Any, folder: Path) -> dict[str, str]:
        odd = [n for n in ir.nested_nodes(model) if n.op_type in ("Loop", "Scan", "If", "Sin")]
        if not odd:
            self.backend.compile(model, self.target, options, folder)
        return {ir.label(node): f"no {node.op_type}" for node in odd}

    monkeypatch.setattr(pieces.Compiler, "compile", take)


def build(text: str, folder: Path, **arguments: Any) -> artifact.Manifest:
    """Compile as it is."""
    compilation.compile(model(text), "cpu", folder, backend="ort", level=0, **arguments)
    return artifact.read(folder)


def compare(text: str, folder: Path, *feeds: dict[str, Any]) -> None:
    """What was compiled against ONNX Runtime on the whole."""
    executable, whole = compilation.load(folder), Runner(model(text))
    for each in feeds:
        given: dict[str, Array] = {name: np.asarray(value) for name, value in each.items()}
        found = executable.run(given)
        for name, expected in whole.run(given).items():
            result, wanted = np.asarray(found[name]), np.asarray(expected)
            assert result.dtype == wanted.dtype and result.shape == wanted.shape, name
            np.testing.assert_allclose(result, wanted, rtol=1e-5, atol=1e-6)


def feed(trips: int, go: bool = True, limit: float = 9) -> dict[str, Array]:
    """Inputs of `LOOP`."""
    numbers = np.array(trips), np.array(go), np.array(limit, np.float32)
    return {"x": X, **dict(zip(("trips", "go", "limit"), numbers, strict=True))}


def test_a_loop_by_the_rules(tmp_path: Path) -> None:
    report = Report()
    manifest = build(LOOP, tmp_path / "a", report=report)
    (flow,) = artifact.flows(manifest.parts)
    assert (flow.kind, flow.inputs) == ("Loop", ("trips", "go", "x", "a", "limit"))
    assert len(flow.blocks[0].steps) == 3
    assert manifest.fallback["Sin->q"] == "no Sin" and "loop" not in manifest.fallback
    assert report.notes[-1] == "onnxruntime runs what is in loop, which the host steers"
    cases = [feed(5), feed(1), feed(5, limit=0.4), feed(7, limit=-9)]
    compare(LOOP, tmp_path / "a", *cases)


@pytest.mark.parametrize("case", [feed(0), feed(-3), feed(5, go=False)])
def test_no_trip_at_all(tmp_path: Path, case: dict[str, Array]) -> None:
    build(LOOP, tmp_path / "a")
    found = compilation.load(tmp_path / "a").run(case)
    np.testing.assert_array_equal(np.asarray(found["y"]), X)
    assert not np.may_share_memory(np.asarray(found["y"]), X)
    shapes = [np.asarray(found[name]).shape for name in ("each", "counts")]
    assert shapes[0][0] == 0 and shapes[0][2] == 2 and shapes[1] == (0,)
    assert np.asarray(found["counts"]).dtype == np.int64


TEXTS = {
    "what_grows": f"""
    net (float[n,2] x, int64 trips) => (float[m,2] y) <{W}> {{
        go = Constant <value = bool {{1}}> ()
        y = Loop (trips, go, x) <body = b (int64 i, bool c, float[p,2] s)
        => (bool on, float[q,2] t) {{
            on = Identity (c)
            a = MatMul (s, w)
            t = Concat <axis = 0> (s, a)
        }}>
    }}""",
    "neither_trips_nor_condition": f"""
    net (float[n,2] x, int64 trips) => (float[n,2] y) <{W}> {{
        y = Loop ("", "", x) <body = b (int64 i, bool c, float[n,2] s)
        => (bool on, float[n,2] t) {{
            t = MatMul (s, w)
            on = Less (i, trips)
        }}>
    }}""",
    "what_stays_and_what_is_told_twice": f"""
    net (float[n,2] x, int64 trips) => (float[n,2] y, float[n,2] z, float[k,n,2] e, int64[l] f)
    <{W}, bool go = {{1}}> {{
        y, z, e, f = Loop (trips, go, x, x) <body = b (int64 i, bool c, float[n,2] s, float[n,2] u)
        => (bool on, float[n,2] t, float[n,2] v, float[n,2] tt, int64 one) <int64 one = {{1}}> {{
            t = MatMul (s, w)
            tt = Identity (t)
            v = Identity (u)
            on = Identity (c)
        }}>
    }}""",
    "in_one_another": f"""
    net (float[n,2] x, int64 trips) => (float[n,2] y, float[k,l,n,2] e) <{W}> {{
        y, e = Loop (trips, "", x) <body = b (int64 i, bool c, float[n,2] s)
        => (bool on, float[n,2] t, float[j,n,2] f) {{
            on = Identity (c)
            two = Constant <value_int = 2> ()
            t, f = Loop (two, "", s) <body = d (int64 ii, bool cc, float[n,2] ss)
            => (bool oo, float[n,2] tt, float[n,2] g) {{
                oo = Identity (cc)
                number = Add (i, ii)
                float = Cast <to = 1> (number)
                m = MatMul (ss, w)
                tt = Sin (m)
                g = Add (tt, float)
            }}>
        }}>
    }}""",
    "a_branch_in_a_loop": f"""
    net (float[n,2] x, int64 trips) => (float[n,2] y) <{W}> {{
        y = Loop (trips, "", x) <body = b (int64 i, bool c, float[n,2] s)
        => (bool on, float[n,2] t) {{
            on = Identity (c)
            half = Constant <value_int = 2> ()
            rest = Mod (i, half)
            odd = Cast <to = 9> (rest)
            t = If (odd) <
                then_branch = o () => (float[n,2] p) {{ a = MatMul (s, w) p = Sin (a) }},
                else_branch = e () => (float[n,2] q) {{ q = Sub (s, x) }}
            >
        }}>
    }}""",
    "a_scan": f"""
    net (float[n,2] x, int64 trips) => (float[n,2] y, float[n,2,n] e, float[m,n] f) <{W}> {{
        z = Transpose <perm = [1, 0]> (x)
        y, e, f = Scan <num_scan_inputs = 2, scan_input_axes = [1, 0],
            scan_input_directions = [1, 0], scan_output_axes = [-1, 0],
            scan_output_directions = [1, 0],
            body = b (float[n,2] s, float[2] left, float[2] right)
            => (float[n,2] t, float[n,2] u, float[n] v) {{
                m = MatMul (s, w)
                a = Add (m, left)
                t = Sub (a, right)
                u = Sin (t)
                one = Constant <value_ints = [1]> ()
                v = ReduceSum <keepdims = 0> (u, one)
            }}
        > (x, z, x)
    }}""",
    "branches_of_several_ranks": f"""
    net (float[n,2] x, int64 trips) => (float[k] y, float z, float k) <{W}, float k = {{7}}> {{
        two = Constant <value_int = 2> ()
        small = Less (trips, two)
        r, z = If (small) <
            then_branch = o () => (float[n,2] p, float pz) {{
                p = MatMul (x, w) pz = Constant <value_float = 1.5> ()
            }},
            else_branch = e () => (float q, float qz) {{
                q = ReduceSum <keepdims = 0> (x) qz = Identity (q)
            }}
        >
        flat = Constant <value_ints = [-1]> ()
        y = Reshape (r, flat)
    }}""",
}


@pytest.mark.parametrize("name", TEXTS)
def test_kinds_of_bodies(name: str, tmp_path: Path) -> None:
    manifest = build(TEXTS[name], tmp_path / "a")
    assert any(artifact.flows(manifest.parts))
    compare(TEXTS[name], tmp_path / "a", *({"x": X, "trips": trips} for trips in (1, 2, 3)))


class Bodies:
    """Random nodes, control flow in control flow among them, in ONNX's text form."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.flows = 0

    def nodes(self, depth: int, read: list[str], prefix: str) -> tuple[str, str]:
        """Some nodes that read these values, and the name of their result."""
        names, lines = [*read], list[str]()
        kinds = ["MatMul", "Sin", "Tanh", "Add", "If", "Loop"]
        for index in range(self.rng.randint(2, 5)):
            new = f"{prefix}{index}"
            first, last = (0 if self.flows else 4), (6 if depth and self.flows < 4 else 4)
            kind = self.rng.choice(kinds[first:last])
            a, b = self.rng.choice(names), self.rng.choice(names)
            if kind in ("If", "Loop"):
                self.flows += 1
                made: Callable[..., str] = self.branches if kind == "If" else self.loop
                lines.append(made(depth - 1, names, new, a))
            else:
                operands = {"MatMul": f"{a}, w", "Add": f"{a}, {b}"}.get(kind, a)
                lines.append(f"{new} = {kind} ({operands})")
            names.append(new)
        end = f"{prefix}end"
        lines.append(f"{end} = Add ({names[-1]}, {self.rng.choice(names)})")
        return "\n".join(lines), end

    def branches(self, depth: int, read: list[str], new: str, a: str) -> str:
        """An If by the sign of a value's sum."""
        lines = [f"{new}r = ReduceSum <keepdims = 0> ({a})", f"{new}c = Less ({new}r, zero)"]
        graphs: list[str] = []
        for side in ("then", "else"):
            text, end = self.nodes(depth, read, f"{new}{side[0]}")
            head = f"{side}_branch = {side} () => (float[n,2] {end}) {{"
            graphs.append(f"{head}\n{text}\n}}")
        return "\n".join([*lines, f"{new} = If ({new}c) <{', '.join(graphs)}>"])

    def loop(self, depth: int, read: list[str], new: str, a: str) -> str:
        """A Loop whose stack is added up behind it."""
        text, end = self.nodes(depth, [*read, f"{new}s"], f"{new}l")
        head = f"l (int64 {new}i, bool {new}c, float[n,2] {new}s)"
        gives = f"(bool {new}o, float[n,2] {end}, float[n,2] {new}m)"
        rest = f"{new}o = Identity ({new}c)\n{new}m = MatMul ({end}, w)"
        return f"""
        {new}y, {new}k = Loop (trips, go, {a}) <body = {head} => {gives} {{ {text}\n{rest} }}>
        {new}z = ReduceSum <keepdims = 0> ({new}k)
        {new} = Add ({new}y, {new}z)"""


@pytest.mark.parametrize("seed", range(8))
def test_random_bodies(seed: int, tmp_path: Path) -> None:
    lines, end = Bodies(seed).nodes(3, ["x"], "r")
    weights = "float[2,2] w = {0.5, -0.4, 0.25, 0.3}, float zero = {0}, bool go = {1}"
    text = f"net (float[n,2] x, int64 trips) => (float[n,2] {end}) <{weights}> {{ {lines} }}"
    build(text, tmp_path / "a")
    compare(text, tmp_path / "a", *({"x": X, "trips": trips} for trips in (0, 1, 3)))


def test_an_artifact_with_loops_needs_no_onnx(tmp_path: Path) -> None:
    build(TEXTS["in_one_another"], tmp_path / "a")
    script = f"""
import sys
sys.path[:] = {sys.path!r}
import numpy as np
from graphopt import compilation
model = compilation.load({str(tmp_path / "a")!r})
result = model.run({{"x": np.ones((3, 2), np.float32), "trips": np.array(2)}})
assert result["e"].shape == (2, 2, 3, 2), result["e"].shape
assert not {{"onnx", "onnx_ir", "sympy", "click", "rich"}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_profile_stands_for_all_iterations(tmp_path: Path) -> None:
    build(LOOP, tmp_path / "a")
    executable = compilation.load(tmp_path / "a")
    rows = {row.op: row for row in executable.profile(feed(10), 2)}
    assert rows["MatMul"].calls == pytest.approx(10) and rows["MatMul"].microseconds > 0
    assert rows["Neg"].calls == 1
    assert "MatMul" not in {row.op for row in executable.profile(feed(0), 2)}
    assert executable.benchmark(feed(3), 4).shape == (4,)


def test_what_the_fallback_does_as_well_is_left_to_it(tmp_path: Path) -> None:
    """Nothing in it is heavy, and it is not much."""
    with pytest.raises(GraphoptError, match="node loop: no Loop"):
        build(LOOP.replace("MatMul (s, w)", "Mul (s, x)"), tmp_path / "a")


def test_a_body_of_which_nothing_is_taken(tmp_path: Path) -> None:
    many = "\n".join(f"v{i + 1} = Sin (v{i})" for i in range(25))
    text = f"""
    net (float[n,2] x, int64 trips) => (float[n,2] z) {{
        y = Loop (trips, "", x) <body = b (int64 i, bool c, float[n,2] v0)
        => (bool on, float[n,2] v25) {{ on = Identity (c) {many} }}>
        e = Exp (y) f = Neg (e) z = Exp (f)
    }}"""
    manifest = build(text, tmp_path / "a")
    assert not any(artifact.flows(manifest.parts))
    assert list(manifest.fallback) == ["Loop->y"]
    compare(text, tmp_path / "a", {"x": X, "trips": 2})


def test_constants_are_checked_like_any_file(tmp_path: Path) -> None:
    build(TEXTS["what_grows"], tmp_path / "a")
    path = tmp_path / "a" / "constants0.npz"
    data = path.read_bytes()
    path.write_bytes(data[:-1] + b"x")
    with pytest.raises(InputError, match=r"constants0\.npz was changed"):
        compilation.load(tmp_path / "a")
    path.unlink()
    with pytest.raises(InputError, match=r"constants0\.npz is missing"):
        compilation.load(tmp_path / "a")


EMPTY: dict[str, Any] = {"inputs": [], "outputs": [], "steps": [], "constants": ""}
WRONG: list[dict[str, Any]] = [
    {"kind": "While"},
    {"carried": 9},
    {"carried": -1},
    {"inputs": []},
    {"outputs": ["y"]},
    {"blocks": []},
    {"blocks": [EMPTY]},
    {"kind": "Scan"},
    {"scanned": [{"number": "one"}]},
    {"blocks": [EMPTY | {"constants": "../x"}]},
]


@pytest.mark.parametrize("change", WRONG)
def test_a_loop_that_fits_nothing(tmp_path: Path, change: dict[str, Any]) -> None:
    build(LOOP, tmp_path / "a")
    path = tmp_path / "a" / artifact.MANIFEST
    data = json.loads(path.read_text("utf-8"))
    loop = next(step for step in data["parts"] if "kind" in step)
    loop |= change
    del data["checksum"]
    path.write_text(artifact.sealed(data), "utf-8")
    with pytest.raises(InputError, match="not a manifest of format"):
        artifact.read(tmp_path / "a")


def test_parts_out_of_order(tmp_path: Path) -> None:
    """A manifest that was written by hand, of a folder that is trusted."""
    build(LOOP, tmp_path / "a")
    manifest = artifact.read(tmp_path / "a")
    (tmp_path / "a" / artifact.MANIFEST).unlink()
    wrong = dataclasses.replace(manifest, parts=manifest.parts[::-1])
    artifact.write(tmp_path / "a", wrong)
    with pytest.raises(InputError, match="the manifest has no part that gives '"):
        compilation.load(tmp_path / "a", trust=True)


def test_a_condition_of_several_elements(tmp_path: Path) -> None:
    text = LOOP.replace("bool go", "bool[g] go")
    build(text, tmp_path / "a", check=False)
    executable = compilation.load(tmp_path / "a")
    with pytest.raises(GraphoptError, match="is not one number"):
        executable.run(feed(3) | {"go": np.ones(2, bool)})
