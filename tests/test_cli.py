"""The command line: help that teaches, exit codes, output for people and for scripts."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from signal import SIGHUP, SIGTERM
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from graphopt import models
from graphopt.cli import main

onnx: Any = importlib.import_module("onnx")

CNN = str(models.path("digits_cnn"))
SAMPLES = str(models.path("digits_cnn").with_name("digits_test.npz"))


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments])


def refused(result: Result, code: int, *words: str) -> None:
    """One line on stderr, the exit code, no traceback."""
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    (line,) = result.stderr.strip().splitlines()
    for word in words:
        assert word in line, line


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cli") / "small.onnx"
    result = run("optimize", CNN, "-o", path)
    assert result.exit_code == 0, result.output
    return path


def test_every_command_has_help_with_an_example() -> None:
    for name, command in main.commands.items():
        result = run(name, "--help")
        assert result.exit_code == 0
        assert f"graphopt {name}" in (command.help or ""), f"{name} has no example"


def test_optimize_prints_what_changed_and_that_it_was_verified(tmp_path: Path) -> None:
    result = run("optimize", CNN, "-o", tmp_path / "o.onnx")
    assert result.exit_code == 0, result.output
    assert "fuse-conv-batchnorm" in result.output
    assert "verified (whole model)" in result.output
    assert len(onnx.load(tmp_path / "o.onnx").graph.node) < len(onnx.load(CNN).graph.node)


def test_optimizing_twice_changes_no_byte(small: Path, tmp_path: Path) -> None:
    assert run("optimize", small, "-o", tmp_path / "again.onnx").exit_code == 0
    assert (tmp_path / "again.onnx").read_bytes() == small.read_bytes()


def test_dry_run_writes_nothing(tmp_path: Path) -> None:
    result = run("optimize", CNN, "--dry-run", "-v", "-o", tmp_path / "o.onnx")
    assert result.exit_code == 0
    assert "->" in result.output
    assert not list(tmp_path.iterdir())


def test_json_is_the_only_thing_on_stdout() -> None:
    data = json.loads(run("optimize", CNN, "--dry-run", "--json", "-").stdout)
    assert data["after"]["nodes"] < data["before"]["nodes"]
    assert data["verification"]["ok"] is True


def test_quiet_prints_nothing(tmp_path: Path) -> None:
    result = run("optimize", CNN, "-q", "-o", tmp_path / "o.onnx", "--report", tmp_path / "r.json")
    assert result.exit_code == 0 and result.output == ""
    assert json.loads((tmp_path / "r.json").read_text())["passes"]


def test_a_pass_that_was_asked_for_and_did_nothing_says_so() -> None:
    result = run("optimize", CNN, "--dry-run", "-p", "fuse-gelu")
    assert "fuse-gelu" in result.output and "changed nothing" in result.output


def test_a_pass_that_a_toml_file_lists_and_did_nothing_says_so(tmp_path: Path) -> None:
    (tmp_path / "p.toml").write_text('passes = ["fold-constants", "fuse-gelu"]\n')
    result = run("optimize", CNN, "--dry-run", "-p", tmp_path / "p.toml")
    assert "fuse-gelu" in result.output and "changed nothing" in result.output


def test_a_dump_that_never_happens_says_so(tmp_path: Path) -> None:
    result = run("optimize", CNN, "--dry-run", "--dump-after", "fuse-gelu", tmp_path)
    assert "note: nothing was dumped: fuse-gelu changed nothing" in result.output


def test_lines_are_not_broken_in_a_pipe(small: Path) -> None:
    nodes = json.loads(run("inspect", CNN, "--nodes", "--json", "-").stdout)["nodes"]
    lines = run("inspect", CNN, "--nodes").output.splitlines()
    assert sum(" -> " in line and line.startswith(" ") for line in lines) == nodes


def test_each_pass_can_be_verified_dumped_and_limited(tmp_path: Path) -> None:
    result = run("optimize", CNN, "-o", tmp_path / "o.onnx", "--verify", "each",
                 "--dump-after", "all", tmp_path / "dumps")  # fmt: skip
    assert result.exit_code == 0, result.output
    dumps = sorted((tmp_path / "dumps").iterdir())
    assert dumps
    for dump in dumps:
        onnx.checker.check_model(str(dump))
    limited = run("optimize", CNN, "--dry-run", "--bisect-limit", "1", "--json", "-")
    data = json.loads(limited.stdout)
    assert sum(len(record["rewrites"]) for record in data["passes"]) == 1


def test_a_pipeline_can_come_from_a_toml_file(tmp_path: Path) -> None:
    file = tmp_path / "p.toml"
    file.write_text(
        'passes = ["fold-constants", "eliminate-dead"]\n[fold-constants]\nmax_bytes = 0\n'
    )
    result = run("optimize", CNN, "--dry-run", "-p", file, "--json", "-")
    assert json.loads(result.stdout)["pipeline"] == "fold-constants{max_bytes=0},eliminate-dead"
    file.write_text("passes = [")
    refused(run("optimize", CNN, "--dry-run", "-p", file), 2, "p.toml")


def test_shapes_can_be_set() -> None:
    result = run("optimize", CNN, "--dry-run", "--set-shape", "image:1x1x8x8")
    assert result.exit_code == 0, result.output
    refused(run("optimize", CNN, "--dry-run", "--set-shape", "picture:1x2"), 2, "picture")
    assert run("optimize", CNN, "--dry-run", "--set-shape", "image:max_x,1,8,8").exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "code", "word"),
    [
        (["optimize", "absent.onnx", "-o", "o.onnx"], 2, "absent.onnx"),
        (["optimize", CNN], 2, "--dry-run"),
        (["optimize", CNN, "-o", CNN], 2, "is the input"),
        (["optimize", CNN, "-o", "nowhere/o.onnx"], 2, "nowhere"),
        (["optimize", CNN, "--dry-run", "-p", "no-such"], 2, "no-such"),
        (["optimize", CNN, "--dry-run", "--disable", "no-such"], 2, "no-such"),
        (["optimize", CNN, "--dry-run", "--target", "toaster"], 2, "toaster"),
        (["optimize", CNN, "--dry-run", "-O", "9"], 2, "9"),
        (["optimize", SAMPLES, "--dry-run"], 2, "digits_test.npz"),
        (["optimize", CNN, "--dry-run", "--inputs", CNN], 2, "npz"),
        (["optimize", CNN, "--dry-run", "--time-limit", "0.001"], 124, "time limit"),
        (["passes", "no-such"], 2, "no-such"),
        (["passes", "fuse-gelux"], 2, "fuse-gelu"),
        (["verify", CNN, CNN, "--seed", "-1"], 2, "--seed"),
        (["optimise"], 2, "'optimize'"),
        (["verify", CNN], 2, "verify --help"),
        (["verify", CNN, CNN, "--threads", "0"], 2, "--threads"),
        (["optimize", CNN, "--dry-run", "-p", "absent.toml"], 2, "(No such file or directory)"),
        (["optimize", CNN, "-o", "o.onnx", "--report", "nowhere/r.json"], 2, "nowhere"),
        (["optimize", CNN, "-o", "o.onnx", "--evaluate", CNN], 2, "npz"),
        (["bench", CNN, "--dim", "batch=many"], 2, "batch=many"),
        (["bench", CNN, "--dim", "bath=2"], 2, "batch"),
    ],
)
def test_bad_usage_is_one_line_and_an_exit_code(
    arguments: list[str], code: int, word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    refused(run(*arguments), code, word)
    assert not list(tmp_path.iterdir())


def test_an_existing_output_is_only_replaced_on_request(tmp_path: Path) -> None:
    out = tmp_path / "o.onnx"
    out.write_text("precious")
    refused(run("optimize", CNN, "-o", out), 2, "--overwrite")
    assert out.read_text() == "precious"
    assert run("optimize", CNN, "-o", out, "--overwrite").exit_code == 0


def test_a_tolerance_that_is_given_holds(small: Path) -> None:
    assert run("verify", CNN, small).exit_code == 0
    assert run("verify", CNN, small, "--tolerance", "0").exit_code == 1


def test_verify_tells_same_from_different(small: Path, tmp_path: Path) -> None:
    result = run("verify", CNN, small)
    assert result.exit_code == 0 and "agree" in result.output
    broken = onnx.load(small)
    weight = max(broken.graph.initializer, key=lambda t: len(t.raw_data))
    array = onnx.numpy_helper.to_array(weight) * np.float32(1.1)
    weight.CopyFrom(onnx.numpy_helper.from_array(array, weight.name))
    onnx.save(broken, tmp_path / "broken.onnx")
    result = run("verify", CNN, tmp_path / "broken.onnx", "--json", "-")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["different"] is True


def test_verify_gates_a_lossy_model_on_samples(tmp_path: Path) -> None:
    rough = tmp_path / "rough.onnx"
    assert run("compress", CNN, "--scheme", "palette-4", "-o", rough, "-q").exit_code == 0
    data = ("--data", SAMPLES)
    result = run("verify", CNN, rough, *data, "--min-sqnr", "5", "--max-drop", "0.05")
    assert result.exit_code == 0, result.output
    assert "agreement" in result.output
    result = run("verify", CNN, rough, *data, "--min-sqnr", "90", "--json", "-")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["failed"] == ["min_sqnr"]
    refused(run("verify", CNN, rough, "--min-sqnr", "5"), 2, "needs --data")
    refused(run("verify", CNN, rough, *data), 2, "--min-sqnr")
    unlabelled = tmp_path / "x.npz"
    np.savez(unlabelled, image=np.zeros((2, 1, 1, 8, 8), np.float32))
    refused(run("verify", CNN, rough, "--data", unlabelled, "--max-drop", "0"), 2, "no labels")


def test_bench_gates_on_the_ratio(small: Path) -> None:
    quick = ("--seconds", "0.05", "--runs", "5", "--warmup", "0")
    assert run("bench", CNN, small, *quick, "--max-ratio", "50").exit_code == 0
    slow = run("bench", CNN, small, *quick, "--max-ratio", "0.0001")
    refused(slow, 1, "slower than 0.0001 times")
    refused(run("bench", CNN, "--max-ratio", "1"), 2, "give another one")


def test_help_names_every_command_in_a_section() -> None:
    lines = run("--help").output.splitlines()
    listed = {line.split()[0] for line in lines if line.startswith("  ")}
    assert set(main.commands) <= listed


def test_diff_inspect_passes_targets_and_doctor(small: Path) -> None:
    for arguments in (
        ("diff", CNN, small),
        ("inspect", CNN),
        ("inspect", CNN, "--nodes"),
        ("passes",),
        ("passes", "fuse-gelu"),
        ("targets",),
        ("targets", "arm64"),
        ("doctor",),
    ):
        result = run(*arguments)
        assert result.exit_code == 0 and result.output.strip(), (arguments, result.output)
        as_json = run(*arguments, "--json", "-")
        json.loads(as_json.stdout)


def test_bench_interleaves_and_reports_a_ratio(small: Path) -> None:
    quick = ("--seconds", "0.05", "--runs", "5", "--warmup", "0")
    data = json.loads(run("bench", CNN, small, *quick, "--json", "-").stdout)
    assert len(data["models"]) == 2
    names = [
        m["name"]
        for m in json.loads(run("bench", CNN, CNN, *quick, "--json", "-").stdout)["models"]
    ]
    assert names == [CNN, f"{CNN} #2"]


def test_compile_and_run(tmp_path: Path) -> None:
    result = run("compile", CNN, "-o", tmp_path / "d")
    assert result.exit_code == 0, result.output
    np.savez(tmp_path / "in.npz", image=np.zeros((2, 1, 8, 8), np.float32))
    result = run("run", tmp_path / "d", "--inputs", tmp_path / "in.npz", "-o", tmp_path / "y.npz")
    assert result.exit_code == 0, result.output
    assert np.load(tmp_path / "y.npz")["logits"].shape == (2, 10)
    np.savez(tmp_path / "bad.npz", picture=np.zeros(1))
    refused(run("run", tmp_path / "d", "--inputs", tmp_path / "bad.npz"), 2, "picture")
    inputs = ("--inputs", tmp_path / "in.npz")
    refused(run("run", tmp_path / "d", *inputs, "-o", tmp_path / "d"), 2, "is a folder")
    refused(run("run", tmp_path / "d", *inputs, "-o", tmp_path / "y.npz"), 2, "exists")


def test_bisect_finds_nothing_in_a_good_pipeline() -> None:
    result = run("bisect", CNN)
    assert result.exit_code == 0 and "fine" in result.output


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys, graphopt.cli as c\n"
        "try: c.main(['--help'])\n"
        "except SystemExit: pass\n"
        "assert not {'onnx', 'onnxruntime', 'numpy', 'sympy', 'rich'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.parametrize("number", [SIGTERM, SIGHUP])
def test_a_terminated_command_leaves_nothing_behind(tmp_path: Path, number: int) -> None:
    """As schedulers end it, and terminals that are closed: one line, no folder and no child."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    command = [sys.executable, "-m", "graphopt", "bench", str(models.path("digits_cnn"))]
    process = subprocess.Popen(
        [*command, "--seconds", "60"],
        env={**os.environ, "TMPDIR": str(scratch)},
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not list(scratch.glob("*/graphopt-*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert list(scratch.glob("*/graphopt-*")), "it uses no folder, so that nothing is shown"
    process.send_signal(number)
    _, text = process.communicate(timeout=60)
    assert (process.returncode, text) == (128 + number, "graphopt: terminated\n")
    assert not list(scratch.iterdir())
