"""TVM's kernels one by one: rows of softmax, weights loaded ahead, against numpy."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from graphopt import compilation
from graphopt.backends import Array
from tests._models import parse
from tests.test_tvm import CPU, agree, needs_tvm, random, with_weights


def lowered(text: str, **weights: Array) -> tuple[Any, Any]:
    """The scheduled kernels of a model, and the target in TVM's terms."""
    compiler, link, importer, kernels, loops, tiles = (
        importlib.import_module(f"graphopt.backends._tvm_{name}")
        for name in ("compile", "link", "import", "kernels", "loops", "tiles")
    )
    machine = loops.Machine(tiles.Registers.of(CPU), 1)
    aim = link.tvm_target(CPU, 1)
    module = importer.import_model(with_weights(text, **weights), {})
    found, _ = compiler.lower(module, aim, machine, kernels.Kernels(machine.registers))
    return found, aim


@needs_tvm
@pytest.mark.parametrize("shape", [(3, 16), (2, 5, 48), (1, 12, 40, 128), (7, 8), (1, 32)])
def test_softmax_row_by_row(tmp_path: Path, shape: tuple[int, ...]) -> None:
    model = parse(f"g (float{list(shape)} x) => (float y) {{ y = Softmax <axis = -1> (x) }}")
    x = 5 * random(*shape)
    agree(model, {"x": x}, tmp_path / "a", "rows", tolerance=1e-6)
    found = compilation.load(tmp_path / "a", trust=True).run({"x": x})["y"]
    assert isinstance(found, np.ndarray)
    powers = np.exp(x - x.max(-1, keepdims=True), dtype=np.float64)
    np.testing.assert_allclose(found, powers / powers.sum(-1, keepdims=True), rtol=1e-6)


@needs_tvm
@pytest.mark.parametrize(
    ("rows", "columns", "ahead"), [(64, 400, True), (64, 16, False), (1, 4000, False)]
)
def test_weights_are_loaded_ahead(rows: int, columns: int, ahead: bool) -> None:
    """Unless there is no next block of them, or nothing to do meanwhile."""
    text = f"g (float[{rows},96] x, float[] w) => (float y) {{ y = MatMul (x, w) }}"
    kernels, _ = lowered(text, w=random(96, columns))
    assert ("llvm.prefetch" in kernels.script()) == ahead


@needs_tvm
def test_sums_are_not_on_the_heap() -> None:
    """Those of a tile may take more than TVM leaves on the stack by itself."""
    text = "g (float[64,96] x, float[] w) => (float y) { y = MatMul (x, w) }"
    kernels, aim = lowered(text, w=random(96, 400))
    compiler = importlib.import_module("graphopt.backends._tvm_compile")
    library = compiler.generate(kernels, aim).mod.imports[0]
    code = library.inspect_source("ll")
    assert "llvm.prefetch" in code
    assert "TVMBackendAllocWorkspace" not in code


@needs_tvm
def test_division_by_constants(tmp_path: Path) -> None:
    text = "g (float[3,40] x, float[] c) => (float y) { y = Div (x, c) }"
    for name, divisor in (("plain", [3.0]), ("zero", [0.0]), ("tiny", [1e-42])):
        x = np.abs(random(3, 40)) + np.float32(0.5)
        model = with_weights(text, c=np.array(divisor, np.float32))
        agree(model, {"x": x}, tmp_path / name, tolerance=1e-6)
        assert json.loads((tmp_path / name / "kernels.json").read_text())["rules"]


@needs_tvm
def test_rows_of_an_odd_length(tmp_path: Path) -> None:
    model = parse("g (float[4,37] x) => (float y) { y = Softmax <axis = -1> (x) }")
    agree(model, {"x": random(4, 37)}, tmp_path / "a", "stages", tolerance=1e-6)
