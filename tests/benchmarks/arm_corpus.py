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
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np

from graphopt import artifact, compilation, files, npz
from graphopt.backends import Array
from graphopt.errors import GraphoptError
from graphopt.runner import Runner
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
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    sysroot.add_to_path()
    rows: list[dict[str, Any]] = []
    for path in sorted(shared("corpus/models").iterdir()):
        if not options.models or path.name in options.models:
            rows.append(
                {
                    "model": path.name,
                    **check(path, options.backend, options.target, options.seconds),
                }
            )
            print(" ".join(f"{key}={value}" for key, value in rows[-1].items()), flush=True)
    good = [row for row in rows if row["agrees"]]
    whole = [row for row in good if not row["fallback"]]
    print(f"{len(good)} of {len(rows)} agree, {len(whole)} of them without fallback")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2))


def check(path: Path, backend: str, target: str, seconds: float) -> dict[str, Any]:
    """Compile one model, run it emulated, compare."""
    row: dict[str, Any] = {"agrees": False, "fallback": {}, "error": "", "difference": None}
    model, inputs = path / "model.onnx", path / "inputs.npz"
    with tempfile.TemporaryDirectory() as scratch:
        folder, outputs = Path(scratch) / "a", Path(scratch) / "outputs"
        try:
            compilation.compile(
                model, target, folder, backend=backend, options={"threads": 1}, time_limit=seconds
            )
            row["fallback"] = dict(artifact.read(folder).fallback)
            command = [*sysroot.python(), str(EMULATED), str(folder), str(inputs), str(outputs)]
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=seconds, check=False
            )
            row["ran"] = (done.stdout + done.stderr[-300:]).strip().rpartition(": ")[2]
            found = pickle.loads(outputs.read_bytes())
        except (GraphoptError, OSError, subprocess.TimeoutExpired) as error:
            row["error"] = " ".join(str(error).split())[:300]
            return row
    expected = Runner(files.load(model)).run(npz.read(inputs))
    row["difference"] = difference(expected, found)
    limit = 5e-2 if "qdq" in path.name else 1e-3
    row["agrees"] = row["difference"] <= limit
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


def _apart(one: Array, other: Array) -> float:
    """Of two arrays: numbers by their largest difference, text by how much of it differs."""
    if one.shape != other.shape:
        return float("inf")
    if one.dtype.kind in "OSU":
        return float(np.mean(one != other))
    if not one.size:
        return 0.0
    gap = np.abs(one.astype(np.float64) - other.astype(np.float64)).max()
    return float(gap / max(np.abs(one).max(), 1e-9))


if __name__ == "__main__":
    main()
