"""Calibration in parts, which added up are one run; and quantization without data."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from graphopt import files, npz, quantize
from graphopt.errors import InputError
from graphopt.passes.quantize_weights import QuantizeWeights
from graphopt.quantization import Quantization, calibrate
from graphopt.quantizer.shards import Shard, combine
from tests._command import run
from tests._models import images, network


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model, samples, and three parts of a calibration in `parts`."""
    files.save(network(), tmp_path / "m.onnx")
    np.savez(tmp_path / "d.npz", x=images()["x"])
    (tmp_path / "parts").mkdir()
    for index in range(3):
        shard = calibrate(tmp_path / "m.onnx", tmp_path / "d.npz", shard=(index, 3))
        shard.save(tmp_path / "parts" / f"{index + 1}.npz")
    return tmp_path


def test_parts_are_one_run(folder: Path) -> None:
    """Whatever their order: the same sums, and the same model, byte for byte."""
    model, data, parts = folder / "m.onnx", folder / "d.npz", folder / "parts"
    part = "--shard", "1/1", "--no-cache", "-q"
    assert run("calibrate", model, "--data", data, "-o", folder / "all.npz", *part) == (0, "")
    whole, one = Shard.load(folder / "all.npz"), Shard.load(parts / "1.npz")
    merged = combine([parts / f"{k}.npz" for k in (3, 1, 2)], one.model)
    assert whole.model == one.model and whole.sketches.samples == merged.samples == 24
    for name, sketch in whole.sketches.tensors.items():
        other = merged.tensors[name]
        assert np.array_equal(sketch.counts, other.counts)
        assert (sketch.low, sketch.high, sketch.total) == (other.low, other.high, other.total)
    common = "quantize", model, "--force", "--seconds", 0, "-o"
    assert run(*common, folder / "a.onnx", "--calibration", folder / "all.npz")[0] == 0
    assert run(*common, folder / "b.onnx", "--calibration", parts)[0] == 0
    assert (folder / "a.onnx").read_bytes() == (folder / "b.onnx").read_bytes()
    code, text = run(*common, folder / "c.onnx", "--calibration", parts / "*.npz", "--data", data)
    assert code == 0 and "24 samples" in text and "smooth-activations" not in text


def test_what_does_not_go_together(folder: Path) -> None:
    """One line and exit code 2 each."""
    parts, other = folder / "parts", folder / "other.npz"
    base = "quantize", folder / "m.onnx", "--dry-run", "--force", "--seconds", 0

    def refused(*arguments: object) -> str:
        code, text = run(*base, *arguments)
        assert code == 2 and text.count("\n") == 1, text
        return text

    first, second = "--calibration", parts / "1.npz"
    twice = *(first, parts / "2.npz"), first, second, first, second
    assert "both part 1 of 3" in refused(*twice)
    assert "of 3 parts of the calibration, 2, 3 is missing" in refused(first, second)
    calibrate(folder / "m.onnx", folder / "d.npz", shard=(1, 2)).save(other)
    assert "do not go together" in refused(first, second, first, other)
    other.write_bytes((parts / "1.npz").read_bytes()[:-2000])
    assert "not a usable .npz" in refused(first, other)
    assert "is no part of a calibration" in refused(first, folder / "d.npz")
    arrays = npz.read(parts / "1.npz")
    for place in ([0, 1 << 40], [3, 3], [-1, 3], [0]):
        npz.write(other, {**arrays, "shard_place": np.array(place, np.int64)})
        assert "does not say which part" in refused(first, other)
    assert "no such file" in refused(first, folder / "nothing*.npz")
    assert "is for static" in refused(first, parts, "--method", "dynamic")
    assert "rotated" in refused(first, parts, "--rotate")
    arm = calibrate(folder / "m.onnx", folder / "d.npz", shard=(1, 3), target="cuda")
    arm.save(other)
    text = refused(first, second, first, other)
    assert "different options" in text or "did not look" in text
    with pytest.raises(InputError, match="another model"):
        combine([parts / "1.npz"], "0")
    code, text = run(
        "calibrate", folder / "m.onnx", "--data", "x", "-o", other, "--overwrite", "--shard", "4/3"
    )
    assert code == 2 and "--shard is K/N" in text


def test_what_needs_no_data(folder: Path) -> None:
    """Weights rounded each by itself, and ranges of run time; others say what they need."""
    report = Quantization()
    single = QuantizeWeights(8)
    result = quantize(folder / "m.onnx", options=single, seconds=0, report=report)
    assert report.bytes_after < 0.8 * report.bytes_before and report.score is None
    assert any("without samples" in note for note in report.notes)
    assert any(node.op_type == "DequantizeLinear" for node in result.graph)
    base = "quantize", folder / "m.onnx", "--dry-run", "--seconds", 0
    assert run(*base, "--method", "weights", "--weights", "int8")[0] == 0
    for arguments, wanted in (
        ((), "needs data (--data), or a calibration"),
        (("--method", "weights", "--rounding", "gptq"), "needs data"),
        (("--method", "weights", "--max-drop", 0.1), "need data: --data"),
    ):
        code, text = run(*base, *arguments)
        assert code == 2 and wanted in text, text
