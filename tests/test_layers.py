"""`graphopt diff --layers`: two models compared by their values."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from graphopt import files, optimize
from tests._command import run
from tests._models import images, network


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A float model, two quantized ones, and samples."""
    files.save(network(), tmp_path / "float.onnx")
    np.savez(tmp_path / "d.npz", x=images()["x"])
    for name, how in (("8", ""), ("16", ",activations=uint16")):
        text = f"quantize-static{{rounding=nearest{how}}}"
        made = optimize(network(), passes=text, data=images(), verify="off")
        files.save(made, tmp_path / f"{name}.onnx")
    return tmp_path


def test_two_models_beside_a_third(folder: Path) -> None:
    base = ["diff", folder / "8.onnx", folder / "16.onnx", "--layers", "--data", folder / "d.npz"]
    code, text = run(*base, "--reference", folder / "float.onnx", "--json", "-")
    assert code == 0
    rows = json.loads(text)
    assert {row["name"] for row in rows} >= {"t", "y"}
    assert all(row["other_db"] > row["sqnr_db"] > 15 for row in rows if row["name"] in ("t", "y"))
    page = folder / "layers.html"
    code, text = run(*base, "--reference", folder / "float.onnx", "--report", page)
    assert code == 0 and "gain" in text
    assert page.read_text(encoding="utf-8").count("<svg") == 2
    code, text = run(*base)
    assert code == 0 and "gain" not in text and "SQNR dB" in text


def test_bad_arguments(folder: Path) -> None:
    models = ["diff", folder / "8.onnx", folder / "16.onnx"]
    code, text = run(*models, "--layers")
    assert code == 2 and "needs samples" in text
    code, text = run(*models, "--data", folder / "d.npz")
    assert code == 2 and "are for --layers" in text
    code, text = run(*models, "--layers", "--data", folder / "nothing.npz")
    assert code == 2 and "does not exist" in text
