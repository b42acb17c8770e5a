"""What loading and first running an artifact costs over ONNX Runtime by itself, in ms.

    python -m tests.benchmarks.startup [MODEL.onnx …]     the models that are shipped, if none

Each way runs in fresh processes, turn by turn; the least of several is what it costs. Both find
their bytecode compiled, as pip leaves it (in a folder of their own: a checkout may have none).
`over` is by the clock, `cpu` by what the processor did, which tells more on a busy machine.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from graphopt import compilation, files, models, npz
from graphopt.feeds import workable_feeds
from graphopt.shapes import Shapes

TURNS = 7
OWN = """
import sys, time
start = time.perf_counter()
import numpy, onnxruntime
feeds = dict(numpy.load(sys.argv[2]))
settings = onnxruntime.SessionOptions()
settings.intra_op_num_threads = 1
name = sys.argv[1] + "/model." + sys.argv[3]
session = onnxruntime.InferenceSession(name, settings, providers=["CPUExecutionProvider"])
session.run(None, feeds)
print((time.perf_counter() - start) * 1e3, time.process_time() * 1e3)
"""
OURS = """
import sys, time
start = time.perf_counter()
import numpy
from graphopt import compilation
feeds = dict(numpy.load(sys.argv[2]))
compilation.load(sys.argv[1]).run(feeds)
print((time.perf_counter() - start) * 1e3, time.process_time() * 1e3)
assert not {"onnx", "onnx_ir", "onnx_ir._core"} & set(sys.modules)
"""


def main() -> None:
    """A line per model and format."""
    paths = [Path(name) for name in sys.argv[1:]] or [
        models.path(name) for name in ("digits_cnn", "digits_transformer")
    ]
    for path in paths:
        for kind in ("onnx", "ort"):
            with tempfile.TemporaryDirectory() as scratch:
                print(path.name, kind, json.dumps(measure(path, kind, Path(scratch))), flush=True)


def measure(path: Path, kind: str, scratch: Path) -> dict[str, float]:
    """Least times of both ways, and how far they are apart by the clock and the processor."""
    model = files.load(path)
    npz.write(scratch / "in.npz", workable_feeds(model, Shapes(model)))
    folder = compilation.compile(
        model, "cpu", scratch / "a", backend="ort", options={"format": kind, "threads": 1}
    )
    arguments = [str(folder), str(scratch / "in.npz"), kind]
    environment = {**os.environ, "PYTHONPYCACHEPREFIX": str(scratch / "bytecode")}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    times: dict[str, list[tuple[float, float]]] = {"onnxruntime": [], "graphopt": []}
    for _ in range(1 + TURNS):  # the first turn writes the bytecode
        for name, script in (("onnxruntime", OWN), ("graphopt", OURS)):
            command = [sys.executable, "-c", script, *arguments]
            done = subprocess.run(
                command, check=True, capture_output=True, text=True, env=environment
            )
            clock, spent = map(float, done.stdout.split())
            times[name].append((clock, spent))
    (own, own_cpu), (ours, cpu) = (
        (min(clock for clock, _ in each[1:]), min(spent for _, spent in each[1:]))
        for each in times.values()
    )
    found = {"onnxruntime": own, "graphopt": ours, "over": ours - own, "cpu": cpu - own_cpu}
    return {name: round(value, 1) for name, value in found.items()}


if __name__ == "__main__":
    main()
