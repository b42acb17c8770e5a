"""`graphopt.compress` and `graphopt compress`: what each scheme comes to, files, bad requests."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

import graphopt
from graphopt import compression, files, models
from graphopt.cli import main
from graphopt.errors import InputError

onnx: Any = importlib.import_module("onnx")
importlib.import_module("onnx.parser")

MODEL = models.path("digits_cnn")


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["compress", *map(str, arguments)])


def test_smaller_files_keep_less() -> None:
    """Fewer bits, a smaller file and a lower signal-to-noise ratio."""
    names = ["lossless", "palette-8", "palette-6", "palette-4"]
    found = compression.survey(MODEL, names)
    assert [s.name for s in found] == names and not any(s.reason for s in found)
    assert found[0].loss is None and found[0].weight_snr_db is None
    figures = [(s.bytes, s.weight_snr_db or 99.0) for s in found]
    assert figures == sorted(figures, reverse=True)
    assert all(s.packed_bytes and s.packed_bytes < s.bytes for s in found)
    assert compression.smallest(found, -100).name == "palette-4"
    assert compression.smallest(found, 300).name == "lossless"


@pytest.mark.parametrize("name", list(compression.SCHEMES))
def test_every_scheme_is_to_be_had(name: str) -> None:
    """With the options that the passes have; what the weights lost is measured."""
    (found,) = compression.survey(MODEL, [name])
    assert not found.reason and (found.weight_snr_db is None) == (name == "lossless")


def test_none_is_good_enough() -> None:
    with pytest.raises(InputError, match="no scheme keeps 90 dB"):
        compression.smallest(compression.survey(MODEL, ["palette-3"]), 90)


def test_a_scheme_that_is_not_for_a_model_says_why() -> None:
    (found,) = compression.survey(MODEL, ["palettize-weights{keep=['*']}"])
    assert found.reason == "no weight here is worth it"


def test_an_old_model_gets_the_operators_that_a_palette_takes() -> None:
    for size, reason in ((64, ""), (4, "no weight here is worth it")):
        made: Any = onnx.parser.parse_model(f"""
            <ir_version: 4, opset_import: ["" : 9]>
            net (float[1,{size}] x) => (float[1,{size}] y) {{ y = MatMul (x, w) }}""")
        weights = np.linspace(-1, 1, size * size, dtype=np.float32).reshape(size, size)
        made.graph.initializer.append(onnx.numpy_helper.from_array(weights, "w"))
        for found in compression.survey(made, ["palette-4", "piecewise-4"]):
            assert found.reason == reason


def test_the_function() -> None:
    small = graphopt.compress(MODEL, "float16")
    assert any(node.op_type == "Cast" for node in small.graph)
    with pytest.raises(InputError, match="no scheme is named 'tiny'"):
        graphopt.compress(MODEL, "tiny")


def test_the_command(tmp_path: Path) -> None:
    table = call(MODEL, "--data", MODEL.parent / "digits_test.npz")
    assert table.exit_code == 0 and "palette-4" in table.output
    assert "accuracy" in table.output and "99.3 %" in table.output
    out, told = tmp_path / "small.onnx", tmp_path / "told.json"
    assert call(MODEL, "--scheme", "palette-4", "-o", out, "--json", told).exit_code == 0
    assert out.stat().st_size < MODEL.stat().st_size / 3
    data: Any = json.loads(told.read_text())
    assert data["written"] == {"scheme": "palette-4", "bytes": out.stat().st_size}
    packed = tmp_path / "model.onnx.zst"
    assert call(MODEL, "-o", packed, "-q").output == ""
    assert CliRunner().invoke(main, ["verify", str(MODEL), str(packed)]).exit_code == 0
    best = tmp_path / "best.onnx"
    assert call(MODEL, "--min-sqnr", "20", "-o", best).exit_code == 0
    assert len(files.load(best).graph) >= len(files.load(MODEL).graph)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--scheme", "float16"], "say where to write"),
        (["--scheme", "float16", "--min-sqnr", "3", "-o", "x.onnx"], "give either"),
        (["-o", "x.onnx"], "say how"),
        (["--scheme", "tiny", "-o", "x.onnx"], "no scheme is named 'tiny'"),
        (["--min-sqnr", "3", "--data", "nothing.npz", "-o", "x.onnx"], "nothing.npz"),
    ],
)
def test_bad_requests(tmp_path: Path, arguments: list[str], reason: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        result = call(MODEL, *arguments)
    assert result.exit_code == 2 and reason in result.output
    assert not list(tmp_path.iterdir())


def test_an_output_that_exists_stays(tmp_path: Path) -> None:
    out = tmp_path / "x.onnx"
    out.write_text("mine")
    assert call(MODEL, "--scheme", "float16", "-o", out).exit_code == 2
    assert out.read_text() == "mine"
