"""What a model does on the GPU of this machine: results against the CPU, latency, memory.

Each measurement may run in a process of its own (`graphopt.child`), so it takes and gives plain
data.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from graphopt import backends, compilation, files, ir
from graphopt.backends import Array, _cuda_driver
from graphopt.feeds import workable_feeds
from graphopt.runner import Runner
from graphopt.shapes import Shapes
from graphopt.target import Target
from graphopt.timing import Latency

BATCHES = (1, 8)
"""Where the first size is free; other models are measured with the inputs that they have."""
RUNS = 200
_EXACT, _COARSE = 1e-3, 5e-2
"""Largest difference, over the largest value, of a float model and of one of few bits."""
_FEW_BITS = frozenset({ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.INT8})
_WARM_UP = 4


def here() -> Target:
    """The GPU of this machine."""
    name = f"cuda:{_cuda_driver.architecture()}"
    return Target.parse(name if name in Target.names() else "cuda")


def missing(backend: str) -> str | None:
    """Why a backend cannot compile for the GPU that is here and run on it, or None."""
    reason = _cuda_driver.missing()
    if reason is not None:
        return reason
    found, target = backends.get(backend), here()
    reason = found.can_compile(target) or found.can_run(target)
    return None if reason is None else f"{backend}: {reason}"


def measure(backend: str, model: str, folder: str, runs: int = RUNS) -> dict[str, Any]:
    """Compile a model file with a backend into a new folder, run it, compare and time it.

    Returns figures by name: milliseconds, bytes, the largest difference over the largest value,
    the nodes that fell back on the CPU.

    Raises:
        AssertionError: results differ from the CPU's.
        GraphoptError: the backend's.
    """
    # cuBLAS and cuDNN multiply with 10 bits of mantissa otherwise, and the bounds are for 23
    os.environ["NVIDIA_TF32_OVERRIDE"] = "0"
    loaded = files.load(Path(model))
    sets = _feeds(loaded)
    options = _ranges(sets) if "shapes" in backends.describe_options(backends.get(backend)) else {}
    made = compilation.compile(model, here(), folder, backend=backend, options=options, check=False)
    free = _cuda_driver.free_bytes()
    executable, reference = compilation.load(made, trust=True), Runner(Path(model))
    figures: dict[str, Any] = {"versions": backends.get(backend).versions()}
    figures["fell_back"] = dict(compilation.artifact.read(made).fallback)
    worst, limit = 0.0, _COARSE if _is_coarse(loaded) else _EXACT
    for feeds in sets:
        size = next((array.shape[0] for array in feeds.values() if array.ndim), 1)
        worst = max(worst, _difference(executable.run(feeds), reference.run(feeds)))
        executable.benchmark(feeds, runs // _WARM_UP)
        latency = Latency.of(executable.benchmark(feeds, runs))
        figures[f"p50_ms_batch_{size}"] = latency.p50_ms
        figures[f"p99_ms_batch_{size}"] = latency.p99_ms
    figures["largest_difference"] = worst
    figures["device_memory_bytes"] = free - _cuda_driver.free_bytes()
    rows = executable.profile(sets[0], 3)
    figures["slowest"] = [
        f"{row.node} {row.microseconds:.1f} us"
        for row in sorted(rows, key=lambda row: -row.microseconds)[:5]
    ]
    after = _difference(executable.run(sets[0]), reference.run(sets[0]))
    assert worst <= limit, f"results differ from the CPU's by {worst:.2e} of the largest value"
    assert after <= limit, f"results differ by {after:.2e} after a profile"
    assert rows, "the profile is empty"
    return figures


def _is_coarse(model: ir.Model) -> bool:
    values = model.graph.initializers.values()
    return any(value.dtype in _FEW_BITS for value in values) or any(
        "Quantize" in node.op_type for node in model.graph
    )


def _feeds(model: ir.Model) -> list[dict[str, Array]]:
    """Random inputs: one set for each batch, or one where the batch is not free."""
    shapes = Shapes(model)
    firsts = [dims[0] for value in model.graph.inputs if (dims := shapes.shape(value))]
    free = [str(size) for size in firsts if not isinstance(size, int)]
    batches = BATCHES if free else BATCHES[:1]
    return [workable_feeds(model, shapes, bindings=dict.fromkeys(free, batch)) for batch in batches]


def _ranges(sets: list[dict[str, Array]]) -> dict[str, str]:
    """TensorRT's option for inputs from the first set to the last, the first being the usual."""
    first, last = sets[0], sets[-1]
    texts = {
        name: "/".join("x".join(map(str, f[name].shape)) for f in (first, first, last))
        for name in first
        if first[name].ndim
    }
    return {"shapes": ",".join(f"{name}={text}" for name, text in texts.items())}


def _difference(found: dict[str, Any], expected: dict[str, Any]) -> float:
    """The largest difference of any output, over its largest value."""
    worst = 0.0
    for name, right in expected.items():
        a, b = (np.asarray(value) for value in (found[name], right))
        assert a.shape == b.shape, f"{name} is {list(a.shape)}, not {list(b.shape)}"
        if not b.size or b.dtype == object:
            continue
        a, b = a.astype(np.float64), b.astype(np.float64)
        assert (np.isfinite(a) == np.isfinite(b)).all(), f"{name}: not all numbers are finite"
        finite = np.isfinite(b)
        if finite.any():
            scale = max(float(np.abs(b[finite]).max()), 1e-6)
            worst = max(worst, float(np.abs(a[finite] - b[finite]).max()) / scale)
    return worst
