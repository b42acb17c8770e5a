"""TVM's virtual machine around a compiled model. Needs neither onnx nor a compiler."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import tarfile
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt

from graphopt.artifact import Manifest, TensorInfo
from graphopt.backends import Array, OpTime, Output, Value, check_feeds, on_host, timed
from graphopt.errors import GraphoptError, InputError
from graphopt.target import cores

if TYPE_CHECKING:
    from graphopt.backends._tvm_options import Options

LIBRARY = "model.so"
OBJECTS = "model.tar"
"""In its place: what it is linked from."""
NOTES = "kernels.json"
"""What became of each kernel, and the ranges of inputs that are indices."""
ERRORS = (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError)
"""What TVM raises: Python's own classes, chosen by the text of the C++ error."""
_REASON_LENGTH = 300
_SHOWN = 4
"""Kernels that a remark names."""
_WARMUP = 3
_ALIGNMENT = 64
"""Bytes: where TVM's kernels expect tensors to begin."""
_SHARED = frozenset({"bool", "float16", "float32", "float64"}) | {
    f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)
}
"""The dtypes in which numpy and TVM see the same memory."""
_SPREAD = -1
"""TVM's code for worker threads that are bound to no core."""


def no_gpu() -> str | None:
    """Why nothing runs on a GPU here, or None."""
    from graphopt.backends import _tvm_cuda

    _import()
    return _tvm_cuda.missing_runtime()


def load(folder: Path, manifest: Manifest, options: Options) -> TvmExecutable:
    """The library of an artifact folder in a virtual machine.

    Raises:
        GraphoptError: TVM refuses the library.
    """
    if LIBRARY in manifest.files:
        return TvmExecutable(folder / LIBRARY, manifest, options)
    if OBJECTS not in manifest.files:
        raise InputError(f"{folder}: its manifest names neither {LIBRARY} nor {OBJECTS}")
    from graphopt.backends import _tvm_link

    with tempfile.TemporaryDirectory(prefix="graphopt-tvm-") as scratch:
        library = Path(scratch) / LIBRARY
        try:
            _tvm_link.link_packed(folder / OBJECTS, library)
        except (RuntimeError, OSError, tarfile.TarError) as error:
            raise GraphoptError(f"{folder / OBJECTS}: {last_line(error)}") from None
        shutil.copyfile(folder / NOTES, library.with_name(NOTES))
        return TvmExecutable(library, manifest, options)  # stays mapped without its file


def remarks(folder: Path) -> list[str]:
    """Kernels of an artifact, and of its parts, that run as plain loops, and why."""
    lines: list[str] = []
    for path in sorted(folder.rglob(NOTES)):
        notes = json.loads(path.read_bytes())
        plain = {**notes.get("untiled", {}), **notes.get("unscheduled", {})}
        some = [f"{kernel} ({reason})" for kernel, reason in plain.items()][:_SHOWN]
        if plain:
            more = "" if len(some) == len(plain) else f" and {len(plain) - len(some)} more"
            lines.append(
                "tvm runs kernels as plain loops, which may be many times slower: "
                f"{', '.join(some)}{more}; see {path.relative_to(folder)}"
            )
    return lines


class TvmExecutable:
    """A loaded library and the signature of its model; see `graphopt.backends.Executable`."""

    def __init__(self, path: Path, manifest: Manifest, options: Options) -> None:
        sizes = options.sizes()
        self.inputs = tuple(_bound(info, sizes) for info in manifest.inputs)
        self.outputs = tuple(_bound(info, sizes) for info in manifest.outputs)
        self._threads = options.threads or cores()
        tvm = _import(self._threads)
        self._tvm = tvm
        self._on_gpu = manifest.target.device == "cuda"
        self._device = tvm.cuda(0) if self._on_gpu else tvm.cpu()
        ranges = _ranges(path.with_name(NOTES))
        self._ranges = {i: ranges[x.name] for i, x in enumerate(self.inputs) if x.name in ranges}
        if self._on_gpu:
            from graphopt.backends import _tvm_cuda

            _tvm_cuda.accept()
        try:
            library = tvm.runtime.load_module(str(path))
            machine: Any = importlib.import_module("tvm.runtime.vm").VirtualMachine
            self._machine = machine(library, self._device)
            self._main = self._machine["main"]
        except ERRORS as error:
            raise GraphoptError(f"tvm: {last_line(error)}") from None

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Output]:
        """All outputs by name, as arrays of their own."""
        results = self._call(self._arguments(feeds))
        if len(results) != len(self.outputs):
            lists = f"{len(results)} outputs, its manifest lists {len(self.outputs)}"
            raise GraphoptError(f"tvm: the library has {lists}")
        return {
            info.name: _array(value, info)
            for info, value in zip(self.outputs, results, strict=True)
        }

    def call(self, values: Sequence[Value]) -> list[Value]:
        """As `run`, but in shared memory; what is on a GPU stays there."""
        self._prepare(values)
        given = zip(values, self.inputs, strict=True)
        results = self._call([self._shared(value, info) for value, info in given])
        if self._on_gpu:
            return results
        return [_view(value, info) for value, info in zip(results, self.outputs, strict=True)]

    def benchmark(self, feeds: Mapping[str, Array], runs: int) -> npt.NDArray[np.int64]:
        """Nanoseconds of each run; the collector of garbage waits meanwhile."""
        arguments = self._arguments(feeds)
        if not self._on_gpu:
            return timed(lambda: self._call(arguments), runs)

        def call() -> None:
            self._call(arguments)
            self._device.sync()  # a call there only starts kernels

        return timed(call, runs)

    def profile(self, feeds: Mapping[str, Array], runs: int = 10) -> tuple[OpTime, ...]:
        """Time per kernel, in the order in which they run; each call of one is a row of its own.

        The median of the runs: what interrupts one of them is no kernel's.
        """
        arguments = self._arguments(feeds)
        watch = _Stopwatch(self._device.sync if self._on_gpu else _unwatched)
        self._machine.set_instrument(watch)
        try:
            for _ in range(_WARMUP):
                self._call(arguments)
            watch.rows.clear()
            for _ in range(runs):
                watch.begin()
                self._call(arguments)
        finally:
            self._machine.set_instrument(_unwatched)
        device = str(self._device)
        return tuple(
            OpTime(name, kernel, device, calls=1, microseconds=float(np.median(spent)) / 1e3)
            for (name, kernel), spent in watch.rows.items()
        )

    def _arguments(self, feeds: Mapping[str, Array]) -> list[Any]:
        check_feeds(self.inputs, feeds)
        arrays = [np.asarray(feeds[info.name]) for info in self.inputs]
        self._prepare(arrays)
        return [self._tensor(array, info) for array, info in zip(arrays, self.inputs, strict=True)]

    def _prepare(self, values: Sequence[Value]) -> None:
        """Check what is an index, and set the number of threads."""
        for index, size in self._ranges.items():
            feed = on_host(values[index])
            if feed.size and not -size <= int(feed.min()) <= int(feed.max()) < size:
                name = self.inputs[index].name
                raise GraphoptError(f"input {name!r} has an index that is not below {size}")
        # threads are the process's, not the machine's: another executable may have asked for others
        _set_threads(self._threads)

    def _shared(self, value: Value, info: TensorInfo) -> Any:
        """A tensor in the memory of a value, or a copy where that does not do."""
        if not isinstance(value, np.ndarray):
            return value if self._on_gpu else self._tensor(on_host(value), info)
        array = cast("Array", value)
        flags = array.flags
        if self._on_gpu or info.dtype not in _SHARED or not array.size:
            return self._tensor(array, info)
        aligned = array.__array_interface__["data"][0] % _ALIGNMENT == 0
        if not (aligned and flags.c_contiguous and flags.writeable and flags.aligned):
            return self._tensor(array, info)
        return self._tvm.runtime.from_dlpack(array)

    def _tensor(self, array: Array, info: TensorInfo) -> Any:
        """A copy of an array."""
        if self._on_gpu or info.dtype not in _SHARED or not array.size:
            return self._tvm.runtime.tensor(np.asarray(array, order="C"), self._device)
        space = np.empty(array.nbytes + _ALIGNMENT, np.uint8)
        start = -int(space.__array_interface__["data"][0]) % _ALIGNMENT
        copy = space[start : start + array.nbytes].view(info.dtype).reshape(array.shape)
        copy[...] = array
        return self._tvm.runtime.from_dlpack(copy)

    def _call(self, arguments: list[Any]) -> list[Any]:
        try:
            result = self._main(*arguments)
        except ERRORS as error:
            raise GraphoptError(f"tvm: {last_line(error)}") from None
        if hasattr(result, "numpy"):
            return [result]
        return [result[index] for index in range(len(result))]


class _Stopwatch:
    """An instrument of the virtual machine that times each call of a kernel."""

    def __init__(self, finish: Callable[[], object]) -> None:
        self.rows: dict[tuple[str, str], list[int]] = {}
        self._finish = finish
        """Waits for what a call started."""
        self._calls: dict[str, int] = {}
        self._start = 0

    def begin(self) -> None:
        """A new run of the model."""
        self._calls.clear()

    def __call__(self, function: Any, name: str, before: bool, result: Any, *rest: Any) -> None:
        self._finish()
        now = time.perf_counter_ns()
        if before:
            self._start = time.perf_counter_ns()
            return
        if name.startswith("vm."):
            return
        count = self._calls.get(name, 0)
        self._calls[name] = count + 1
        key = (f"{name}#{count}" if count else name, name)
        self.rows.setdefault(key, []).append(now - self._start)


def _view(value: Any, info: TensorInfo) -> Array:
    """An array in the memory of a tensor, or a copy where numpy has no such dtype."""
    if info.dtype not in _SHARED:
        found: Array = value.numpy()
        return found
    return np.from_dlpack(value)


def _array(value: Any, info: TensorInfo) -> Array:
    """A copy of a tensor."""
    if value.device.type != "cpu":
        found: Array = value.numpy()
        return found
    return _view(value, info).copy()


def _ranges(path: Path) -> dict[str, int]:
    """Sizes that the indices in inputs have to stay below."""
    try:
        found = json.loads(path.read_bytes()).get("ranges", {})
        return {str(name): int(size) for name, size in found.items()}
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"{path}: not what graphopt wrote ({error})") from None


def _unwatched(*_: object) -> None:
    """The instrument of a machine that is not being profiled: one cannot be taken out again."""


def _bound(info: TensorInfo, sizes: Mapping[str, int]) -> TensorInfo:
    """An input or output with the sizes that it was compiled for."""
    if info.shape is None:
        return info
    shape = tuple(sizes.get(dim, dim) if isinstance(dim, str) else dim for dim in info.shape)
    return TensorInfo(info.name, info.dtype, shape)


def _import(threads: int = 0) -> Any:
    """TVM, which reads its number of threads once, when it is first used."""
    os.environ.setdefault("TVM_NUM_THREADS", str(threads or cores()))
    return importlib.import_module("tvm")


@cache
def _configure() -> Any:
    return _import().get_global_func("runtime.config_threadpool")


def _set_threads(threads: int) -> None:
    _configure()(_SPREAD, threads)


def last_line(error: Exception) -> str:
    """Of an error of TVM's: what comes after the trace of C++ and Python that it holds."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    lines = [line for line in lines if not line.startswith(("File ", "Traceback", "^", "(..."))]
    checks = [line for line in lines if "Check failed" in line]  # before a program that it shows
    return (checks or lines or [type(error).__name__])[-1][:_REASON_LENGTH]
