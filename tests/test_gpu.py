"""What a machine with an NVIDIA GPU runs, for every backend that is installed there.

Results against the CPU, latency, memory. Elsewhere all of it is skipped with the reason;
`tests/gpu_check.py` runs it and keeps the figures.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from graphopt import backends, models
from graphopt.target import Target
from tests import _gpu, gpu_check

Record = Callable[[str, object], None]


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["digits_cnn", "digits_transformer"])
@pytest.mark.parametrize("backend", backends.names())
def test_it_agrees_with_the_cpu(
    backend: str, name: str, tmp_path: Path, record_property: Record
) -> None:
    reason = _gpu.missing(backend)
    if reason is not None:
        pytest.skip(reason)
    for figure, value in _gpu.measure(backend, str(models.path(name)), str(tmp_path / "a")).items():
        record_property(figure, value)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", backends.names())
def test_an_artifact_of_another_gpu_is_refused(backend: str) -> None:
    reason = _gpu.missing(backend)
    if reason is not None:
        pytest.skip(reason)
    found = backends.get(backend)
    others = [Target.parse(name) for name in Target.names() if name.startswith("cuda:sm_")]
    if not any(found.can_compile(t) is None and found.can_run(t) is not None for t in others):
        pytest.skip(f"{backend} has nothing that is for one GPU only")


def test_the_check_ends_well_without_a_gpu(tmp_path: Path) -> None:
    if _gpu.missing("onnxruntime") is None:
        pytest.skip("here is a GPU")
    out = tmp_path / "check.json"
    done = subprocess.run([sys.executable, gpu_check.__file__, str(out)], check=False, timeout=120)
    assert done.returncode == 0
    assert json.loads(out.read_bytes())["rows"] == []


def crash(**_: object) -> None:
    """As a native library does it."""
    os.abort()


def wrong(**_: object) -> None:
    """What an assertion leaves."""
    raise AssertionError("results differ")


@pytest.mark.parametrize(
    ("function", "text"), [("crash", "SIGABRT"), ("wrong", "AssertionError: results differ")]
)
def test_what_crashes_is_a_row(monkeypatch: pytest.MonkeyPatch, function: str, text: str) -> None:
    monkeypatch.setattr(gpu_check, "MEASURE", f"{__name__}:{function}")
    row = gpu_check.one("tvm", Path("m.onnx"), 60)
    assert row["outcome"] == "failed"
    assert text in row["reason"]


def test_figures_of_a_test(tmp_path: Path) -> None:
    file = tmp_path / "test_one.py"
    file.write_text("def test_it(record_property):\n    record_property('ms', 3)\n")
    row = gpu_check.tested(f"{file}::test_it", 60)
    assert row == {"outcome": "passed", "figures": {"ms": "3"}}
