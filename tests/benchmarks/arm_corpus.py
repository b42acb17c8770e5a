"""Compile the corpus for ARM and run it there, by emulation: who compiles, who agrees with x86.

    python tests/arm/sysroot.py [--tvm]
    python -m tests.benchmarks.arm_corpus [--backend tvm] [--json FILE] [MODEL …]

Agreement is against the model as it is in ONNX Runtime on this machine: relative to an output's
largest element. How long an emulated run takes says nothing about an ARM machine.
"""

from __future__ import annotations

import argparse
import json
import pickle
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from graphopt import artifact, compilation, files, npz
from graphopt.errors import GraphoptError
from graphopt.judging import Trial, computed_types, judge
from tests._shared import shared
from tests.arm import sysroot

EMULATED = Path(sysroot.__file__).with_name("emulated.py")


def main() -> None:
    """One line per model, and the counts."""
    parser = argparse.ArgumentParser()
    parser.add_argument("models", nargs="*")
    parser.add_argument("--backend", default="onnxruntime")
    parser.add_argument("--target", default="arm64:cortex-a76")
    parser.add_argument("--seconds", type=float, default=900, help="for each compilation and run")
    parser.add_argument("--group", type=int, default=7, help="models per emulated process")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    paths = [
        path
        for path in sorted(shared("corpus/models").iterdir())
        if not options.models or path.name in options.models
    ]
    rows: list[dict[str, Any]] = []
    for start in range(0, len(paths), options.group):
        rows += check(paths[start : start + options.group], options)
    good = [row for row in rows if row["agrees"]]
    whole = [row for row in good if not row["fallback"]]
    print(f"{len(good)} of {len(rows)} agree, {len(whole)} of them without fallback")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2))


def check(paths: Sequence[Path], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Compile some models, run them emulated in one process, compare; prints a line for each."""
    rows: dict[Path, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for path in paths:
            row: dict[str, Any] = {"model": path.name, "agrees": False, "fallback": {}}
            rows[path], folder = row, Path(scratch) / path.name
            try:
                compilation.compile(
                    *(path / "model.onnx", options.target, folder),
                    backend=options.backend,
                    options={"threads": 1},
                    time_limit=options.seconds,
                )
                row["fallback"] = dict(artifact.read(folder).fallback)
            except GraphoptError as error:
                row["error"] = " ".join(str(error).split())[:300]
        made = [path for path in paths if "error" not in rows[path]]
        _run(made, Path(scratch), options.seconds * max(1, len(made)))
        for path in paths:
            outputs = Path(scratch) / f"{path.name}.outputs"
            if outputs.exists():
                feeds = npz.read(path / "inputs.npz")
                rows[path] |= compare(path, feeds, pickle.loads(outputs.read_bytes()))
            print(" ".join(f"{key}={value}" for key, value in rows[path].items()), flush=True)
    return list(rows.values())


def _run(paths: Sequence[Path], scratch: Path, seconds: float) -> None:
    """Run what was compiled, by emulation; where one brings the process down, each by itself."""
    command = [*sysroot.python(), str(EMULATED)]
    for path in paths:
        names = (scratch / path.name, path / "inputs.npz", scratch / f"{path.name}.outputs")
        command += map(str, names)
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
        code = done.returncode
    except subprocess.TimeoutExpired:
        code = 1
    if code and len(paths) > 1:
        for path in paths:
            if not (scratch / f"{path.name}.outputs").exists():
                _run([path], scratch, seconds / len(paths))


def compare(path: Path, feeds: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    """Whether results agree with the model's here, or differ by no more than it does from itself.

    Some outputs of the corpus are noise: they change as much when ONNX Runtime optimizes.
    """
    model = files.load(path / "model.onnx")
    trial = Trial(model, [feeds])
    expected = trial.run()
    row: dict[str, Any] = {"difference": difference(expected[0], found)}
    row["agrees"] = row["difference"] <= (5e-2 if "qdq" in path.name else 1e-3)
    if not row["agrees"]:
        verdict = judge(trial, expected, [found], computed=computed_types(model))
        row["agrees"] = row["noise"] = all(output.ok for output in verdict.outputs)
    return row


def difference(expected: Mapping[str, Any], found: Mapping[str, Any]) -> float:
    """The largest difference of any output, relative to its largest element."""
    worst = 0.0
    for name, value in expected.items():
        pairs: list[tuple[Any, Any]] = [(value, found[name])]
        if isinstance(value, list):  # maps from classes to scores
            rows: list[Any] = [*zip(cast("list[Any]", value), found[name], strict=True)]
            pairs = [([a[key] for key in a], [b[key] for key in a]) for a, b in rows]
        worst = max([worst, *(_apart(np.asarray(a), np.asarray(b)) for a, b in pairs)])
    return worst


def _apart(one: Any, other: Any) -> float:
    """Of two arrays: numbers by their largest difference, text by how much of it differs."""
    if one.shape != other.shape:
        return float("inf")
    if one.dtype.kind in "OSU":
        return float(np.not_equal(one, other).mean())
    if not one.size:
        return 0.0
    gap = np.abs(one.astype(np.float64) - other.astype(np.float64)).max()
    return float(gap / max(np.abs(one).max(), 1e-9))


if __name__ == "__main__":
    main()
