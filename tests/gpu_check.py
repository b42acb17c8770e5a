"""Run everything that takes a GPU, and write what came of it into one JSON file.

    python tests/gpu_check.py [FILE.json] [--models FILE_OR_FOLDER …] [--seconds N]

First the tests marked `gpu`, then, for each backend that is usable here, each model: those of
`models/`, and of folders all .onnx files below (the default is the folder of extra models, where
there is one). Each gets a process of its own with a time limit, and the file is written anew after
it: a library that crashes or hangs costs one row. Exit code 1 where something failed; 0 on a
machine without a GPU, and the file says why.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from graphopt import backends, child, models
from graphopt.backends import _cuda_driver
from graphopt.errors import GraphoptError
from graphopt.machine import Machine

ROOT = Path(__file__).resolve().parents[1]
MEASURE, MISSING = "tests._gpu:measure", "tests._gpu:missing"
_EACH = 600
"""Seconds for one model or test."""
_TESTS = ("tests/test_gpu.py", "tests/test_tvm.py")


def main() -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(description="what a GPU makes of graphopt")
    parser.add_argument("out", nargs="?", type=Path, default=Path("gpu_check.json"))
    parser.add_argument("--models", nargs="*", type=Path)
    parser.add_argument(
        "--seconds", type=float, default=3600, help="after which nothing new begins"
    )
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT))  # children find the tests where this process does
    os.chdir(ROOT)
    report = Report(options.out.absolute(), time.monotonic() + options.seconds)
    if _cuda_driver.missing() is None:
        for name in _collected():
            report.add({"test": name}, partial(tested, name, _EACH))
        for backend in backends.names():
            reason = child.call(MISSING, {"backend": backend}, what=f"ask-{backend}", seconds=120)
            if reason is not None:
                skipped = {"outcome": "skipped", "reason": reason}
                report.add({"backend": backend}, skipped.copy)
                continue
            for path in _models(options.models):
                row = {"backend": backend, "model": _name(path)}
                report.add(row, partial(one, backend, path, _EACH))
    return report.end()


class Report:
    """The rows so far, in a file that is whole at any time."""

    def __init__(self, path: Path, deadline: float) -> None:
        self._path, self._deadline = path, deadline
        self._gpu = _cuda_driver.missing() or _cuda_driver.architecture()
        self._rows: list[dict[str, Any]] = []
        self._write()

    def add(self, row: dict[str, Any], work: Callable[[], dict[str, Any]]) -> None:
        """Do a piece of work, unless the time is over, and write what it says."""
        start = time.monotonic()
        late = start > self._deadline
        found = {"outcome": "skipped", "reason": "the time was over"} if late else work()
        self._rows.append({**row, "seconds": round(time.monotonic() - start, 1), **found})
        print(json.dumps(self._rows[-1], default=str)[:300], flush=True)
        self._write()

    def end(self) -> int:
        """The exit code; says what came of it all."""
        counts = self._counts()
        print(f"{self._path}: {', '.join(f'{count} {kind}' for kind, count in counts.items())}")
        return int(counts["failed"] > 0)

    def _counts(self) -> dict[str, int]:
        outcomes = [row["outcome"] for row in self._rows]
        return {kind: outcomes.count(kind) for kind in ("passed", "failed", "skipped")}

    def _write(self) -> None:
        data = {
            "gpu": self._gpu,
            "machine": vars(Machine.here()),
            **self._counts(),
            "rows": self._rows,
        }
        beside = self._path.with_suffix(".part")
        beside.write_text(json.dumps(data, indent=2, default=str) + "\n", "utf-8")
        beside.replace(self._path)


def one(backend: str, model: Path, seconds: float) -> dict[str, Any]:
    """What came of a model in a process of its own."""
    with tempfile.TemporaryDirectory(prefix="graphopt-gpu-") as scratch:
        arguments = {"backend": backend, "model": str(model), "folder": f"{scratch}/a"}
        what = f"{backend}-{_name(model)}"
        try:
            figures = child.call(MEASURE, arguments, what=what, seconds=seconds)
        except GraphoptError as error:
            return {"outcome": "failed", "reason": str(error)}
    return {"outcome": "passed", "figures": figures}


def tested(name: str, seconds: float) -> dict[str, Any]:
    """What came of a test in a process of its own."""
    with tempfile.TemporaryDirectory(prefix="graphopt-gpu-") as scratch:
        out = Path(scratch) / "out.xml"
        written = (f"--junitxml={out}", "-o", "junit_family=xunit1")  # the other has no properties
        try:
            done = _pytest(name, *written, seconds=seconds)
        except subprocess.TimeoutExpired:
            return {"outcome": "failed", "reason": f"it took more than {seconds:g} s"}
        if not out.is_file():
            return {
                "outcome": "failed",
                "reason": f"ended with {done.returncode}: {done.stderr[-300:]}",
            }
        case = ElementTree.parse(out).getroot().find(".//testcase")
    if case is None:
        return {"outcome": "failed", "reason": done.stdout[-300:]}
    for kind, outcome in (("failure", "failed"), ("error", "failed"), ("skipped", "skipped")):
        found = case.find(kind)
        if found is not None:
            return {"outcome": outcome, "reason": found.get("message", "")}
    figures = {p.get("name", ""): p.get("value") for p in case.iter("property")}
    return {"outcome": "passed", "figures": figures}


def _pytest(*arguments: str, seconds: float) -> subprocess.CompletedProcess[str]:
    own = ("-c", str(ROOT / "pyproject.toml"), "-p", "no:cacheprovider")
    command = [sys.executable, "-m", "pytest", *own, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)


def _collected() -> list[str]:
    """The tests that are marked."""
    done = _pytest("--collect-only", "-m", "gpu", *_TESTS, seconds=_EACH)
    return [line for line in done.stdout.splitlines() if "::" in line and " " not in line]


def _models(given: Sequence[Path] | None) -> Iterator[Path]:
    """Those of the package, then those that are given, or all that lie in the usual folder."""
    from tests._shared import folder  # a script finds it only once `main` has said where

    yield from map(models.path, models.names())
    for place in [folder() / "corpus" / "models"] if given is None else given:
        yield from [place] if place.is_file() else sorted(place.rglob("*.onnx"))


def _name(path: Path) -> str:
    return path.parent.name if path.stem == "model" else path.stem


if __name__ == "__main__":
    sys.exit(main())
