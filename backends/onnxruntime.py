"""ONNX Runtime: models as .onnx or .ort files, run by its CPU provider or another that is there."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np

from graphopt.artifact import Manifest, TensorInfo
from graphopt.backends import (
    Array,
    BackendOptions,
    OpTime,
    Output,
    check_feeds,
    make_options,
    timed,
)
from graphopt.errors import GraphoptError, InputError, MissingError
from graphopt.target import Target

if TYPE_CHECKING:
    import numpy.typing as npt

    from graphopt import ir
    from graphopt.pass_manager import Pass

_OLDEST = (1, 20)
_DEVICES = {"any": "cpu", "cpu": "cpu", "cuda": "cuda"}
"""What runs a target unless an option says otherwise."""
_PROVIDERS = {
    "cpu": ("CPUExecutionProvider",),
    "cuda": ("CUDAExecutionProvider", "CPUExecutionProvider"),
    "tensorrt": ("TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"),
    "openvino": ("OpenVINOExecutionProvider", "CPUExecutionProvider"),
}
"""In order of preference: a node goes to the first that takes it."""
_WHEELS = {"cuda": "onnxruntime-gpu", "tensorrt": "onnxruntime-gpu tensorrt"} | {
    "openvino": "onnxruntime-openvino"
}
_MEMORY = {"CUDAExecutionProvider": "cuda", "TensorrtExecutionProvider": "cuda"}
"""Where providers have memory of their own."""
_LEVELS = {
    "off": "ORT_DISABLE_ALL",
    "basic": "ORT_ENABLE_BASIC",
    "extended": "ORT_ENABLE_EXTENDED",
    "layout": "ORT_ENABLE_LAYOUT",
    "all": "ORT_ENABLE_ALL",
}
_ORT_BYTES = 1 << 31  # flatbuffers count in signed 32 bits
_FATAL = 4  # log severity: everything less is in the exception too, or no concern of the user's
_PLAIN = frozenset({"bool", "string", "float16", "float32", "float64", "?"}) | {
    f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)
}
"""What ONNX Runtime and numpy exchange as arrays; `?` is left to the runtime."""
_PROFILE_WARMUP = 5


@dataclass(frozen=True)
class Options(BackendOptions):
    """How a session runs. Zero threads leaves the number to ONNX Runtime: one per core."""

    threads: int = 0
    """Threads that share the work of one operator."""
    inter_threads: int = 1
    """Operators that may run side by side."""
    spinning: bool = True
    """Idle threads busy-wait: faster on a quiet machine, far slower on a contended one."""
    arena: bool = True
    """Keep freed memory for the next run instead of giving it back."""
    graph_level: Literal["off", "basic", "extended", "layout", "all"] = "all"
    """ONNX Runtime's own graph optimization: at load for .onnx, at compilation for .ort."""
    provider: Literal["auto", "cpu", "cuda", "tensorrt", "openvino"] = "auto"
    """What runs the nodes; `auto` is the target's device."""
    format: Literal["onnx", "ort"] = "onnx"
    """.ort loads faster, but from `layout` on only on CPUs like the one that compiled it."""

    def __post_init__(self) -> None:
        if self.threads < 0 or self.inter_threads < 1:
            raise InputError("threads is 0 or more, inter_threads 1 or more")


class OnnxRuntime:
    """The backend; see `graphopt.backends.Backend`."""

    name = "onnxruntime"
    options = Options
    native_code = False

    def is_available(self) -> str | None:
        """ONNX Runtime from 1.20 on, of any flavour."""
        try:
            version = str(_ort().__version__)
        except MissingError as error:
            return str(error)
        if tuple(map(int, version.split(".")[:2])) < _OLDEST:
            oldest = ".".join(map(str, _OLDEST))
            return f"onnxruntime {version} is too old: pip install 'onnxruntime>={oldest}'"
        return None

    def versions(self) -> dict[str, str]:
        """ONNX Runtime's version."""
        return {"onnxruntime": str(_ort().__version__)}

    def can_compile(self, target: Target) -> str | None:
        """Files are portable, so everything that a provider exists for."""
        return self.is_available() or (
            None if target.device in _DEVICES else f"no provider for {target.device}"
        )

    def can_run(self, target: Target) -> str | None:
        """Whether the installed wheel has the provider and this CPU the instructions."""
        reason = self.can_compile(target)
        if reason is not None:
            return reason
        return _lacks(_DEVICES[target.device]) or target.foreign()

    def supports(self, model: ir.Model, target: Target, options: Any = None) -> dict[str, str]:
        """Tried by making sessions without the large weights: whole first, then node by node."""
        from graphopt.backends._onnxruntime_support import unsupported

        return unsupported(model, _refusal)

    def legalize(self, target: Target) -> tuple[Pass, ...]:
        """It needs none: these are the forms in which its kernels are faster."""
        from graphopt.backends._onnxruntime_legalize import passes

        return passes(target)

    def compile(self, model: ir.Model, target: Target, options: Options, folder: Path) -> None:
        """Save the model; a session made from the file proves that it loads."""
        from graphopt import files

        reason = self.can_compile(target)
        if reason is not None:
            raise MissingError(f"onnxruntime cannot compile for {target.name}: {reason}")
        path = folder / "model.onnx"
        files.save(model, path)
        settings = _settings(options)
        level: str = "off"
        if options.format == "ort":
            size = sum(file.stat().st_size for file in folder.iterdir())
            if size >= _ORT_BYTES:
                raise InputError(f"a .ort file holds 2 GB, not {size / 1e9:.1f}: use format=onnx")
            # what `layout` and above write is laid out for the CPU that did it
            level = options.graph_level
            if level in ("layout", "all") and (target.device != "cpu" or target.foreign()):
                level = "extended"
            settings.optimized_model_filepath = str(folder / "model.ort")
            settings.add_session_config_entry("session.save_model_format", "ORT")
        settings.graph_optimization_level = _level(level)
        try:
            _session(path, settings, _PROVIDERS["cpu"])
        except GraphoptError as error:
            refused = self.supports(model, target)
            nodes = "; ".join(f"node {label}: {why}" for label, why in list(refused.items())[:3])
            raise GraphoptError(f"onnxruntime refused the model: {nodes or error}") from None
        if options.format == "ort":
            for written in folder.glob("model.onnx*"):
                written.unlink()

    def load(self, folder: Path, manifest: Manifest) -> OnnxRuntimeExecutable:
        """A session on the folder's model, ready to run."""
        reason = self.can_run(manifest.target)
        if reason is not None:
            raise MissingError(f"{folder} cannot run here: {reason}")
        path = next((folder / f for f in ("model.ort", "model.onnx") if f in manifest.files), None)
        if path is None:
            raise InputError(f"{folder}: its manifest names no model.onnx or model.ort")
        options = make_options(self, manifest.options)
        reason = _lacks(options.provider) if options.provider != "auto" else None
        if reason is not None:
            raise MissingError(f"{folder} cannot run here: {reason}")
        return OnnxRuntimeExecutable(path, manifest, options)


class OnnxRuntimeExecutable:
    """A session and the signature of its model; see `graphopt.backends.Executable`."""

    def __init__(self, path: Path, manifest: Manifest, options: Options) -> None:
        self.inputs: tuple[TensorInfo, ...] = manifest.inputs
        self.outputs: tuple[TensorInfo, ...] = manifest.outputs
        self._path = path
        chosen = options.provider
        self._providers = _PROVIDERS[
            _DEVICES[manifest.target.device] if chosen == "auto" else chosen
        ]
        self._options = options
        dtypes = {info.dtype for info in (*self.inputs, *self.outputs)}
        self._exchanged = all(dtype in _PLAIN or "(" in dtype for dtype in dtypes)
        """Whether numpy has all types of inputs and outputs."""
        self._quiet = _ort().RunOptions()
        self._quiet.log_severity_level = _FATAL
        self._session = _session(path, _settings(options), self._providers)

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Output]:
        """All outputs by name."""
        results = self._caller(self._session, feeds)()
        return {info.name: result for info, result in zip(self.outputs, results, strict=True)}

    def benchmark(self, feeds: Mapping[str, Array], runs: int) -> npt.NDArray[np.int64]:
        """Nanoseconds per run, with the garbage collector held off.

        On a GPU inputs and outputs stay in its memory meanwhile.
        """
        memory = _MEMORY.get(self._providers[0])
        call: Callable[[], object] = (
            self._caller(self._session, feeds) if memory is None else self._bound(feeds, memory)
        )
        return timed(call, runs)

    def profile(self, feeds: Mapping[str, Array], runs: int = 10) -> tuple[OpTime, ...]:
        """From ONNX Runtime's own profile of a second session; its file is deleted."""
        import tempfile  # not needed to load and run

        with tempfile.TemporaryDirectory(prefix="graphopt-profile-") as folder:
            settings = _settings(self._options)
            settings.enable_profiling = True
            settings.profile_file_prefix = str(Path(folder) / "profile")
            session = _session(self._path, settings, self._providers)
            call = self._caller(session, feeds)
            for _ in range(_PROFILE_WARMUP + runs):
                call()
            return _op_times(json.loads(Path(session.end_profiling()).read_bytes()), runs)

    def _bound(self, feeds: Mapping[str, Array], memory: str) -> Callable[[], object]:
        """A function that runs the session on feeds that are in a device's memory already."""
        check_feeds(self.inputs, feeds)
        binding, session, errors = self._session.io_binding(), self._session, _errors()
        values = {
            name: _ort().OrtValue.ortvalue_from_numpy(_plain(feed), memory, 0)
            for name, feed in feeds.items()
        }
        for name, value in values.items():
            binding.bind_ortvalue_input(name, value)
        for info in self.outputs:
            binding.bind_output(info.name, memory)

        def call() -> object:
            try:
                session.run_with_iobinding(binding)
                binding.synchronize_outputs()
            except errors as error:
                raise _failure(error) from None
            return values  # which the binding does not keep alive

        return call

    def _caller(self, session: Any, feeds: Mapping[str, Array]) -> Callable[[], list[Output]]:
        """A function that runs the session on feeds that are checked and converted once."""
        check_feeds(self.inputs, feeds)
        plain = {name: _plain(feed) for name, feed in feeds.items()}
        errors, quiet = _errors(), self._quiet
        if self._exchanged:

            def call() -> list[Output]:
                try:
                    results: list[Output] = session.run(None, plain, quiet)
                except errors as error:
                    raise _failure(error) from None
                return results

            return call
        from graphopt.backends._onnxruntime_values import from_ort_value, to_ort_value

        names = [info.name for info in self.outputs]
        values = {name: to_ort_value(feed) for name, feed in plain.items()}

        def call_extended() -> list[Output]:
            try:
                results = session.run_with_ort_values(names, values, quiet)
            except errors as error:
                raise _failure(error) from None
            return [from_ort_value(result) for result in results]

        return call_extended


def _ort() -> Any:
    """The onnxruntime package (untyped), imported on first use."""
    try:
        return importlib.import_module("onnxruntime")
    except ImportError as error:
        raise MissingError(
            f"onnxruntime is not usable ({error}): pip install onnxruntime"
        ) from None


@cache
def _errors() -> tuple[type[Exception], ...]:
    """Everything that ONNX Runtime raises: its own classes have no common base."""
    state: dict[str, Any] = _ort().capi.onnxruntime_pybind11_state.__dict__
    own = (k for k in state.values() if isinstance(k, type) and issubclass(k, Exception))
    return (*own, RuntimeError, ValueError, TypeError)


def _failure(error: Exception) -> GraphoptError:
    """An error of ONNX Runtime's as one line, without its codes and source positions."""
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : [A-Z_]+ : ", "", str(error))
    text = re.sub(r"/onnxruntime_src/\S+?:\d+ |^\w+\.cc:\d+ ", "", text)
    return GraphoptError(" ".join(text.split())[:600])


def _level(name: str) -> Any:
    levels = _ort().GraphOptimizationLevel
    # the layout level is younger than the others; before, it was a part of `all`
    return getattr(levels, _LEVELS[name], levels.ORT_ENABLE_ALL)


def _settings(options: Options) -> Any:
    """Session options."""
    settings = _ort().SessionOptions()
    settings.log_severity_level = _FATAL
    settings.intra_op_num_threads = options.threads
    settings.inter_op_num_threads = options.inter_threads
    if options.inter_threads > 1:
        settings.execution_mode = _ort().ExecutionMode.ORT_PARALLEL
    for kind in ("intra", "inter"):
        settings.add_session_config_entry(
            f"session.{kind}_op.allow_spinning", str(int(options.spinning))
        )
    settings.enable_cpu_mem_arena = options.arena
    settings.graph_optimization_level = _level(options.graph_level)
    return settings


def _lacks(name: str) -> str | None:
    """Why the wheel that is installed has no provider of a name, and which wheel has; or None."""
    provider, there = _PROVIDERS[name][0], _ort().get_available_providers()
    if provider in there:
        return None
    hint = f": pip install {_WHEELS[name]}" if name in _WHEELS else ""
    return f"this onnxruntime has no {provider}, only {', '.join(there)}{hint}"


def _session(model: Path | bytes, settings: Any, providers: Sequence[str]) -> Any:
    """A session.

    Raises:
        GraphoptError: ONNX Runtime refuses the model; one line.
        MissingError: the provider is in the wheel, but does not start here.
    """
    source = str(model) if isinstance(model, Path) else model
    there = _ort().get_available_providers()
    try:
        made = _ort().InferenceSession(
            source, settings, providers=[name for name in providers if name in there]
        )
    except _errors() as error:
        raise _failure(error) from None
    if providers[0] not in made.get_providers():
        raise MissingError(
            f"onnxruntime's {providers[0]} does not start here: its driver or libraries are missing"
        )
    return made


def _refusal(model: bytes) -> str | None:
    """Why ONNX Runtime does not take a serialized model, or None."""
    try:
        _session(model, _settings(Options(threads=1, graph_level="off")), _PROVIDERS["cpu"])
    except GraphoptError as error:
        return str(error)
    return None


def _plain(feed: Any) -> Any:
    """A feed as ONNX Runtime takes it: contiguous, strings as objects."""
    if not isinstance(feed, np.ndarray):
        return feed
    array: Array = np.asarray(cast("Array", feed), order="C")
    return array.astype(object) if array.dtype.kind in "UST" else array


def _op_times(events: list[dict[str, Any]], runs: int) -> tuple[OpTime, ...]:
    """Mean time per node over the last `runs` runs of a profile."""
    starts = sorted(event["ts"] for event in events if event.get("name") == "model_run")
    first = starts[-runs]
    rows: dict[tuple[str, str, str], list[float]] = {}
    for event in sorted(events, key=lambda event: event["ts"]):
        name, args = str(event.get("name", "")), event.get("args", {})
        if event.get("cat") != "Node" or event["ts"] < first or not name.endswith("_kernel_time"):
            continue
        op = str(args["op_name"])
        node = name.removesuffix("_kernel_time") or f"{op}#{args['node_index']}"
        rows.setdefault((node, op, str(args["provider"])), []).append(event["dur"])
    return tuple(
        OpTime(node, op, device, calls=len(times) / runs, microseconds=sum(times) / runs)
        for (node, op, device), times in rows.items()
    )


BACKEND = OnnxRuntime()
