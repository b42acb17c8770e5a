"""Random compositions of what passes look for, with near misses, through every exact pass.

    python tests/benchmarks/compositions.py [--count 500] [--seed 0] [--only PASS]
    python tests/benchmarks/compositions.py --models FOLDER     the passes on model files instead

Each model runs at levels 2 and 3, for the CPU target, and through every exact pass by itself. Told
are results that differ from the original's, crashes, results that do not run, and second runs
that change a byte; exit code 1 where there is any. The same seed gives the same models.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import itertools
import math
import random
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from graphopt import backends, feeds, files, ir
from graphopt.context import Context
from graphopt.errors import GraphoptError, InputError
from graphopt.optimization import arranged
from graphopt.pass_manager import PassManager, load_pass, parse_pipeline, pass_names
from graphopt.passes import PIPELINES
from graphopt.report import Report
from graphopt.runner import Runner
from graphopt.shapes import Shapes
from graphopt.target import Target
from tests.benchmarks._cells import recurrent
from tests.benchmarks._idioms import CHANNELS, IMAGES, ROWS, SIDE, WIDTH, Sketch
from tests.benchmarks._spellings import SPELT_IMAGES, SPELT_ROWS

onnx: Any = importlib.import_module("onnx")
helper = onnx.helper
OPSETS = (11, 13, 17, 18, 20, 21)
TOLERANCE = {"float16": 2e-2, "float32": 1e-3, "float64": 1e-6}
STEPS = ("QuantizeLinear", "Greater", "Cast", "Not", "Floor", "Round")
"""Operators with jumps: rounding before them may flip single elements."""


@dataclass
class Subject:
    """A model, inputs for it, and what it makes of them."""

    name: str
    model: ir.Model
    inputs: list[dict[str, Any]]
    wanted: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    jumps: bool = False

    def prepare(self) -> bool:
        """Run the original; False where it does not run on any of the inputs."""
        try:
            runner = Runner(self.model)
        except GraphoptError:
            return False
        kept: list[dict[str, Any]] = []
        for given in self.inputs:
            try:
                self.wanted.append(runner.run(given))
                kept.append(given)
            except GraphoptError:
                continue
        self.inputs = kept
        self.jumps = any(node.op_type in STEPS for node in ir.all_nodes(self.model))
        return bool(kept)


def compose(seed: int) -> Subject | None:
    """A model of a few idioms that follow each other, from the seed alone."""
    rng = random.Random(seed)
    opset = rng.choice(OPSETS)
    dtype = rng.choices([np.float32, np.float16, np.float64], [0.86, 0.09, 0.05])[0]
    sketch = Sketch(rng, opset, dtype, rng.choice([0.0, 0.0, 0.05, 0.15]))
    rows = rng.random() < 0.65
    snippets = (*ROWS, *SPELT_ROWS, recurrent) if rows else (*IMAGES, *SPELT_IMAGES)
    dims = ["n", "s", WIDTH] if rows else ["n", CHANNELS, SIDE, SIDE]
    if rng.random() < 0.4:
        dims = [{"n": 2, "s": 3}.get(dim, dim) if isinstance(dim, str) else dim for dim in dims]
    values = ["x"]
    for _ in range(rng.randrange(2, 6)):
        source = values[-1] if rng.random() < 0.8 else rng.choice(values)
        made = _nested(sketch, rng.choice(snippets), source)
        if rng.random() < 0.25:
            made = sketch.op(rng.choice(["Add", "Mul"]), made, rng.choice(values))
        values.append(made)
    model = _finish(sketch, values[-1], dims)
    if model is None:
        return None
    inputs = list(_inputs(dims, dtype, sketch))
    try:
        return Subject(f"seed {seed}", files.load(model), inputs)
    except InputError:
        return None


def _nested(sketch: Sketch, snippet: Any, source: str) -> str:
    """A snippet as it is, or in a branch of an If, or in the body of a Loop."""
    place = sketch.rng.random()
    if place > 0.2:
        return snippet(sketch, source)
    outside, sketch.nodes = sketch.nodes, []
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(sketch.dtype))
    if place < 0.12:
        inner = snippet(sketch, source)
        yes = _graph(sketch.nodes, [], [(inner, kind)])
        sketch.nodes = []
        no = _graph(sketch.nodes, [], [(sketch.op("Neg", source), kind)])
        sketch.nodes = outside
        which = sketch.rng.randrange(3)
        on = "flag" if which == 0 else sketch.const(np.asarray(which == 1))
        return sketch.op("If", on, then_branch=yes, else_branch=no)
    count, go, state = (sketch.name() for _ in range(3))
    inner = snippet(sketch, state)
    on = sketch.op("Identity", go)
    body = _graph(
        sketch.nodes,
        [(count, onnx.TensorProto.INT64), (go, onnx.TensorProto.BOOL), (state, kind)],
        [(on, onnx.TensorProto.BOOL), (inner, kind)],
    )
    sketch.nodes = outside
    trips = sketch.const(np.asarray(sketch.rng.choice([0, 1, 2, 3, 17]), np.int64))
    return sketch.op("Loop", trips, "", source, body=body)


def _graph(nodes: list[Any], inputs: list[Any], outputs: list[Any]) -> Any:
    def infos(pairs: list[Any]) -> list[Any]:
        scalars = (onnx.TensorProto.INT64, onnx.TensorProto.BOOL)
        return [
            helper.make_tensor_value_info(name, kind, [] if kind in scalars else None)
            for name, kind in pairs
        ]

    return helper.make_graph(list(nodes), "body", infos(inputs), infos(outputs))


def _finish(sketch: Sketch, last: str, dims: list[Any]) -> Any:
    """The model: with values inside as outputs too, or used once more."""
    rng = sketch.rng
    made = [name for node in sketch.nodes for name in node.output]
    ends = [last]
    if rng.random() < 0.3:
        ends.append(rng.choice(made))
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(sketch.dtype))
    inputs = [helper.make_tensor_value_info("x", kind, dims)]
    if any("flag" in node.input for node in sketch.nodes):
        inputs.append(helper.make_tensor_value_info("flag", onnx.TensorProto.BOOL, []))
    inputs += [helper.make_tensor_value_info(n, kind, list(a.shape)) for n, a in sketch.free]
    imports = [helper.make_opsetid("", sketch.opset)]

    def build(outputs: list[Any]) -> Any:
        graph = helper.make_graph(sketch.nodes, "g", inputs, outputs, sketch.initializers)
        return helper.make_model(graph, opset_imports=imports, ir_version=8)

    def types(outputs: list[Any]) -> Mapping[str, int]:
        inferred = onnx.shape_inference.infer_shapes(build(outputs)).graph
        found = (*inferred.value_info, *inferred.output)
        return {info.name: info.type.tensor_type.elem_type for info in found}

    if rng.random() < 0.25:
        floats = [name for name, found in types([]).items() if found == kind and name in made]
        if floats:
            ends.append(sketch.op("Sigmoid", rng.choice(floats)))
    known = types([onnx.ValueInfoProto(name=name) for name in dict.fromkeys(ends)])
    if any(not known.get(name) for name in ends):
        return None
    return build([helper.make_tensor_value_info(n, known[n], None) for n in dict.fromkeys(ends)])


def _inputs(dims: list[Any], dtype: Any, sketch: Sketch) -> Iterator[dict[str, Any]]:
    """Inputs of several sizes, where sizes are free."""
    free = any(isinstance(dim, str) for dim in dims)
    numbers = np.random.default_rng(sketch.rng.randrange(1 << 30))
    for n, s, flag in ((2, 3, True), (3, 5, False), (1, 1, True)) if free else ((2, 3, True),):
        shape = [{"n": n, "s": s}[dim] if isinstance(dim, str) else dim for dim in dims]
        given: dict[str, Any] = {"x": numbers.standard_normal(shape).astype(dtype)}
        given.update((name, array) for name, array in sketch.free)
        if any("flag" in node.input for node in sketch.nodes):
            given["flag"] = np.asarray(flag)
        yield given


class Pipeline:
    """Passes under a name, as they are run on every subject."""

    def __init__(self, name: str, passes: list[Any], target: Target | None = None) -> None:
        self.name, self.passes, self.target = name, passes, target

    def run(self, model: ir.Model) -> tuple[ir.Model, bool]:
        """The result, and whether anything was changed."""
        report = Report()
        context = Context(files.copy(model), target=self.target)
        result = PassManager(self.passes).run(context, report)
        return result, any(record.rewrites for record in report.passes)


def pipelines(only: str = "") -> list[Pipeline]:
    """Levels 2 and 3, the CPU target, and every exact pass by itself."""
    found = [
        Pipeline(f"O{level}", [p for text in PIPELINES[level] for p in parse_pipeline(text)])
        for level in (2, 3)
    ]
    host = Target.parse("cpu")
    legal = backends.get("onnxruntime").legalize(host)
    found.append(Pipeline("cpu", arranged(found[0].passes, legal), host))
    for name in pass_names():
        single = load_pass(name)
        if not single.lossy:
            found.append(Pipeline(name, [single]))
            if "target" in inspect.getsource(sys.modules[type(single).__module__]):
                found.append(Pipeline(f"{name} (cpu)", [single], host))
    return [p for p in found if only in ("", p.name)]


def check(subject: Subject, pipeline: Pipeline) -> str:
    """What is wrong with a pipeline's result on a subject; nothing where it is right."""
    try:
        result, changed = pipeline.run(subject.model)
    except InputError as error:  # a pass that works on samples
        return "" if "needs data" in str(error) else f"crashed: {error}"
    except Exception as error:  # noqa: BLE001 - whatever it is, it is what is looked for
        return f"crashed: {type(error).__name__}: {error}"
    if not changed:
        return ""
    return judge(subject, result) or _again(result, pipeline)


def _again(result: ir.Model, pipeline: Pipeline) -> str:
    once = files.to_proto(result).SerializeToString(deterministic=True)
    try:
        second, _ = pipeline.run(files.load(once))
    except Exception as error:  # noqa: BLE001
        return f"crashed the second time: {type(error).__name__}: {error}"
    twice = files.to_proto(second).SerializeToString(deterministic=True)
    return "" if once == twice else "a second run changes it"


def judge(subject: Subject, result: ir.Model) -> str:
    """Whether a result computes what the original does."""
    try:
        runner = Runner(files.load(files.to_proto(result)))
        for given, wanted in zip(subject.inputs, subject.wanted, strict=True):
            known = {name: value for name, value in given.items() if name in runner.inputs}
            found = runner.run(known)
            for name, value in wanted.items():
                reason = _differs(found.get(name), value, subject.jumps)
                if reason:
                    return f"wrong: {name}: {reason}"
    except GraphoptError as error:
        return f"does not run: {error}"
    return ""


def _differs(found: object, wanted: object, jumps: bool) -> str:
    if not isinstance(wanted, np.ndarray):
        pairs = list(itertools.zip_longest(_flat(found), _flat(wanted)))
        return "" if all(_close(one, other) for one, other in pairs) else "another value"
    if not isinstance(found, np.ndarray):
        return "no tensor any more"
    got, old = cast(ir.Array, found), cast(ir.Array, wanted)
    if (got.shape, got.dtype) != (old.shape, old.dtype):
        return f"{got.dtype} {got.shape}, was {old.dtype} {old.shape}"
    allowed = 0.05 if jumps else 0.0
    if old.dtype.kind != "f":
        share = np.count_nonzero(got != old) / max(1, old.size)
        return "" if share <= allowed else f"{share:.0%} of the elements differ"
    a, b = np.asarray(got, np.float64), np.asarray(old, np.float64)
    finite = np.isfinite(a) & np.isfinite(b)
    odd = ~finite & ~((a == b) | (np.isnan(a) & np.isnan(b)))
    scale = float(np.max(np.abs(b), initial=1.0, where=finite))
    error = np.subtract(a, b, where=finite, out=np.zeros(a.shape)) / scale
    apart = odd | (np.abs(error) > TOLERANCE[old.dtype.name])
    share = np.count_nonzero(apart) / max(1, apart.size)
    worst = float(np.max(np.abs(error), initial=0.0))
    return "" if share <= allowed else f"{share:.0%} of the elements differ, by up to {worst:.2g}"


def _flat(value: object) -> Iterator[object]:
    """The elements of sequences and maps in order."""
    if isinstance(value, dict):
        for key, item in cast("dict[object, object]", value).items():
            yield key
            yield from _flat(item)
    elif isinstance(value, list):
        for item in cast("list[object]", value):
            yield from _flat(item)
    else:
        yield value if isinstance(value, float) else str(value)


def _close(a: object, b: object) -> bool:
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, abs_tol=TOLERANCE["float32"]) or (a != a and b != b)
    return a == b


def subjects(arguments: argparse.Namespace) -> Iterator[Subject | None]:
    """The models to be run."""
    if arguments.models is None:
        for seed in range(arguments.seed, arguments.seed + arguments.count):
            yield compose(seed)
        return
    for path in sorted(Path(arguments.models).rglob("*.onnx")):
        model = files.load(path)
        try:
            given = [feeds.workable_feeds(model, Shapes(model))]
        except GraphoptError:
            continue
        yield Subject(f"{path.parent.name}/{path.name}", model, given)


def main() -> int:
    """Run and tell; 1 where anything is wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="a pass, O2, O3 or cpu")
    parser.add_argument("--models", help="a folder of model files instead of compositions")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    chosen = pipelines(arguments.only)
    start, ran, skipped, wrong = time.monotonic(), 0, 0, 0
    for subject in subjects(arguments):
        if subject is None or not subject.prepare():
            skipped += 1
            continue
        ran += 1
        for pipeline in chosen:
            problem = check(subject, pipeline)
            if problem:
                wrong += 1
                print(f"{subject.name}, {pipeline.name}: {problem[:300]}", flush=True)
    print(
        f"{ran} models through {len(chosen)} pipelines, {wrong} problems; "
        f"{skipped} do not run to begin with; {time.monotonic() - start:.0f} s"
    )
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
