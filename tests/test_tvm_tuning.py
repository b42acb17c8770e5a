"""Tuning of TVM's kernels: never worse than the rules, and it goes on where it was stopped."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from graphopt import backends, files
from graphopt.errors import InputError
from graphopt.runner import Runner
from tests.test_tvm import BACKEND, CPU, needs_tvm, random, with_weights


@needs_tvm
def test_tuning_goes_on_and_is_never_worse(tmp_path: Path) -> None:
    model = with_weights("g (float[12,64] x, float[] w) => (float[12,96] y) { y = MatMul (x, w) }",
                         w=random(64, 96))  # fmt: skip
    log, seen = tmp_path / "log.json", list[int]()
    for index in range(2):
        options = {"tune": 1, "log": str(log), "threads": 1}
        folder = tmp_path / str(index)
        folder.mkdir()
        BACKEND.compile(model, CPU, backends.make_options(BACKEND, options), folder)
        search = json.loads((folder / "kernels.json").read_text())["search"]
        seen.append(search["rounds"])
        assert search["after_ns"] < search["before_ns"] or not search["tiles"]
        (times,) = json.loads(log.read_text())["shares"].values()
        assert len(times) > 4
    assert seen[0] > seen[1] == 0
    log.write_text("{}")
    with pytest.raises(InputError, match="not a log of tuning"):
        BACKEND.compile(
            model, CPU, backends.make_options(BACKEND, {"tune": 1, "log": str(log)}), tmp_path
        )


@needs_tvm
def test_tuning_names_the_sizes_that_are_free(tmp_path: Path) -> None:
    model = with_weights("g (float[n,t,8] x, float[] w) => (float y) { y = MatMul (x, w) }",
                         w=random(8, 8))  # fmt: skip
    with pytest.raises(InputError, match=r"sizes n, t: give them, as .* dims=n=1,t=1$"):
        BACKEND.compile(model, CPU, backends.make_options(BACKEND, {"tune": 1}), tmp_path)


@needs_tvm
def test_tuning_that_was_killed_goes_on(tmp_path: Path) -> None:
    model = with_weights("g (float[12,64] x, float[] w) => (float[12,96] y) { y = MatMul (x, w) }",
                         w=random(64, 96))  # fmt: skip
    files.save(model, tmp_path / "m.onnx")
    log, options = tmp_path / "log.json", {"tune": 1, "log": str(tmp_path / "log.json")}
    script = (
        "from pathlib import Path\nfrom graphopt import backends, files\n"
        "from graphopt.target import Target\nbackend = backends.get('tvm')\n"
        f"backend.compile(files.load({str(tmp_path / 'm.onnx')!r}), Target.parse('cpu'),"
        f" backends.make_options(backend, {options!r}), Path({str(tmp_path)!r}))\n"
    )
    with subprocess.Popen([sys.executable, "-c", script]) as process:
        while not log.exists() and process.poll() is None:
            time.sleep(0.01)
        process.kill()
    (times,) = json.loads(log.read_text())["shares"].values()
    BACKEND.compile(model, CPU, backends.make_options(BACKEND, options), tmp_path)
    search = json.loads((tmp_path / "kernels.json").read_text())["search"]
    (all_times,) = json.loads(log.read_text())["shares"].values()
    assert search["rounds"] == len(all_times) - len(times) > 0
    assert all(all_times[tile] == spent for tile, spent in times.items())


@needs_tvm
@pytest.mark.parametrize(
    ("body", "shape", "weights"),
    [
        ("y = MatMul (x, w)", (12, 64), (64, 48)),
        ("y = Conv <pads = [1, 1, 1, 1]> (x, w)", (1, 8, 9, 11), (40, 8, 3, 3)),
        ("y = Conv <pads = [1, 1, 1, 1]> (x, w)", (1, 16, 9, 11), (32, 16, 3, 3)),
        ("y = Conv <pads = [1, 1, 1, 1], group = 32> (x, w)", (2, 32, 9, 11), (32, 1, 3, 3)),
    ],
)
def test_tiles_like_the_best_compute_the_same(
    body: str, shape: tuple[int, ...], weights: tuple[int, ...]
) -> None:
    tuning, importer, link, kernels, loops, tiles = (
        importlib.import_module(f"graphopt.backends._tvm_{name}")
        for name in ("tune", "import", "link", "kernels", "loops", "tiles")
    )
    text = f"g (float{list(shape)} x, float[] w) => (float y) {{ {body} }}"
    model = with_weights(text, w=random(*weights))
    machine = loops.Machine(tiles.Registers.of(CPU), 1)
    module, aim = importer.import_model(model, {}), link.tvm_target(CPU, 1)
    build = tuning._Builder(module, aim, machine)
    rules = kernels.Kernels(machine.registers)
    plain = build(rules)
    (wanted,) = Runner(model).run({"x": plain.inputs[0].numpy()}).values()
    ((key, (first, *_)),) = rules.seen.items()
    found: dict[str, float] = {}
    for _ in range(12):
        tile = tuning._candidate([first, *rules.seen[key][-8:]], found)
        if tile is None:
            break
        other = build(kernels.Kernels(machine.registers, tiles={key: tile}))
        got = other.machine["main"](*other.inputs)[0].numpy()
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)
        assert tile == tiles.Tile.parse(str(tile))
        found[str(tile)] = 1.5
    assert len(found) > 4
