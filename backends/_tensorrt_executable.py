"""An engine on the GPU. Inputs and outputs stay there while it is timed."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from graphopt.artifact import Manifest, TensorInfo
from graphopt.backends import (
    Array,
    OpTime,
    Output,
    Value,
    check_feeds,
    numpy_dtype,
    on_host,
    series,
)
from graphopt.backends._cuda_driver import Event, HostMemory, Memory, Stream, activate
from graphopt.backends._tensorrt_library import derive, library, log
from graphopt.errors import GraphoptError, InputError

_WARMUP = 5


class TensorrtExecutable:
    """An engine, ready to run; see `graphopt.backends.Executable`."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.inputs: tuple[TensorInfo, ...] = manifest.inputs
        self.outputs: tuple[TensorInfo, ...] = manifest.outputs
        activate()
        trt = library()
        self._runtime = trt.Runtime(log().logger)  # host code in engines stays disallowed
        log().take()
        self._engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
        self._context = None if self._engine is None else self._engine.create_execution_context()
        if self._context is None:
            reasons = log().take() or ["it does not say why"]
            raise GraphoptError(f"{path}: TensorRT does not load the engine: {reasons[0]}")
        self._stream = Stream()

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Output]:
        """All outputs by name."""
        bound = _Bound(self, feeds, self._context)
        bound.enqueue()
        self._stream.wait()
        return {info.name: bound.output(info) for info in self.outputs}

    def call(self, values: Sequence[Value]) -> list[Value]:
        """As `run`: by way of this machine's memory."""
        names = (info.name for info in self.inputs)
        return [*self.run(dict(zip(names, map(on_host, values), strict=True))).values()]

    def benchmark(self, feeds: Mapping[str, Array], runs: int) -> npt.NDArray[np.int64]:
        """Nanoseconds per run between two events on the device; copies are not in them."""
        bound = _Bound(self, feeds, self._context)
        first, last = Event(), Event()

        def once() -> int:
            first.record(self._stream)
            bound.enqueue()
            last.record(self._stream)
            return last.nanoseconds_since(first)

        return series(once, runs)

    def profile(self, feeds: Mapping[str, Array], runs: int = 10) -> tuple[OpTime, ...]:
        """From the library's own profiler; a layer may stand for several nodes.

        In a context of its own: a profiler cannot be taken out of one.
        """
        times: dict[str, list[float]] = {}

        def report(_: object, layer_name: str, ms: float) -> None:
            times.setdefault(layer_name, []).append(ms * 1e3)

        context: Any = self._engine.create_execution_context()
        bound = _Bound(self, feeds, context)
        for _ in range(_WARMUP):
            bound.enqueue()
        self._stream.wait()
        context.profiler = derive(library().IProfiler, report_layer_time=report)
        for _ in range(runs):
            bound.enqueue()
            self._stream.wait()
        return tuple(
            OpTime(name, name.partition(" ")[0], "TensorRT", len(each) / runs, sum(each) / runs)
            for name, each in times.items()
        )

    @property
    def engine(self) -> Any:
        """TensorRT's engine."""
        return self._engine

    @property
    def stream(self) -> Stream:
        """The stream that everything runs in."""
        return self._stream


class _Bound:
    """Feeds where the engine wants them, and room for the outputs."""

    def __init__(
        self, executable: TensorrtExecutable, feeds: Mapping[str, Array], context: Any
    ) -> None:
        check_feeds(executable.inputs, feeds)
        activate()  # in this thread, which may be another one than loaded the engine
        self._context, self._engine = context, executable.engine
        self._stream = executable.stream
        self._held: dict[str, Memory | HostMemory] = {}
        for info in executable.inputs:
            array = np.asarray(feeds[info.name], order="C")
            if not self._context.set_input_shape(info.name, array.shape):
                reason = (log().take() or ["it is out of the ranges that it was built for"])[0]
                raise InputError(f"input {info.name!r} of {list(array.shape)}: {reason}")
            memory = self._memory(info.name, array.nbytes)
            memory.write(array.ctypes.data, array.nbytes)
            self._context.set_tensor_address(info.name, memory.address)
            self._held[info.name] = memory
        self._rooms: dict[str, _Room] = {}
        self._allocators: list[Any] = []  # TensorRT does not keep them alive
        for info in executable.outputs:
            shape = tuple(self._context.get_tensor_shape(info.name))
            if min(shape, default=0) >= 0:
                memory = self._memory(info.name, int(np.prod(shape)) * numpy_dtype(info).itemsize)
                self._context.set_tensor_address(info.name, memory.address)
                self._held[info.name] = memory
            else:
                self._rooms[info.name] = _Room()
                self._allocators.append(self._rooms[info.name].allocator())
                self._context.set_output_allocator(info.name, self._allocators[-1])

    def _memory(self, name: str, size: int) -> Memory | HostMemory:
        """Of a tensor: on the GPU, but for what shapes are computed from."""
        on_host = self._engine.get_tensor_location(name) == library().TensorLocation.HOST
        return HostMemory(size) if on_host else Memory(size)

    def enqueue(self) -> None:
        """Put a run into the stream."""
        log().take()
        if not self._context.execute_async_v3(self._stream.handle):
            reasons = log().take() or ["it does not say why"]
            raise GraphoptError(f"TensorRT: the run failed: {reasons[0]}")

    def output(self, info: TensorInfo) -> Array:
        """What the last run left in an output."""
        room = self._rooms.get(info.name)
        memory: Memory | HostMemory | None
        if room is None:
            shape, memory = tuple(self._context.get_tensor_shape(info.name)), self._held[info.name]
        else:
            shape, memory = room.shape, room.memory
        found: Array = np.empty(shape, numpy_dtype(info))
        if memory is not None:
            memory.read(found.ctypes.data, found.nbytes)
        return found


class _Room:
    """Memory of an output whose size is known only once it is computed."""

    def __init__(self) -> None:
        self.memory: Memory | None = None
        self.shape: tuple[int, ...] = ()

    def grow(self, size: int) -> int:
        """The address of so many bytes."""
        if self.memory is None or self.memory.size < size:
            self.memory = Memory(size)
        return self.memory.address

    def allocator(self) -> Any:
        """What TensorRT asks for the memory and tells the shape.

        It does not keep the memory: its class is freed late, by the collector of garbage.
        """
        room = weakref.ref(self)

        def reallocate(
            _: object, tensor_name: str, memory: int, size: int, alignment: int, stream: int = 0
        ) -> int:
            found = room()
            return 0 if found is None else found.grow(size)

        def notify(_: object, tensor_name: str, shape: Any) -> None:
            found = room()
            if found is not None:
                found.shape = tuple(shape)

        return derive(
            library().IOutputAllocator,
            reallocate_output=reallocate,
            reallocate_output_async=reallocate,
            notify_shape=notify,
        )
