"""`auto` and `--tune`, and the worker processes that they measure with."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from graphopt import artifact, compilation, files, selection
from graphopt.cli import main
from graphopt.errors import GraphoptError, InputError, MissingError
from graphopt.report import Report
from graphopt.target import host
from graphopt.worker import Worker
from tests._text import model
from tests.test_tvm import needs_tvm

TEXT = """
net (float[n,2] x) => (float[n,2] y) <float[2] one = {1, 1}> {
  a = Identity (x)
  b = Add (a, one)
  y = Softmax (b)
}
"""
FEEDS = {"x": np.ones((2, 2), np.float32)}
PAIRS = """
net (float[n,2] x) => (float[m,2,2] y) <int64[3] pairs = {-1, 2, 2}> { y = Reshape (x, pairs) }
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An artifact."""
    return compilation.compile(model(TEXT), "cpu", tmp_path / "made", level=0)


def test_a_worker_is_like_any_executable(folder: Path) -> None:
    here = compilation.load(folder)
    with Worker(folder) as there:
        assert (there.inputs, there.outputs) == (here.inputs, here.outputs)
        assert there.manifest == artifact.read(folder)
        np.testing.assert_array_equal(
            np.asarray(there.run(FEEDS)["y"]), np.asarray(here.run(FEEDS)["y"])
        )
        assert there.benchmark(FEEDS, 3).shape == (3,)
        assert {row.op for row in there.profile(FEEDS, 2)} >= {"Softmax"}
        with pytest.raises(InputError, match="input 'x' is missing"):
            there.run({})
        os.kill(there.pid, signal.SIGKILL)
        with pytest.raises(GraphoptError, match=r"running it crashed \(SIGKILL\)"):
            there.run(FEEDS)


def test_a_worker_of_a_folder_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such artifact folder"):
        Worker(tmp_path / "absent")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measurements that cost nothing."""
    monkeypatch.setattr(selection, "_SECONDS", 0.01)
    monkeypatch.setattr(selection, "_CHOICES", {"arena": (True, False)})


@pytest.mark.usefixtures("quick")
def test_auto_measures_with_feeds_that_the_model_takes(tmp_path: Path) -> None:
    """A batch of one is none of them: its two numbers make no square."""
    out = compilation.compile(model(PAIRS), "cpu", tmp_path / "a", backend="auto")
    assert artifact.read(out).measured


@needs_tvm
@pytest.mark.usefixtures("quick")
def test_auto_measures_with_the_sizes_that_are_set(tmp_path: Path) -> None:
    text = "g (float[n,8] x) => (float[n,8] y) { y = Relu (x) }"
    options = {"dims": "n=3", "tune": 1}
    out = compilation.compile(
        model(text), "cpu", tmp_path / "a", backend="tvm", options=options, tune=0.001
    )
    assert compilation.load(out, trust=True).inputs[0].shape == (3, 8)


@pytest.mark.usefixtures("quick")
def test_auto_keeps_one_that_is_right(tmp_path: Path) -> None:
    report = Report()
    out = compilation.compile(
        model(TEXT), "cpu", tmp_path / "a", backend="auto", feeds=FEEDS, report=report
    )
    found = artifact.read(out)
    assert {"onnxruntime", "onnxruntime, the model as it is"} <= set(found.measured)
    assert report.notes[0].endswith("was taken")
    got = np.asarray(compilation.load(out).run(FEEDS)["y"])
    np.testing.assert_allclose(got, np.full((2, 2), 1 / 2), rtol=1e-5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]


@pytest.mark.usefixtures("quick")
def test_tuning_measures_options_that_are_left_open(tmp_path: Path) -> None:
    out = compilation.compile(
        model(TEXT), "cpu", tmp_path / "a", backend="ort", options={"threads": 1}, tune=0.001
    )
    found = artifact.read(out)
    assert any("arena=False" in name for name in found.measured)
    assert "onnxruntime, standard operators only" in found.measured
    assert not any("threads=" in name for name in found.measured)
    assert found.options["threads"] == 1


@pytest.mark.usefixtures("quick")
def test_a_candidate_that_is_wrong_is_not_taken(tmp_path: Path) -> None:
    wrong = TEXT.replace("Softmax", "Tanh")
    search = selection.Search(files.load(model(TEXT)), FEEDS, tmp_path)
    for name, text in (("right", TEXT), ("wrong", wrong)):
        search.add(name, lambda place, t=text: compilation.compile(model(t), "cpu", place, level=0))
    assert [each.name for each in search.found] == ["right"]
    assert "output 'y' differs" in search.rejected["wrong"]
    assert search.best().name == "right"


def test_nothing_that_works(tmp_path: Path) -> None:
    search = selection.Search(files.load(model(TEXT)), FEEDS, tmp_path)

    def fail(place: Path) -> Path:
        raise GraphoptError("it is broken")

    search.add("one", fail)
    with pytest.raises(GraphoptError, match="no backend runs the model here: one: it is broken"):
        search.best()


def test_what_makes_no_sense(tmp_path: Path) -> None:
    def auto(target: str, **options: Any) -> Path:
        return compilation.compile(
            model(TEXT), target, tmp_path / "a", backend="auto", options=options
        )

    with pytest.raises(InputError, match="no backend has an option 'beads'"):
        auto("cpu", beads=3)
    foreign = "arm64" if "neon" not in host().isa else "cuda"
    with pytest.raises(MissingError, match="nothing can be measured for"):
        auto(foreign)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("quick")
def test_the_command(tmp_path: Path) -> None:
    from click.testing import CliRunner

    files.save(model(TEXT), tmp_path / "m.onnx")
    np.savez(tmp_path / "in.npz", x=FEEDS["x"])
    arguments = ["compile", str(tmp_path / "m.onnx"), "-o", str(tmp_path / "a"), "--backend"]
    more = ["auto", "--inputs", str(tmp_path / "in.npz"), "--json", "-"]
    done = CliRunner().invoke(main, [*arguments, *more])
    assert done.exit_code == 0, done.output
    data = json.loads(done.stdout)
    assert data["manifest"]["measured"]
    assert data["report"]["notes"]
