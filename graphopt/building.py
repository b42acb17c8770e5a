"""From a model that is ready for a backend to the files of an artifact.

Backends that write machine code work in a child process (`graphopt.child`), and what they made is
kept (`graphopt.cache`). A model that one of them takes only in part is cut (`graphopt.partition`):
what it does not take is ONNX Runtime's, on the CPU. `verify_artifact` checks what was made.
"""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from graphopt import __version__, artifact, backends, cache, child
from graphopt.artifact import TensorInfo
from graphopt.backends import Array, Backend, BackendOptions
from graphopt.digests import sha256
from graphopt.errors import (
    GraphoptError,
    InputError,
    MemoryLimitError,
    MissingError,
    TimeLimitError,
    VerificationError,
)
from graphopt.target import Target

if TYPE_CHECKING:
    from graphopt import ir
    from graphopt.partition import Piece

_FEW = 4
"""Nodes among which nobody looks for the one that a compiler fails with."""
_ROUNDED = 0.05
"""Of its scale, what the results of a quantized model may move: sums that lie between two steps are
rounded the other way, and a network carries that on."""
_NOTHING_LEFT = "; nothing is left that is worth compiling, and --backend ort takes it whole"
FALLBACK = "onnxruntime"
"""What runs the nodes that a backend does not take."""


@dataclass(frozen=True)
class Rules:
    """How a native compiler may work."""

    seconds: float | None = None
    """None: `child.SECONDS`."""
    memory: int | None = None
    fallback: bool = True
    cache: bool = True


@dataclass
class Built:
    """What came of building: where the model was cut, and why."""

    parts: list[artifact.Part] = field(default_factory=list[artifact.Part])
    refused: dict[str, str] = field(default_factory=dict[str, str])
    """The nodes that fell back, by label, with the reason."""
    key: str = ""
    """Of the cache, under which the complete artifact is to be kept; empty where it is not."""


def build(
    model: ir.Model,
    target: Target,
    backend: Backend,
    options: BackendOptions,
    folder: Path,
    rules: Rules,
) -> Built:
    """Fill an empty folder with what a backend makes of a model.

    Raises:
        GraphoptError: neither the backend nor the fallback takes a node; the compiler failed.
        TimeLimitError: it took too long.
    """
    if not backend.native_code:
        backend.compile(model, target, options, folder)
        return Built()
    with tempfile.TemporaryDirectory(prefix="graphopt-compile-") as scratch:
        name = ""
        if rules.cache:
            name = _key(model, target, backend, options, Path(scratch), rules.fallback)
            kept = cache.fetch(name, folder)
            if kept is not None:
                return Built(list(kept.parts), dict(kept.fallback))
        pieces = _Pieces(model, target, backend, options, folder, rules)
        try:
            refused = _compile(model, target, backend, options, folder, rules)
        except (InputError, MissingError, MemoryLimitError, TimeLimitError):
            raise
        except GraphoptError as error:
            labels = tuple(_label(node) for node in model.graph)
            refused = pieces.culprits(labels, str(error)) if rules.fallback else {}
            if len(refused) in (0, len(labels)):
                raise
            _clear(folder)
        if not refused:
            return Built(key=name)
        if not rules.fallback:
            raise backends.NodeError(backend.name, refused)
        return dataclasses.replace(pieces.build(refused), key=name)


def verify_artifact(
    folder: Path,
    model: ir.Model,
    feeds: Mapping[str, Array] | None = None,
    *,
    bindings: Mapping[str, int] | None = None,
) -> str | None:
    """Run what was compiled from a model, in a process of its own, and compare with the model.

    Args:
        folder: the artifact; its machine code is trusted.
        model: what it was compiled from, which ONNX Runtime runs.
        feeds: inputs by name; random ones where None.
        bindings: sizes of free dimensions by name, for random inputs.

    Returns:
        Why that could not be told; None where they agree.

    Raises:
        VerificationError: they differ.
        GraphoptError: the artifact does not load or run.
    """
    from graphopt.feeds import single_feeds
    from graphopt.judging import Trial, computed_types, judge
    from graphopt.shapes import Shapes
    from graphopt.worker import Worker

    with Worker(folder, trust=True) as worker:
        try:
            inputs = feeds or single_feeds(model, Shapes(model), worker.run, bindings=bindings)
            trial = Trial(model, [inputs])
            expected = trial.run()
        except TimeLimitError:
            raise
        except GraphoptError as error:
            return str(error)
        got = worker.run(inputs)
    verdict = judge(trial, expected, [got], computed=computed_types(model))
    limit = _ROUNDED if any("Quantize" in node.op_type for node in model.graph) else 0.0
    wrong = next((o for o in verdict.outputs if not o.ok and (o.reason or o.max_rel > limit)), None)
    if wrong is not None:
        raise VerificationError(str(wrong))
    return next(iter(verdict.unchecked.values()), None)


def compile_here(
    backend: str, model: str, target: Target, options: BackendOptions, folder: str
) -> dict[str, str]:
    """The child's side: compile a model file; the nodes that are not taken, if there are any."""
    from graphopt import files

    chosen, loaded = backends.get(backend), files.load(Path(model))
    refused = chosen.supports(loaded, target, options)
    if refused:
        return refused
    try:
        chosen.compile(loaded, target, options, Path(folder))
    except backends.NodeError as error:
        return error.nodes
    return {}


def info(value: ir.Value) -> TensorInfo:
    """Name, dtype and shape of an input or output as the manifest has them."""
    from graphopt import ir

    kind, shape = value.type, value.shape
    if isinstance(kind, ir.TensorType) or kind is None:
        dtype = "?" if kind is None else _dtype(kind.dtype)
    else:
        dtype = str(kind).lower()
    dims = None if shape is None else tuple(_dim(dim) for dim in shape)
    return TensorInfo(value.name or "", dtype, dims)


class _Pieces:
    """A model in pieces, each compiled by the backend or, failing that, by the fallback."""

    def __init__(
        self,
        model: ir.Model,
        target: Target,
        backend: Backend,
        options: BackendOptions,
        folder: Path,
        rules: Rules,
    ) -> None:
        self._model, self._target, self._backend = model, target, backend
        self._options, self._folder, self._rules = options, folder, rules
        self._done: dict[tuple[str, ...], Path] = {}

    def build(self, refused: dict[str, str]) -> Built:
        """Cut, compile, and cut again without the nodes that turned out not to be taken."""
        from graphopt.partition import cut

        with tempfile.TemporaryDirectory(prefix="graphopt-pieces-") as scratch:
            while True:
                pieces, reasons = cut(self._model, refused, self._options.ranges())
                if not any(piece.native for piece in pieces):
                    raise backends.NodeError(self._backend.name, reasons, _NOTHING_LEFT)
                more: dict[str, str] = {}
                for piece in pieces:
                    if piece.native and piece.labels not in self._done:
                        more |= self._native(piece, Path(scratch))
                if not more:
                    parts = [self._part(index, piece) for index, piece in enumerate(pieces)]
                    return Built(parts, reasons)
                refused = {**reasons, **more}

    def _native(self, piece: Piece, scratch: Path) -> dict[str, str]:
        """Compile a piece; the nodes that are not taken after all."""
        place = scratch / str(len(self._done))
        place.mkdir(exist_ok=True)
        try:
            options = _local(self._options, piece)
            refused = _compile(
                piece.model, self._target, self._backend, options, place, self._rules
            )
        except (MemoryLimitError, TimeLimitError):
            raise
        except InputError as error:
            refused = dict.fromkeys(piece.labels, str(error))
        except GraphoptError as error:
            refused = self.culprits(piece.labels, str(error))
        if refused:
            shutil.rmtree(place)
            return refused
        self._done[piece.labels] = place
        return {}

    def culprits(self, labels: Sequence[str], why: str) -> dict[str, str]:
        """Which of the nodes with which the compiler fails it fails with: by halves, down to a few.

        All of them where no half fails by itself, nor the one in the middle.
        """
        suspects = list(labels)
        while len(suspects) > _FEW:
            half, quarter = len(suspects) // 2, len(suspects) // 4
            halves = (suspects[:half], suspects[half:], suspects[quarter : quarter + half])
            guilty = next((each for each in halves if self._fails(each)), None)
            if guilty is None:
                break
            suspects = guilty
        return dict.fromkeys(suspects, f"the compiler fails with it: {why}")

    def _fails(self, labels: Sequence[str]) -> bool:
        """Whether the compiler fails with some of the nodes alone."""
        from graphopt.partition import cut

        alone = set(labels)
        others = {_label(node): "not now" for node in self._model.graph}
        others = {label: why for label, why in others.items() if label not in alone}
        ranges = self._options.ranges()
        for piece in cut(self._model, others, ranges)[0]:
            if not piece.native:
                continue
            with tempfile.TemporaryDirectory(prefix="graphopt-try-") as scratch:
                try:
                    options = _local(self._options, piece)
                    _compile(
                        *(piece.model, self._target, self._backend, options),
                        Path(scratch),
                        self._rules,
                    )
                except (InputError, MemoryLimitError, TimeLimitError):
                    continue
                except GraphoptError:
                    return True
        return False

    def _part(self, index: int, piece: Piece) -> artifact.Part:
        """Put the files of a piece into their place."""
        name = f"part{index}"
        if piece.native:
            backend, options = self._backend, _local(self._options, piece)
            shutil.copytree(self._done[piece.labels], self._folder / name)
        else:
            backend = backends.get(FALLBACK)
            options = backends.make_options(backend, self._options.for_fallback())
            (self._folder / name).mkdir()
            backend.compile(
                piece.model, fallback_target(self._target), options, self._folder / name
            )
        return artifact.Part(
            folder=name,
            backend=backend.name,
            inputs=tuple(info(value) for value in piece.model.graph.inputs),
            outputs=tuple(info(value) for value in piece.model.graph.outputs),
            options=dataclasses.asdict(options),
            nodes=len(piece.labels),
        )


def fallback_target(target: Target) -> Target:
    """What the fallback compiles for: the CPU, any CPU beside a GPU."""
    return target if target.device == "cpu" else Target.portable()


def _compile(
    model: ir.Model,
    target: Target,
    backend: Backend,
    options: BackendOptions,
    folder: Path,
    rules: Rules,
) -> dict[str, str]:
    """Compile in a child process; the nodes that are not taken, if there are any."""
    from graphopt import files

    with tempfile.TemporaryDirectory(prefix="graphopt-child-") as scratch:
        path = Path(scratch) / "model.onnx"
        files.save(model, path)
        answer: dict[str, str] = child.call(
            "graphopt.building:compile_here",
            {
                "backend": backend.name,
                "model": str(path),
                "target": target,
                "options": options,
                "folder": str(folder),
            },
            what=f"{backend.name} compiler",
            seconds=child.SECONDS if rules.seconds is None else rules.seconds,
            memory=rules.memory,
        )
    return answer


def _key(
    model: ir.Model,
    target: Target,
    backend: Backend,
    options: BackendOptions,
    scratch: Path,
    fallback: bool,
) -> str:
    """The cache's name for what would be compiled."""
    from graphopt import files

    files.save(model, scratch / "model.onnx")
    return cache.key(
        {
            "model": [sha256(path) for path in sorted(scratch.iterdir())],
            "target": target.to_dict(),
            "backend": backend.name,
            "options": dataclasses.asdict(options),
            "versions": {"graphopt": __version__, **backend.versions()},
            "fallback": fallback,
        }
    )


def _clear(folder: Path) -> None:
    """Delete what a compiler left behind when it failed."""
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _label(node: ir.Node) -> str:
    """`ir.label`, without which loading an artifact does."""
    from graphopt import ir

    return ir.label(node)


def _local(options: BackendOptions, piece: Piece) -> BackendOptions:
    """The options for a piece: ranges of its own inputs, sizes of dimensions that it has."""
    dims = {str(dim) for value in piece.model.graph.inputs for dim in value.shape or ()}
    return options.for_piece(piece.profiles, dims)


def _dim(dim: int | ir.SymbolicDim) -> int | str:
    return dim if isinstance(dim, int) else str(dim.value or "?")


def _dtype(dtype: ir.DataType) -> str:
    """numpy's name (`float32`), also of the dtypes that only ml_dtypes has; `string` for text."""
    from graphopt import ir

    return "string" if dtype == ir.DataType.STRING else dtype.numpy().name
