"""TVM on the corpus: who compiles, who agrees, and latency over ONNX Runtime's, untuned or tuned.

    nice -n -10 python -m tests.benchmarks.tvm_corpus [--six] [--threads 1 2] [--tune MINUTES]
        [--level 2] [--kernels] [--json FILE] [MODEL …]

Protocol: the two artifacts run in processes of their own, in rounds that alternate (`graphopt.
timing`), for each number of threads in fresh ones; a ratio is that of medians, with its interval.
ONNX Runtime has the model as it is, or after graphopt's passes with `--level`. Free dimensions have
the sizes of the corpus's inputs for both, those of MiniLM are 1 and 128. Compilations are not taken
from the cache; their seconds are the CPU's, of this process and the compiler's, without the check.
What falls back on ONNX Runtime is listed.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from graphopt import artifact, compilation, files, npz
from graphopt.errors import GraphoptError
from graphopt.timing import Plan, benchmark, ratio
from graphopt.worker import Worker
from tests._shared import shared
from tests.benchmarks.arm_corpus import compare

PLAN = Plan(0.3, 5, 2.0, 30)
SIX = (
    *("cifar_resnet20_ts_op13", "minilm_ts_op18", "mlperf_kws_dscnn_fp32"),
    *("mobilenet_v2_10_224_fp32", "squeezenet_fp32", "yolox_nano"),
)
SIZES = {"minilm_ts_op18": {"batch": 1, "seq": 128}}
"""Free dimensions that are not those of a model's inputs in the corpus."""


def main() -> None:
    """One line per model, and the means."""
    parser = argparse.ArgumentParser()
    parser.add_argument("models", nargs="*")
    parser.add_argument("--six", action="store_true", help="the six models that have bars")
    parser.add_argument("--threads", type=int, nargs="*", default=[1], help="none: no latency")
    parser.add_argument("--tune", type=int, default=0, help="minutes for each model")
    parser.add_argument("--level", type=int, default=0, help="passes before ONNX Runtime")
    parser.add_argument("--kernels", action="store_true", help="time per kernel, the slowest ten")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    wanted = SIX if options.six else options.models
    rows: list[dict[str, Any]] = []
    for path in sorted(shared("corpus/models").iterdir()):
        if not wanted or path.name in wanted:
            row = {"model": path.name, **measure(path, options)}
            rows.append(row)
            shown = {key: value for key, value in row.items() if key != "kernels"}
            print(" ".join(f"{key}={value}" for key, value in shown.items()), flush=True)
            for line in row.get("kernels", ()):
                print("   ", line)
    summarize(rows, options.threads)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2))


def summarize(rows: list[dict[str, Any]], threads: list[int]) -> None:
    """Print the counts, and the geometric mean and the worst ratio for each number of threads."""
    good = [row for row in rows if row.get("agrees")]
    whole = [row for row in good if not row["fallback"]]
    print(f"{len(good)} of {len(rows)} agree, {len(whole)} of them without fallback")
    for count in threads:
        ratios = [row[f"ratio_{count}"] for row in rows if f"ratio_{count}" in row]
        if ratios:
            mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
            found = f"geometric mean {mean:.3f}, worst {max(ratios):.3f}"
            print(f"{count} threads: {len(ratios)} models, {found}")


def measure(path: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Compile one model, compare it with the original, and time both."""
    row: dict[str, Any] = {"agrees": False, "fallback": {}}
    feeds, dims = inputs(path)
    with tempfile.TemporaryDirectory() as scratch:
        for threads in options.threads or [1]:
            folder, base = Path(scratch) / f"tvm{threads}", Path(scratch) / f"base{threads}"
            how = {"threads": threads, "dims": dims, "tune": options.tune}
            try:
                row["seconds"] = compile_with(path, folder, how)
                row["fallback"] = dict(artifact.read(folder).fallback)
                with Worker(folder, trust=True) as native:
                    row |= compare(path, feeds, native.run(feeds))
                    if options.threads:
                        plain = {"threads": threads}
                        compilation.compile(
                            *(path / "model.onnx", "cpu", base),
                            backend="ort",
                            options=plain,
                            level=options.level,
                        )
                        with Worker(base) as runtime:
                            first, second = benchmark([runtime, native], [feeds] * 2, PLAN)
                        found = ratio(first, second, PLAN)
                        row[f"ratio_{threads}"] = round(found.value, 3)
                        row[f"between_{threads}"] = [round(found.low, 3), round(found.high, 3)]
                    if options.kernels:
                        row["kernels"] = slowest(native, feeds)
            except GraphoptError as error:
                row["error"] = " ".join(str(error).split())[:400]
                break
    return row


def compile_with(path: Path, folder: Path, how: Mapping[str, Any]) -> float:
    """Compile for this machine; the seconds of CPUs that it took from the model to the artifact."""
    start = cpu_seconds()
    compilation.compile(
        *(path / "model.onnx", "cpu", folder),
        backend="tvm",
        options=how,
        verify="off",
        cache=False,
        time_limit=1800,
    )
    return round(cpu_seconds() - start, 1)


def cpu_seconds() -> float:
    """Of this process and of the children that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def inputs(path: Path) -> tuple[dict[str, Any], str]:
    """A model's inputs, and the sizes of its free dimensions in them as the option `dims`.

    Where `SIZES` has others, the inputs of the corpus are repeated to fill them.
    """
    feeds, found = dict(npz.read(path / "inputs.npz")), dict[str, int]()
    wanted = SIZES.get(path.name, {})
    for value in files.load(path / "model.onnx").graph.inputs:
        name = value.name or ""
        if name not in feeds or value.shape is None:
            continue
        shape: list[int] = []
        for dim, size in zip(value.shape, feeds[name].shape, strict=True):
            free = "" if isinstance(dim, int) else dim.value or ""
            shape.append(wanted.get(free, int(size or 0)))
            if free:
                found[free] = shape[-1]
        feeds[name] = np.resize(feeds[name], shape)
    return feeds, ",".join(f"{name}={size}" for name, size in found.items())


def slowest(worker: Worker, feeds: Mapping[str, Any]) -> list[str]:
    """The ten calls of kernels that take longest, in microseconds."""
    times = sorted(worker.profile(feeds), key=lambda row: -row.microseconds)
    total = sum(row.microseconds for row in times)
    return [f"{row.microseconds:9.1f} of {total:.1f} us {row.node}" for row in times[:10]]


if __name__ == "__main__":
    main()
