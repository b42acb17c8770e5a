"""What pruning keeps, proves, loses and gains, in one table.

    python -m tests.benchmarks.pruning [--only SECTION ...] [--samples N] [--json FILE]

Sections: kept (share of parameters at half the channels), masked (each of the extra models: the
pruned one is the original with what went set to zero), accuracy (what recovery on N samples without
labels leaves), latency (with half the operations, on one thread, interleaved). Each line has the
figure, the bar that it has to stay below, and whether it does; the exit code is 1 where one does
not. The networks of section kept need torch; the extra models are found as the tests find them.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from graphopt import files, ir
from graphopt.errors import InputError
from graphopt.measurement import measure
from graphopt.optimization import optimize
from graphopt.pruner.pruning import Options, prune_once
from graphopt.pruning import PruneReport, prune
from graphopt.random_inputs import required_inputs
from graphopt.samples import open_samples
from graphopt.timing import Plan
from tests._shared import shared
from tests.benchmarks.run import Line

HALF = Options(ratio=0.5, round_to=1)
EXACT = Options(ratio=0.5, round_to=1, exact=True)
KEPT = {
    "yolox_nano": 0.27,
    "gesture_lstm": 0.27,
    "mobilenet_v2_10_224_fp32": 0.35,
    "squeezenet_fp32": 0.36,
    "cifar_resnet20_ts_op13": 0.27,
    "cifar_resnet32_dynamo_op20": 0.27,
}
"""Extra models and the share of parameters that half the channels should leave at most."""
TASKS: tuple[tuple[str, dict[str, float], float], ...] = (
    ("cifar_resnet20_ts_op13", {"params": 0.7}, 0.02),
    ("cifar_resnet20_ts_op13", {"params": 0.5}, 0.08),
    ("cifar_resnet32_dynamo_op20", {"params": 0.7}, 0.02),
    ("cifar_resnet32_dynamo_op20", {"params": 0.5}, 0.08),
    ("mobilenet_v2_10_224_fp32", {"flops": 0.75}, 0.04),
    ("minilm_ts_op18", {"flops": 0.75}, 0.02),
)
"""Extra model, budget, and how much its task's figure may fall."""
FAST = ("mobilenet_v2_10_224_fp32", "yolox_nano", "squeezenet_fp32")


def main() -> int:
    """Print the table; 1 where a bar is missed."""
    parser = argparse.ArgumentParser(description="What pruning keeps, proves, loses and gains.")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    lines: list[Line] = []
    for section in options.only:
        print(f"## {section}", flush=True)
        try:
            for line in SECTIONS[section](options):
                lines.append(line)
                bar = "" if line.bar is None else f"  (at most {line.bar:g})"
                state = "" if line.ok else "  MISSED"
                print(f"{line.what}: {line.value:.4g}{bar}{state}  {line.note}", flush=True)
        except pytest.skip.Exception as error:
            print(f"skipped: {error}")
    if options.json:
        data = [{**vars(line), "ok": line.ok} for line in lines]
        options.json.write_text(json.dumps(data, indent=1), encoding="utf-8")
    return 0 if all(line.ok for line in lines) else 1


def kept(options: argparse.Namespace) -> Iterator[Line]:
    """The share of parameters at half the channels, and how long pruning takes."""
    del options
    if importlib.util.find_spec("torch") is not None:
        from tests.benchmarks._zoo import ZOO, export

        with tempfile.TemporaryDirectory() as folder:
            for name, (_, _, _, bar) in ZOO.items():
                export(name, path := Path(folder) / f"{name}.onnx")
                yield _kept(name, path, bar)
    for name, bar in KEPT.items():
        yield _kept(name, shared(f"corpus/models/{name}/model.onnx"), bar)


def _kept(name: str, path: Path, bar: float) -> Line:
    model = optimize(files.load(path), level=1, verify="off")
    start = time.process_time()
    done = prune_once(model, HALF, check=False)
    seconds = time.process_time() - start
    note = f"of {done.before.parameters:,}, {seconds:.1f} CPU-s"
    return Line(name, done.after.parameters / done.before.parameters, bar=bar, note=note)


def masked(options: argparse.Namespace) -> Iterator[Line]:
    """How far each pruned model is from the original with the rest set to zero."""
    del options
    for folder in sorted(shared("corpus/models").iterdir()):
        model = optimize(files.load(folder / "model.onnx"), level=1, verify="off")
        with np.load(folder / "inputs.npz") as arrays:
            feeds = {value.name: arrays[value.name] for value in required_inputs(model)}
        try:
            done = prune_once(model, EXACT, open_samples([feeds], model))
        except InputError as error:
            yield Line(folder.name, 0.0, note=str(error))
            continue
        groups = sum(before - after for before, after in done.counts.values())
        error = np.inf if done.error is None else done.error
        yield Line(folder.name, float(error), bar=1e-5, note=f"{groups} groups pruned")


def accuracy(options: argparse.Namespace) -> Iterator[Line]:
    """What a task's figure falls by, on samples that recovery has not seen."""
    script = shared("corpus/evaluate.py")

    def run(*arguments: object) -> str:
        command = [sys.executable, str(script), *map(str, arguments)]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    whole: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        data, out = Path(folder) / "feeds.npz", Path(folder) / "pruned.onnx"
        for name, budget, bar in TASKS:
            source = shared(f"corpus/models/{name}/model.onnx")
            run("--calibration", name, data, "--count", options.samples)
            if name not in whole:
                whole[name] = float(json.loads(run(source, "--as", name))["value"])
            report, start = PruneReport(), time.process_time()
            settings: dict[str, Any] = {**budget, "data": data, "recover": True}
            model = prune(source, **settings, benchmark=False, report=report)
            seconds = time.process_time() - start
            files.save(model, out, overwrite=True)
            value = float(json.loads(run(out, "--as", name))["value"])
            text = ", ".join(f"{key} {share:g}" for key, share in budget.items())
            note = f"{whole[name]:.4f} -> {value:.4f}, {_sizes(report)}, {seconds:.0f} CPU-s"
            yield Line(f"{name} at {text}", whole[name] - value, bar=bar, note=note)


def _sizes(report: PruneReport) -> str:
    before, after = report.before, report.after
    assert before is not None and after is not None
    parameters = after.parameters / before.parameters
    return f"{parameters:.1%} of parameters, {after.flops / before.flops:.1%} of operations"


def latency(options: argparse.Namespace) -> Iterator[Line]:
    """The median latency with half the operations beside the original's, both optimized."""
    del options
    for name in FAST:
        source = shared(f"corpus/models/{name}/model.onnx")
        pruned = prune(source, flops=0.5, target="cpu", benchmark=False)
        models: dict[str, ir.Model] = {
            key: optimize(model, target="cpu", verify="off")
            for key, model in (("before", files.load(source)), ("after", pruned))
        }
        plan = Plan(seconds=3.0, runs=50)
        one = {"threads": 1}
        measured = measure(models, target="cpu", options=one, process=False, plan=plan)
        found = measured.models[1].ratio
        assert found is not None
        yield Line(name, found.value, bar=0.65, note="of the original's latency")


SECTIONS: dict[str, Callable[[argparse.Namespace], Iterator[Line]]] = {
    "kept": kept,
    "masked": masked,
    "accuracy": accuracy,
    "latency": latency,
}

if __name__ == "__main__":
    sys.exit(main())
