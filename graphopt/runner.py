"""ONNX Runtime on the CPU, below the passes: the one place that turns a model into numbers.

`Runner` runs a whole model, `session` and the conversions beside it are what `graphopt.execute`
builds on. Nothing is printed: ONNX Runtime's own log is off, its exceptions become one line.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import threading
from collections.abc import Generator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx

from graphopt import files, ir
from graphopt.errors import GraphoptError, InputError, TimeLimitError
from graphopt.ir import Array

__all__ = [
    "BATCH_SECONDS",
    "NUMPY_TYPES",
    "RUN_SECONDS",
    "Runner",
    "from_ort",
    "memory_guard",
    "one_line",
    "onnxruntime",
    "run_session",
    "session",
    "to_ort",
]

_INLINE_BYTES = 1 << 14  # smaller weights travel in the protobuf: kernels look at their values
_COPY_BYTES = 1 << 30  # weights beyond this are fed at each run, since a session would copy them


def onnxruntime() -> Any:
    """The onnxruntime module, loaded on first use; it has no type information."""
    return import_module("onnxruntime")


def one_line(error: Exception) -> str:
    """ONNX Runtime's message without its code, source file and line breaks."""
    text = " ".join(str(error).split())
    text = re.sub(r"/onnxruntime_src/\S+ .*? was false\. (?=\S)", "", text)
    text = text.split(" Status Message: ")[-1] if " Status Message: " in text else text
    text = (
        text.split("] : ", 1)[-1].split(" : ", 2)[-1] if text.startswith("[ONNXRuntime") else text
    )
    return text[:400] or type(error).__name__


def session(
    model: bytes | Path,
    *,
    threads: int = 1,
    optimize: bool = False,
    shared_arena: bool = False,
    weights: Mapping[str, Array] | None = None,
) -> Any:
    """A CPU session, its graph left as it is unless `optimize`.

    `weights` are the external initializers of a model given as bytes. With `shared_arena` the
    session takes its memory from the limited arena of `graphopt.execute`. Raises ONNX Runtime's
    own exceptions.
    """
    ort = onnxruntime()

    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # Its arena doubles with each growth, and keeps what it has.
    options.enable_cpu_mem_arena = shared_arena
    options.enable_mem_pattern = False
    # Threads that spin take the processor from everything else on a small machine.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    level = ort.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimize else level.ORT_DISABLE_ALL
    if shared_arena:
        options.add_session_config_entry("session.use_env_allocators", "1")
    if weights:
        options.add_external_initializers(
            list(weights), [ort.OrtValue.ortvalue_from_numpy(a) for a in weights.values()]
        )
    source = model if isinstance(model, bytes) else os.fspath(model)
    return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def to_ort(value: object) -> object:
    """A feed as ONNX Runtime takes it: lists and None stay, bf16, fp8 and int4 become OrtValues."""
    if isinstance(value, list):
        return [to_ort(v) for v in cast("list[object]", value)]
    if not isinstance(value, np.ndarray):
        return value
    array = cast(Array, value)
    if array.dtype.char == "U":
        return array.astype(object)
    if array.dtype.kind != "V" and type(array.dtype).__module__.startswith("numpy"):
        return array
    ort = onnxruntime()

    dtype = ir.DataType.from_numpy(array.dtype)
    data = ir.tensor(array).tobytes()
    raw = ort.OrtValue.ortvalue_from_shape_and_type(list(array.shape), int(dtype), "cpu")
    ctypes.memmove(raw.data_ptr(), data, len(data))
    return raw


def from_ort(value: Any) -> Array | None:
    """A tensor that ONNX Runtime made, copied, with its ONNX dtype; None where it is no tensor."""
    if not value.has_value() or not value.is_tensor():
        return None
    dtype = ir.DataType(value.element_type())
    if dtype in NUMPY_TYPES:
        return cast(Array, value.numpy())
    size = value.tensor_size_in_bytes()
    buffer = (ctypes.c_uint8 * size).from_address(value.data_ptr()) if size else b""
    proto = onnx.TensorProto(data_type=int(dtype), dims=value.shape(), raw_data=bytes(buffer))
    return ir.from_proto(proto).numpy().copy()


NUMPY_TYPES = frozenset(
    ir.DataType[name]
    for name in (
        *("BOOL", "INT8", "INT16", "INT32", "INT64", "UINT8", "UINT16", "UINT32", "UINT64"),
        *("FLOAT16", "FLOAT", "DOUBLE", "STRING"),
    )
)
"""What ONNX Runtime and numpy exchange as arrays."""
_RAW_OUTPUTS = ("bfloat16", "float8", "int4", "int2", "float4")


RUN_SECONDS = 10.0
"""How long a run may take unless told otherwise: models from anywhere may loop for years."""
BATCH_SECONDS = 600.0
"""As much for a batch of samples, of a model that is known to run."""
_SLOWEST = 20e6  # bytes of weights that a run reads from a disk in a second, at least


@contextlib.contextmanager
def _deadline(seconds: float) -> Generator[Any]:
    """Run options that end a run after some time, between two nodes.

    Raises TimeLimitError in place of the exception by which ONNX Runtime then ends.
    """
    options = onnxruntime().RunOptions()
    timer = threading.Timer(seconds, lambda: setattr(options, "terminate", True))
    timer.daemon = True
    timer.start()
    try:
        yield options
    except Exception as error:
        if options.terminate:
            raise TimeLimitError(f"a run takes more than {seconds:g} s") from error
        raise
    finally:
        timer.cancel()


_SLACK_BYTES = 32 << 20  # address space for stacks and libraries


@contextlib.contextmanager
def memory_guard(limit: int) -> Generator[None]:
    """Inside, allocations fail once this process has about `limit` bytes more than now.

    For models whose need nobody can know before they run. It holds for all threads of the process,
    and only where the system can limit address space (not on Windows).
    """
    try:
        resource = import_module("resource")
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    except (ImportError, OSError):
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    wanted = pages * os.sysconf("SC_PAGE_SIZE") + limit + _SLACK_BYTES
    if soft != resource.RLIM_INFINITY:
        wanted = min(wanted, soft)
    resource.setrlimit(resource.RLIMIT_AS, (wanted, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def run_session(
    running: Any,
    names: Sequence[str],
    feeds: Mapping[str, object],
    *,
    seconds: float = RUN_SECONDS,
) -> list[Any]:
    """Run a session and convert its outputs: arrays, lists (sequences), dicts (maps) or None.

    Raises TimeLimitError past `seconds`, ONNX Runtime's own exceptions, and TypeError where strings
    or sequences go in and types that numpy does not know come out, which its Python interface
    cannot do at once.
    """
    ort = onnxruntime()

    types: dict[str, str] = {o.name: o.type for o in running.get_outputs()}
    if not any(raw in types[name] for name in names for raw in _RAW_OUTPUTS):
        with _deadline(seconds) as options:
            return list(running.run(list(names), dict(feeds), options))
    values: dict[str, Any] = {}
    for name, feed in feeds.items():
        if isinstance(feed, np.ndarray) and cast(Array, feed).dtype.char != "O":
            feed = ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(cast(Array, feed)))
        elif not isinstance(feed, ort.OrtValue):
            raise TypeError(f"input {name!r} cannot be fed beside an output without a numpy type")
        values[name] = feed
    with _deadline(seconds) as options:
        results = running.run_with_ort_values(list(names), values, options)
    return [from_ort(v) for v in results]


class Runner:
    """A model loaded into ONNX Runtime on the CPU.

    `model` is an IR model, of any size, or the path of a file. `threads` counts threads within an
    operator. ONNX Runtime's graph optimizations are off unless `optimize` is set. A run may take
    `seconds`, and the time to read weights that are too large to copy. Weights that are
    memory-mapped are read from where they are: at most one copy of them is made, none beyond 1 GB.
    Raises GraphoptError, with one line, for a model that ONNX Runtime cannot load.
    """

    def __init__(
        self,
        model: ir.Model | Path,
        *,
        threads: int = 1,
        optimize: bool = False,
        seconds: float = RUN_SECONDS,
    ) -> None:
        self._fed: dict[str, object] = {}
        self._session: Any
        try:
            if isinstance(model, Path):
                self._session = session(model, threads=threads, optimize=optimize)
            else:
                self._session, self._fed = _session(model, threads, optimize)
        except Exception as error:
            raise GraphoptError(f"ONNX Runtime cannot load the model: {one_line(error)}") from error
        fed = sum(cast(Array, v).nbytes for v in self._fed.values() if isinstance(v, np.ndarray))
        self._seconds = seconds + fed / _SLOWEST
        names: list[str] = [i.name for i in self._session.get_inputs()]
        self.inputs = [name for name in names if name not in self._fed]
        self.outputs: list[str] = [o.name for o in self._session.get_outputs()]

    def run(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        """Run on arrays (bf16, fp8 and int4 as ml_dtypes), lists for sequences, None for no value.

        Returns the graph's outputs by name: arrays, lists of them, lists of dicts for maps, or
        None for an optional without a value. Raises InputError for names that the model does not
        have, TimeLimitError beyond the runner's limit, GraphoptError where the run fails.
        """
        unknown = sorted(set(feeds) - set(self.inputs))
        if unknown:
            raise InputError(f"the model has no input {unknown[0]!r}: it has {self.inputs}")
        try:
            values = {name: to_ort(value) for name, value in feeds.items()}
            given = {**values, **self._fed}
            results = run_session(self._session, self.outputs, given, seconds=self._seconds)
        except TimeLimitError:
            raise
        except Exception as error:
            raise GraphoptError(f"ONNX Runtime cannot run the model: {one_line(error)}") from error
        return dict(zip(self.outputs, results, strict=True))


def _session(model: ir.Model, threads: int, optimize: bool) -> tuple[Any, dict[str, object]]:
    """A session of a model, and the weights to feed to it; bfloat16 is emulated where need be."""
    proto, weights, fed = _detach(model)
    try:
        return session(proto, threads=threads, optimize=optimize, weights=weights), fed
    except Exception:
        if not _has_bfloat16(model):
            raise
    from graphopt.emulation import emulated  # which stands on this module

    proto, weights, fed = _detach(emulated(model))
    return session(proto, threads=threads, optimize=optimize, weights=weights), fed


def _has_bfloat16(model: ir.Model) -> bool:
    short = ir.DataType.BFLOAT16
    if any(tensor.dtype == short for tensor in ir.constants(model)):
        return True
    if any(isinstance(v.type, ir.TensorType) and v.type.dtype == short for v in model.graph.inputs):
        return True
    casts = (node for node in ir.all_nodes(model) if node.op_type == "Cast")
    return any(ir.attribute(node, "to") == int(short) for node in casts)


def _detach(model: ir.Model) -> tuple[bytes, dict[str, Array], dict[str, object]]:
    """The model as bytes without its larger weights; weights to attach; weights to feed.

    The main graph's large initializers become external ones that are handed over as arrays, or
    inputs where there is more of them than should be copied.
    """
    copy = files.copy(model)
    arrays: dict[str, Array] = {}
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if tensor is None or tensor.nbytes <= _INLINE_BYTES or value.is_graph_input():
            continue
        if not any(use.node.graph is model.graph for use in value.uses()):
            continue  # a session may have moved it elsewhere before it is attached
        if tensor.dtype in NUMPY_TYPES and tensor.dtype != ir.DataType.STRING:
            arrays[name] = np.ascontiguousarray(tensor.numpy())
            del copy.graph.initializers[name]
    proto = files.to_proto(copy)
    if sum(a.nbytes for a in arrays.values()) > _COPY_BYTES:
        for name, array in arrays.items():
            dtype = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
            info = onnx.helper.make_tensor_value_info(name, dtype, array.shape)
            proto.graph.input.append(info)
        return proto.SerializeToString(), {}, dict(arrays)
    for name, array in arrays.items():
        dtype = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
        proto.graph.initializer.append(_external(name, dtype, array))
    return proto.SerializeToString(), arrays, {}


def _external(name: str, dtype: int, array: Array) -> onnx.TensorProto:
    """The head of an initializer whose data ONNX Runtime is handed as an array."""
    tensor = onnx.TensorProto(
        name=name, data_type=dtype, dims=array.shape, data_location=onnx.TensorProto.EXTERNAL
    )
    for key, value in (("location", "weights"), ("offset", "0"), ("length", str(array.nbytes))):
        tensor.external_data.add(key=key, value=value)
    return tensor
