"""`measure`: size, latency, memory and accuracy of one or several models, side by side."""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from graphopt import artifact, backends, compilation
from graphopt.accuracy import Metric, fixed_batch, predict, take, top1, worst_difference
from graphopt.backends import Array, Backend, Executable, OpTime, Output
from graphopt.errors import GraphoptError, InputError, MissingError
from graphopt.machine import Machine, ProcessCost, process_cost
from graphopt.rpc import Remote
from graphopt.target import Target
from graphopt.timing import Latency, Plan, Progress, Ratio, Samples, benchmark, ratio, silent
from graphopt.worker import Worker

if TYPE_CHECKING:
    from graphopt.files import ModelLike


@dataclass(frozen=True)
class OpShare:
    """All nodes of one operator in a profile."""

    op: str
    nodes: int
    microseconds: float
    """Per run of the model, mean."""
    share: float
    """Of the time of all nodes, 0 to 1."""


@dataclass(frozen=True)
class Measured:
    """One model's figures; None where one was not asked for or cannot be had."""

    name: str
    backend: str
    nodes: int | None
    """Constants apart, subgraphs and functions included; None for a compiled model."""
    bytes: int
    """Of the model file with its external data, or of the compiled files."""
    latency: Latency | None
    ratio: Ratio | None
    """Of the median latency to the first model's; None for the first."""
    process: ProcessCost | None
    accuracy: float | None
    worst_difference: float | None
    """Largest absolute difference of any output from the first model's; None for the first."""
    ops: tuple[OpTime, ...]
    """Per node, in order of execution; empty where not asked for."""
    op_types: tuple[OpShare, ...]
    """Per operator, the largest share first."""


@dataclass(frozen=True)
class Measurement:
    """The figures of all models and what they were taken on."""

    models: tuple[Measured, ...]
    machine: Machine
    target: str
    backend: str
    versions: Mapping[str, str]
    options: Mapping[str, Any]
    """Of the backend, threads among them."""
    plan: Plan
    feeds: tuple[str, ...]
    """Name, dtype and shape of what the latency was measured on."""
    data: str
    """Where that came from: `given`, or `random, seed 0`."""
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain data; what is not finite becomes None so that its JSON is standard."""
        text = json.dumps(dataclasses.asdict(self))
        plain: dict[str, Any] = json.loads(text, parse_constant=lambda name: None)
        return plain

    def to_json(self) -> str:
        """Standard JSON, two-space indented."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False)


@dataclass(frozen=True)
class _Ready:
    """A model compiled and loaded."""

    name: str
    folder: Path
    executable: Executable
    backend: str
    nodes: int | None
    bytes: int


def measure(
    models: ModelLike | Mapping[str, ModelLike],
    feeds: Mapping[str, Array] | None = None,
    labels: Array | None = None,
    *,
    metric: Metric | None = None,
    target: str | Target = "cpu",
    backend: str | Sequence[str] | None = None,
    options: Mapping[str, Any] | None = None,
    plan: Plan | None = None,
    latency: bool = True,
    process: bool = True,
    per_op: bool = False,
    seed: int = 0,
    bindings: Mapping[str, int] | None = None,
    trust: bool = False,
    device: str | None = None,
    progress: Progress | None = None,
) -> Measurement:
    """Measure models as they are: nothing is optimized before.

    Args:
        models: one model, or several by name to compare with the first. A path may also be that of
            an artifact folder, whose own target and options then hold.
        feeds: arrays by input name, for all models; random ones where not given. Together with
            labels they are a set of samples: each figure of accuracy is over all of them, and the
            latency is that of the first sample, or of the first batch where the model's is fixed.
        labels: one per sample.
        metric: accuracy from outputs and labels; `top1` where not given.
        target: what to compile for; this machine has to be able to run it.
        backend: a name of `graphopt.backends.names()`; None takes the first that can. With several
            each model is measured with each of them, in processes of their own; one that cannot
            take a model is left out, with a note.
        options: of backends by name; one is an option of all backends that have it.
        plan: how long to measure.
        latency: take the latency, the models interleaved.
        process: take load time and peak memory, in a process of its own for each model.
        per_op: take the time of each node.
        seed: of random feeds and of the bootstrap.
        bindings: sizes of symbolic dimensions for random feeds; batches are 1 where not given.
        trust: permit machine code out of artifact folders.
        device: `HOST:PORT` of a `graphopt serve-rpc`, where the models run; times are by its clock,
            and there is no load time or memory.
        progress: called with the fraction done and what is being done.

    Raises:
        InputError: models, feeds, labels or options that do not fit.
        MissingError: the target cannot be compiled for or run here.
        GraphoptError: a model cannot be compiled or run.
    """
    tell = progress or silent
    process = process and device is None
    wanted = _Wanted(plan or Plan(), latency, process, per_op, seed, metric or top1, trust)
    machine, notes = Machine.here(), list[str]()
    aim = Target.parse(target)
    names = [backend] if backend is None or isinstance(backend, str) else list(backend)
    chosen = [compilation.choose(aim, name) for name in names]
    settings = _settings(chosen, options or {})
    for each in chosen:
        reason = each.can_run(aim) if device is None else None
        if reason is not None:
            raise MissingError(f"{each.name} cannot run {aim.name} here: {reason}")
    with tempfile.TemporaryDirectory(prefix="graphopt-measure-") as temporary, ExitStack() as stack:
        ready: list[_Ready] = []
        for name, model in _named(models).items():
            for each in chosen:
                tell(0.0, f"loading {name}")
                place = Path(temporary) / str(len(ready))
                try:
                    some = settings[each.name]
                    made = _prepare(name, model, place, aim, each.name, some, trust, device)
                except GraphoptError as error:
                    if len(chosen) == 1:
                        raise
                    notes.append(f"{name} with {each.name}: {error}")
                    continue
                if len(chosen) > 1:
                    title = f"{name} {each.name}" if len(_named(models)) > 1 else each.name
                    made = dataclasses.replace(made, name=title)
                    if device is None:
                        worker = stack.enter_context(Worker(made.folder, trust=True))
                        made = dataclasses.replace(made, executable=worker)
                ready.append(made)
        if not ready:
            raise GraphoptError("; ".join(notes))
        given = feeds
        if given is None:
            given = _random(next(iter(_named(models).values())), ready[0], seed, bindings or {})
        single = given
        if labels is not None:
            if not len(labels):
                raise InputError("there are no labels to compare with")
            batch = fixed_batch(ready[0].executable, given, len(labels)) or 1
            single = take(given, len(labels), 0, batch)
        rows = _rows(ready, given, single, labels, wanted, tell)
    if device is not None:
        notes.append(f"run at {device}: the processor named above is not its")
    if machine.busy:
        notes.append(f"the machine was busy (load {machine.load_average:.1f}): times are uncertain")
    return Measurement(
        models=rows,
        machine=machine,
        target=aim.name,
        backend=", ".join(each.name for each in chosen),
        versions={name: v for each in chosen for name, v in each.versions().items()},
        options=settings[chosen[0].name],
        plan=wanted.plan,
        feeds=tuple(_describe(name, value) for name, value in single.items()),
        data=f"random, seed {seed}" if feeds is None else "given",
        notes=tuple(notes),
    )


@dataclass(frozen=True)
class _Wanted:
    plan: Plan
    latency: bool
    process: bool
    per_op: bool
    seed: int
    metric: Metric
    trust: bool


def _rows(
    ready: list[_Ready],
    feeds: Mapping[str, Array],
    single: Mapping[str, Array],
    labels: Array | None,
    wanted: _Wanted,
    tell: Progress,
) -> tuple[Measured, ...]:
    for each in ready:
        try:
            backends.check_feeds(each.executable.inputs, single)
        except InputError as error:
            raise InputError(f"{each.name}: {error}") from None
    costs: list[ProcessCost | None] = [None] * len(ready)
    if wanted.process:
        tell(0.0, "load time and memory")
        costs = [process_cost(each.folder, single, trust=wanted.trust) for each in ready]
    timed: list[Samples] = []
    if wanted.latency:
        executables = [each.executable for each in ready]
        timed = benchmark(executables, [single] * len(ready), wanted.plan, tell)
    tell(1.0, "outputs")
    outputs: list[Mapping[str, Output]] = [
        each.executable.run(feeds)
        if labels is None
        else predict(each.executable, feeds, len(labels))
        for each in ready
    ]
    profiles = [each.executable.profile(single) if wanted.per_op else () for each in ready]
    return tuple(
        Measured(
            name=each.name,
            backend=each.backend,
            nodes=each.nodes,
            bytes=each.bytes,
            latency=Latency.of(timed[i].nanoseconds) if timed else None,
            ratio=ratio(timed[0], timed[i], wanted.plan, seed=wanted.seed) if timed and i else None,
            process=costs[i],
            accuracy=None if labels is None else wanted.metric(outputs[i], labels),
            worst_difference=worst_difference(outputs[0], outputs[i]) if i else None,
            ops=profiles[i],
            op_types=_by_type(profiles[i]),
        )
        for i, each in enumerate(ready)
    )


def _by_type(ops: tuple[OpTime, ...]) -> tuple[OpShare, ...]:
    groups: dict[str, list[float]] = {}
    for each in ops:
        groups.setdefault(each.op, []).append(each.microseconds)
    total = sum(each.microseconds for each in ops) or 1.0
    shares = [OpShare(op, len(t), sum(t), sum(t) / total) for op, t in groups.items()]
    return tuple(sorted(shares, key=lambda share: -share.microseconds))


def _named(models: ModelLike | Mapping[str, ModelLike]) -> dict[str, ModelLike]:
    if isinstance(models, Mapping):
        if not models:
            raise InputError("there is no model to measure")
        return dict(models)
    return {Path(models).name if isinstance(models, str | os.PathLike) else "model": models}


def _prepare(
    name: str,
    model: ModelLike,
    place: Path,
    target: Target,
    backend: str,
    options: Mapping[str, Any],
    trust: bool,
    device: str | None,
) -> _Ready:
    """Compile a model into `place`, or take the artifact that it is, and load it."""
    if isinstance(model, str | os.PathLike) and Path(model).is_dir():
        folder = Path(model)
        made_with = artifact.read(folder).backend
        ready = Remote(folder, device) if device else compilation.load(folder, trust=trust)
        return _Ready(name, folder, ready, made_with, None, _size(folder))
    from graphopt import files
    from graphopt.report import Stats

    loaded = files.load(model)
    compilation.compile(loaded, target, place, backend=backend, options=options, level=0)
    size = _size(place)
    compiled = artifact.present(place)
    if isinstance(model, str | os.PathLike) and compiled == ["model.onnx"]:
        size = Path(model).stat().st_size
    # this process compiled it: what it may run needs no further trust
    executable = Remote(place, device) if device else compilation.load(place, trust=True)
    return _Ready(name, place, executable, backend, Stats.of(loaded).nodes, size)


def _settings(chosen: Sequence[Backend], options: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """All options of each backend. InputError for one that none of them has."""
    settings: dict[str, dict[str, Any]] = {}
    for backend in chosen:
        known = backends.describe_options(backend)
        own = {name: value for name, value in options.items() if name in known or len(chosen) == 1}
        settings[backend.name] = dataclasses.asdict(backends.make_options(backend, own))
    for name in options:
        if not any(name in own for own in settings.values()):
            raise InputError(f"no backend has an option {name!r}")
    return settings


def _size(folder: Path) -> int:
    """Bytes of an artifact's files and of its parts', the manifest and its signature apart."""
    return sum((folder / name).stat().st_size for name in artifact.present(folder))


def _check_bindings(bindings: Mapping[str, int], names: set[str]) -> None:
    for name in bindings:
        if name not in names:
            there = f"there are {', '.join(sorted(names))}" if names else "all are fixed"
            raise InputError(f"no dimension of an input is named {name!r}; {there}")


def _random(
    model: ModelLike, ready: _Ready, seed: int, bindings: Mapping[str, int]
) -> dict[str, Array]:
    """Random feeds for a model, of batch 1 where that is free.

    For an artifact, of which only the signature is known, plain ones: normal floats, and ones for
    everything else, which is a valid index, mask and length.
    """
    if ready.nodes is not None:
        from graphopt import files
        from graphopt.feeds import single_feeds
        from graphopt.shapes import Shapes

        loaded = files.load(model)
        shapes = Shapes(loaded)
        every = (dim for value in loaded.graph.inputs for dim in shapes.shape(value) or ())
        _check_bindings(bindings, {str(dim) for dim in every if not isinstance(dim, int)})
        return single_feeds(loaded, shapes, ready.executable.run, seed=seed, bindings=bindings)
    rng = np.random.default_rng(seed)
    made: dict[str, Array] = {}
    free = (dim for info in ready.executable.inputs for dim in info.shape or ())
    _check_bindings(bindings, {dim for dim in free if not isinstance(dim, int)})
    for info in ready.executable.inputs:
        if info.shape is None or info.dtype == "?" or "(" in info.dtype:
            raise InputError(f"{ready.name}: no random data for input {info}: give inputs")
        shape = tuple(d if isinstance(d, int) else bindings.get(d, 1) for d in info.shape)
        if info.dtype in ("float16", "float32", "float64"):
            made[info.name] = rng.standard_normal(shape).astype(info.dtype)
        else:
            made[info.name] = np.ones(shape, "U1" if info.dtype == "string" else info.dtype)
    return made


def _describe(name: str, value: Any) -> str:
    if not isinstance(value, np.ndarray):
        return f"{name} {type(value).__name__}"
    array = cast("Array", value)
    return f"{name} {array.dtype} {list(array.shape)}"
