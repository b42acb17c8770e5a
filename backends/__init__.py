"""Backends: each module of this package turns models into something that a device runs.

A backend is the object `BACKEND` of its module and bears the module's name: there is nothing to
register. What it needs of the model beforehand it returns as passes (`legalize`), so that the one
pass manager runs, records and verifies them; `compile` then only translates.

Importing this package, and loading and running an artifact, needs neither onnx nor onnx-ir.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import time
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

import numpy as np

from graphopt.artifact import Manifest, TensorInfo
from graphopt.collector import paused_gc
from graphopt.errors import GraphoptError, InputError
from graphopt.target import Target

if TYPE_CHECKING:
    import numpy.typing as npt

    from graphopt import ir
    from graphopt.pass_manager import Pass

Array = np.ndarray[Any, np.dtype[Any]]
Output = Array | list[Any] | None
"""What an output may be: a tensor, a sequence (of arrays, or of dicts for maps), or nothing."""
Value = Any
"""What parts of a model hand on: an `Output`, or what a runtime has in its place elsewhere."""

_ALIASES = {"ort": "onnxruntime"}


@dataclass(frozen=True)
class OpTime:
    """Time that one node of the compiled graph took, over all runs of a profile."""

    node: str
    op: str
    device: str
    """What ran it, as the backend names it: `CPUExecutionProvider` …"""
    calls: float
    """Executions per run of the model: more than one inside loops."""
    microseconds: float
    """Per run of the model, mean."""


class NodeError(GraphoptError):
    """Nodes that a backend turns out not to take while it compiles: they can still fall back."""

    def __init__(self, backend: str, nodes: Mapping[str, str], hint: str = "") -> None:
        first = [f"node {label}: {why}" for label, why in list(nodes.items())[:3]]
        more = [f"and {len(nodes) - 3} more"] if len(nodes) > 3 else []
        super().__init__(f"{backend} does not take the model: {'; '.join([*first, *more])}{hint}")
        self.nodes = dict(nodes)
        """Reasons by label."""


@dataclass(frozen=True)
class BackendOptions:
    """What every backend's options answer, whatever fields a subclass gives them."""

    def ranges(self) -> str:
        """The ranges of input sizes that code is built for, in the form of `graphopt.profiles`."""
        return ""

    def sizes(self) -> dict[str, int]:
        """The free dimensions that code is built for, by name."""
        return {}

    def for_fallback(self) -> dict[str, Any]:
        """Options of the backend that runs the nodes which this one leaves."""
        return {}

    def for_piece(self, ranges: str, dims: Collection[str]) -> Self:
        """The options for a part of the model, with its own ranges and free dimensions."""
        return self


class Executable(Protocol):
    """A compiled model, loaded and ready to run on this machine."""

    @property
    def inputs(self) -> tuple[TensorInfo, ...]: ...

    @property
    def outputs(self) -> tuple[TensorInfo, ...]: ...

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Output]:
        """All outputs by name.

        Raises:
            InputError: feeds that do not fit the inputs, see `check_feeds`.
            GraphoptError: the run failed; one line with the runtime's reason.
        """
        ...

    def benchmark(self, feeds: Mapping[str, Array], runs: int) -> npt.NDArray[np.int64]:
        """Nanoseconds of each of `runs` runs, without checks or conversions; raises as `run`."""
        ...

    def profile(self, feeds: Mapping[str, Array], runs: int = 10) -> tuple[OpTime, ...]:
        """Time per node over `runs` runs after a warm-up, in order of execution."""
        ...


class Part(Executable, Protocol):
    """An executable that may be a part of one: its neighbours know what fits."""

    def call(self, values: Sequence[Value]) -> list[Value]:
        """All outputs in order, from all inputs in order.

        Neither is copied unless the runtime has to; so nobody may write to them, and an output
        may be an input, or a constant of the model.

        Raises:
            GraphoptError: the run failed; one line with the runtime's reason.
        """
        ...


class Backend(Protocol):
    """A way to compile and to run. Its methods never touch the model that they are given."""

    @property
    def name(self) -> str: ...

    @property
    def options(self) -> type[BackendOptions]:
        """A frozen dataclass whose fields, with their defaults, are the backend's options."""
        ...

    @property
    def native_code(self) -> bool:
        """True where loading an artifact executes machine code out of it."""
        ...

    def is_available(self) -> str | None:
        """None, or why the backend cannot be used here and how to get it."""
        ...

    def versions(self) -> dict[str, str]:
        """Versions of the tools behind it by name; they go into the manifest."""
        ...

    def can_compile(self, target: Target) -> str | None:
        """None, or why it cannot compile for a target here. Other targets than this machine may."""
        ...

    def can_run(self, target: Target) -> str | None:
        """None, or why this machine cannot run what is compiled for a target."""
        ...

    def supports(self, model: ir.Model, target: Target, options: Any = None) -> dict[str, str]:
        """The nodes it cannot take, by label, each with the reason; empty when it takes all.

        Options, without which the defaults hold, may make a difference: sizes that they set.
        """
        ...

    def legalize(self, target: Target) -> tuple[Pass, ...]:
        """The passes a model has to go through before `compile`."""
        ...

    def compile(self, model: ir.Model, target: Target, options: Any, folder: Path) -> None:
        """Write the native files of a model into an empty folder.

        Raises:
            MissingError: a target that it cannot compile for here.
            NodeError: nodes that it cannot take, where it can name them.
            GraphoptError: it cannot take the model.
        """
        ...

    def remarks(self, folder: Path) -> list[str]:
        """What of an artifact is slower than it should be, a line each."""
        ...

    def load(self, folder: Path, manifest: Manifest) -> Part:
        """Load what `compile` wrote; the files are those that the manifest vouches for.

        Raises:
            MissingError: this machine cannot run the artifact's target.
            GraphoptError: the runtime refused the files.
        """
        ...


def names() -> tuple[str, ...]:
    """Every backend there is, usable here or not: the modules of this package."""
    import pkgutil  # not needed to load and run

    modules = pkgutil.iter_modules(__path__)
    return tuple(sorted(m.name for m in modules if not m.name.startswith("_")))


def get(name: str) -> Backend:
    """The backend of a name (`ort` is short for `onnxruntime`); InputError lists the names."""
    module = _ALIASES.get(name, name)
    public = module.isidentifier() and not module.startswith("_")
    if not public or importlib.util.find_spec(f"{__name__}.{module}") is None:
        raise InputError(f"unknown backend {name!r}; there are {', '.join(names())}")
    backend: Backend = importlib.import_module(f"{__name__}.{module}").BACKEND
    return backend


def make_options(backend: Backend, values: Mapping[str, Any]) -> Any:
    """The backend's options with some set, as text (from a command line) or as their own types.

    Raises:
        InputError: an option that the backend does not have, or a value of another type.
    """
    hints = typing.get_type_hints(backend.options)
    for name in values:
        if name not in hints:
            known = ", ".join(hints) or "none"
            raise InputError(f"{backend.name} has no option {name!r}; it has {known}")
    return backend.options(
        **{name: _convert(name, value, hints[name]) for name, value in values.items()}
    )


def describe_options(backend: Backend) -> dict[str, Any]:
    """The backend's options by name with their defaults."""
    return {field.name: field.default for field in dataclasses.fields(backend.options)}


def check_feeds(inputs: tuple[TensorInfo, ...], feeds: Mapping[str, Array]) -> None:
    """Raise InputError unless there is an array of the right dtype and shape for every input."""
    known = {info.name for info in inputs}
    for name in feeds:
        if name not in known:
            raise InputError(f"no input is named {name!r}; there are {', '.join(sorted(known))}")
    for info in inputs:
        if info.name not in feeds:
            raise InputError(f"input {info.name!r} is missing: it takes {info.kind}")
        if info.dtype == "?" or "(" in info.dtype:
            continue  # sequences, maps and optionals are checked by the runtime
        feed = np.asarray(feeds[info.name])
        dtype = _dtype_name(feed.dtype)
        if dtype != info.dtype:
            raise InputError(f"input {info.name!r} takes {info.dtype}, got {dtype}")
        if info.shape is not None and not _fits(feed.shape, info.shape):
            raise InputError(f"input {info.name!r} takes {info.kind}, got {list(feed.shape)}")


@lru_cache(64)
def _dtype_name(dtype: np.dtype[Any]) -> str:
    """As `TensorInfo` has it; numpy makes it anew each time."""
    return "string" if dtype.kind in "OSUT" else dtype.name


def on_host(value: Value) -> Any:
    """An array in place of what a runtime has on another device; what is no tensor as it is."""
    return value.numpy() if hasattr(value, "numpy") else value


def numpy_dtype(info: TensorInfo) -> np.dtype[Any]:
    """Of a tensor of numbers, also where only ml_dtypes has it."""
    try:
        return np.dtype(info.dtype)
    except TypeError:
        found: np.dtype[Any] = np.dtype(getattr(importlib.import_module("ml_dtypes"), info.dtype))
        return found


def timed(call: Callable[[], object], runs: int) -> npt.NDArray[np.int64]:
    """Nanoseconds of each of `runs` calls, with the garbage collector held off."""
    clock = time.perf_counter_ns

    def once() -> int:
        start = clock()
        call()
        return clock() - start

    return series(once, runs)


def series(once: Callable[[], int], runs: int) -> npt.NDArray[np.int64]:
    """What `once` says that it took, `runs` times, with the garbage collector held off."""
    times = np.empty(runs, np.int64)
    with paused_gc():
        for index in range(runs):
            times[index] = once()
    return times


def _fits(shape: tuple[int, ...], wanted: tuple[int | str, ...]) -> bool:
    return shape == wanted or (
        len(shape) == len(wanted)
        and all(isinstance(w, str) or s == w for s, w in zip(shape, wanted, strict=True))
    )


def _convert(name: str, value: Any, kind: Any) -> Any:
    choices = typing.get_args(kind) if typing.get_origin(kind) is typing.Literal else ()
    if choices:
        if value not in choices:
            raise InputError(f"option {name!r} is one of {', '.join(choices)}, not {value!r}")
        return value
    if isinstance(value, str):
        text = value.strip().lower()
        if kind is bool and text in ("true", "false", "1", "0", "on", "off", "yes", "no"):
            return text in ("true", "1", "on", "yes")
        if kind is int and text.lstrip("-").isdecimal():
            return int(text)
    if type(value) is kind:
        return value
    raise InputError(f"option {name!r} is {kind.__name__}, not {value!r}")
