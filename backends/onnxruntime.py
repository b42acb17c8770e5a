"""ONNX Runtime: models as .onnx or .ort files, run by its CPU provider or another that is there."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np

from graphopt.artifact import Manifest, TensorInfo
from graphopt.backends import (
    Array,
    BackendOptions,
    OpTime,
    Output,
    Value,
    check_feeds,
    make_options,
    on_host,
    timed,
)
from graphopt.backends._onnxruntime_session import (
    MEMORY,
    PROVIDERS,
    errors,
    failure,
    lacks,
    make_session,
    ort,
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
    tf32: bool = False
    """NVIDIA's GPUs multiply float32 with 10 bits of mantissa: faster, and no longer exact."""
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
            version = str(ort().__version__)
        except MissingError as error:
            return str(error)
        if tuple(map(int, version.split(".")[:2])) < _OLDEST:
            oldest = ".".join(map(str, _OLDEST))
            return f"onnxruntime {version} is too old: pip install 'onnxruntime>={oldest}'"
        return None

    def versions(self) -> dict[str, str]:
        """ONNX Runtime's version."""
        return {"onnxruntime": str(ort().__version__)}

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
        return lacks(_DEVICES[target.device]) or target.foreign()

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
            make_session(path, settings, "cpu")
        except GraphoptError as error:
            refused = self.supports(model, target)
            nodes = "; ".join(f"node {label}: {why}" for label, why in list(refused.items())[:3])
            raise GraphoptError(f"onnxruntime refused the model: {nodes or error}") from None
        if options.format == "ort":
            for written in folder.glob("model.onnx*"):
                written.unlink()

    def remarks(self, folder: Path) -> list[str]:
        """None: its library chooses its kernels by itself."""
        return []

    def load(self, folder: Path, manifest: Manifest) -> OnnxRuntimeExecutable:
        """A session on the folder's model, ready to run."""
        reason = self.can_run(manifest.target)
        if reason is not None:
            raise MissingError(f"{folder} cannot run here: {reason}")
        path = next((folder / f for f in ("model.ort", "model.onnx") if f in manifest.files), None)
        if path is None:
            raise InputError(f"{folder}: its manifest names no model.onnx or model.ort")
        options = make_options(self, manifest.options)
        reason = lacks(options.provider) if options.provider != "auto" else None
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
        self._provider = _DEVICES[manifest.target.device] if chosen == "auto" else chosen
        self._options = options
        dtypes = {info.dtype for info in (*self.inputs, *self.outputs)}
        self._exchanged = all(dtype in _PLAIN or "(" in dtype for dtype in dtypes)
        """Whether numpy has all types of inputs and outputs."""
        self._quiet = ort().RunOptions()
        self._quiet.log_severity_level = _FATAL
        self._session = make_session(path, _settings(options), self._provider, options.tf32)
        for infos, values in (
            (self.inputs, self._session.get_inputs()),
            (self.outputs, self._session.get_outputs()),
        ):
            if [info.name for info in infos] != [value.name for value in values]:
                raise InputError(f"{path}: its inputs or outputs are not those of its manifest")

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Output]:
        """All outputs by name."""
        check_feeds(self.inputs, feeds)
        results = self._caller(self._session, feeds)()
        return {info.name: result for info, result in zip(self.outputs, results, strict=True)}

    def call(self, values: Sequence[Value]) -> list[Value]:
        """As `run`; inputs are not copied."""
        names = (info.name for info in self.inputs)
        feeds = dict(zip(names, map(on_host, values), strict=True))
        return list[Value](self._caller(self._session, feeds)())

    def benchmark(self, feeds: Mapping[str, Array], runs: int) -> npt.NDArray[np.int64]:
        """Nanoseconds per run, with the garbage collector held off.

        On a GPU inputs and outputs stay in its memory meanwhile.
        """
        check_feeds(self.inputs, feeds)
        memory = MEMORY.get(PROVIDERS[self._provider][0]) if self._exchanged else None
        call: Callable[[], object] = (
            self._caller(self._session, feeds) if memory is None else self._bound(feeds, memory)
        )
        return timed(call, runs)

    def profile(self, feeds: Mapping[str, Array], runs: int = 10) -> tuple[OpTime, ...]:
        """From ONNX Runtime's own profile of a second session; its file is deleted."""
        import tempfile  # not needed to load and run

        check_feeds(self.inputs, feeds)
        with tempfile.TemporaryDirectory(prefix="graphopt-profile-") as folder:
            settings = _settings(self._options)
            settings.enable_profiling = True
            settings.profile_file_prefix = str(Path(folder) / "profile")
            profiled = make_session(self._path, settings, self._provider, self._options.tf32)
            call = self._caller(profiled, feeds)
            for _ in range(_PROFILE_WARMUP + runs):
                call()
            return _op_times(json.loads(Path(profiled.end_profiling()).read_bytes()), runs)

    def _bound(self, feeds: Mapping[str, Array], memory: str) -> Callable[[], object]:
        """A function that runs the session on feeds that are in a device's memory already."""
        binding, run, caught = (
            self._session.io_binding(),
            self._session.run_with_iobinding,
            errors(),
        )
        values = {
            name: ort().OrtValue.ortvalue_from_numpy(_plain(feed), memory, 0)
            for name, feed in feeds.items()
        }
        for name, value in values.items():
            binding.bind_ortvalue_input(name, value)
        for info in self.outputs:
            binding.bind_output(info.name, memory)

        def call() -> object:
            try:
                run(binding)
                binding.synchronize_outputs()
            except caught as error:
                raise failure(error) from None
            return values  # which the binding does not keep alive

        return call

    def _caller(self, session: Any, feeds: Mapping[str, Array]) -> Callable[[], list[Output]]:
        """A function that runs the session on feeds that are converted once."""
        plain = {name: _plain(feed) for name, feed in feeds.items()}
        caught, quiet = errors(), self._quiet
        if self._exchanged:

            def call() -> list[Output]:
                try:
                    results: list[Output] = session.run(None, plain, quiet)
                except caught as error:
                    raise failure(error) from None
                return results

            return call
        from graphopt.backends._onnxruntime_values import from_ort_value, to_ort_value

        names = [info.name for info in self.outputs]
        values = {name: to_ort_value(feed) for name, feed in plain.items()}

        def call_extended() -> list[Output]:
            try:
                results = session.run_with_ort_values(names, values, quiet)
            except caught as error:
                raise failure(error) from None
            return [from_ort_value(result) for result in results]

        return call_extended


def _level(name: str) -> Any:
    levels = ort().GraphOptimizationLevel
    # the layout level is younger than the others; before, it was a part of `all`
    return getattr(levels, _LEVELS[name], levels.ORT_ENABLE_ALL)


def _settings(options: Options) -> Any:
    """Session options."""
    settings = ort().SessionOptions()
    settings.log_severity_level = _FATAL
    settings.intra_op_num_threads = options.threads
    settings.inter_op_num_threads = options.inter_threads
    if options.inter_threads > 1:
        settings.execution_mode = ort().ExecutionMode.ORT_PARALLEL
    for kind in ("intra", "inter"):
        settings.add_session_config_entry(
            f"session.{kind}_op.allow_spinning", str(int(options.spinning))
        )
    settings.enable_cpu_mem_arena = options.arena
    settings.graph_optimization_level = _level(options.graph_level)
    return settings


def _refusal(model: bytes) -> str | None:
    """Why ONNX Runtime does not take a serialized model, or None."""
    try:
        make_session(model, _settings(Options(threads=1, graph_level="off")), "cpu")
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
