"""`graphopt compile`, `bench --backends`: what they say, and what they say when it goes wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from graphopt import artifact, backends, files
from graphopt.cli import main
from tests._text import model

TEXT = "net (float[n,2] x) => (float[n,2] y) { a = Identity (x) y = Sin (a) }"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A model file."""
    files.save(model(TEXT), tmp_path / "m.onnx")
    return tmp_path / "m.onnx"


def call(*arguments: object) -> Result:
    """Run the command."""
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_it_says_what_it_made(source: Path, tmp_path: Path) -> None:
    done = call("compile", source, "-o", tmp_path / "a", "--json", tmp_path / "out.json")
    assert done.exit_code == 0
    assert "compiled for cpu with onnxruntime" in done.stdout
    data = json.loads((tmp_path / "out.json").read_text())
    assert data["manifest"]["backend"] == "onnxruntime"
    assert data["manifest"]["target"]["name"] == "cpu"
    assert data["report"]["pipeline"]


def test_what_falls_back_is_said(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the ordinary backend, told not to take Sin."""
    kind = type(backends.get("ort"))
    monkeypatch.setattr(kind, "native_code", True)

    def refuse(*arguments: object) -> dict[str, str]:
        return {"y": "it takes no Sin"}

    monkeypatch.setattr("graphopt.pieces.Compiler.compile", refuse)
    done = call("compile", source, "-o", tmp_path / "a", "--no-cache", "--no-fallback")
    assert done.exit_code == 4
    assert "does not take the model: node y: it takes no Sin" in done.stderr
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--backend", "abacus"], 2, "unknown backend 'abacus'"),
        (["--shapes", "x=1x2"], 2, "onnxruntime has no option 'shapes'"),
        (["--backend", "tensorrt", "--target", "cpu"], 3, "for NVIDIA GPUs, not for cpu"),
        (["--backend", "auto", "--target", "cuda:sm_120"], 3, "nothing can be measured for"),
        (["--backend", "auto", "--option", "beads=1"], 2, "no backend has an option 'beads'"),
        (["--tune", "-1"], 2, "tune"),
        (["--memory-limit", "much"], 2, "is no size"),
        (["--time-limit", "0"], 124, "time limit"),
        (["--inputs", "absent.npz"], 2, "absent.npz"),
    ],
)
def test_mistakes(
    source: Path, tmp_path: Path, arguments: list[str], code: int, message: str
) -> None:
    done = call("compile", source, "-o", tmp_path / "a", *arguments)
    assert done.exit_code == code, done.output
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.onnx"]


def test_a_folder_from_elsewhere_runs_with_trust(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(backends.get("ort")), "native_code", True)
    assert call("compile", source, "-o", tmp_path / "a", "-q").exit_code == 0
    (tmp_path / "a" / artifact.SIGNATURE).unlink()
    inputs = tmp_path / "in.npz"
    inputs.write_bytes(b"")
    done = call("run", tmp_path / "a", "--inputs", inputs)
    assert done.exit_code == 2
    assert "--trust" in done.stderr


def test_backends_side_by_side(source: Path) -> None:
    done = call("bench", source, "--backends", "ort", "--seconds", "0", "--runs", "2")
    assert done.exit_code == 0, done.output
    assert "onnxruntime 1." in done.stdout
    done = call("bench", source, "--backends", "ort,abacus")
    assert done.exit_code == 2
    assert "unknown backend 'abacus'" in done.stderr
    done = call("bench", source, "--backends", "ort", "--backend", "ort")
    assert done.exit_code == 2
    assert "not both" in done.stderr
