"""The shipped models: valid, as an exporter leaves them, and as good as the README says."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from graphopt import errors, models

onnx: Any = importlib.import_module("onnx")
onnxruntime: Any = importlib.import_module("onnxruntime")

FLOORS = {"digits_cnn": 0.98, "digits_transformer": 0.97}


@pytest.mark.parametrize("name", models.names())
def test_accuracy(name: str) -> None:
    """Held-out accuracy in ONNX Runtime, in batches of two sizes: the batch is dynamic."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        str(models.path(name)), options, providers=["CPUExecutionProvider"]
    )
    samples = models.samples()
    halves = [
        np.asarray(session.run(None, {"image": part})[0])
        for part in np.split(samples["image"], [150])
    ]
    right = np.concatenate(halves).argmax(1) == samples["labels"]
    assert right.mean() >= FLOORS[name]


@pytest.mark.parametrize("name", models.names())
def test_file(name: str) -> None:
    """A small, valid file with the fused operators spelled out, so there is work to do."""
    file = models.path(name)
    assert 100_000 <= file.stat().st_size <= 500_000
    model = onnx.load(file)
    onnx.checker.check_model(model, full_check=True)
    ops = {node.op_type for node in model.graph.node}
    assert {"Constant", "Shape", "Gather", "Reshape"} <= ops
    spelled_out = {
        "digits_cnn": {"BatchNormalization", "Pad", "Clip"},
        "digits_transformer": {"Erf", "Sqrt", "Softmax"},
    }
    assert spelled_out[name] <= ops
    assert not ops & {"Gelu", "LayerNormalization", "HardSwish"}


def test_names() -> None:
    """Every shipped model has an accuracy to hold, and no other name is taken."""
    assert models.names() == sorted(FLOORS)
    with pytest.raises(errors.InputError, match="digits_cnn"):
        models.path("resnet50")


def test_samples() -> None:
    """Held-out samples: all ten digits, one label each, in the inputs' range."""
    samples = models.samples()
    image, labels = samples["image"], samples["labels"]
    assert image.shape == (450, 1, 8, 8)
    assert image.dtype == np.float32
    assert 0.0 <= float(image.min()) < float(image.max()) <= 1.0
    assert labels.dtype == np.int64
    assert np.unique(labels).tolist() == list(range(10))


def test_training_script_parses() -> None:
    """The script that made the models is there and writes the names that are shipped."""
    source = (Path(models.__file__).parent / "train_digits.py").read_text(encoding="utf-8")
    words = {node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant)}
    assert set(models.names()) <= words
