"""A model that a backend takes only in part, in pieces that are compiled one by one.

Native compilers work in a child process (`graphopt.child`). What the backend does not take is ONNX
Runtime's, on the CPU; of Loops and Ifs that it does not take, the bodies are compiled like models,
and the host steers them (`graphopt.flow`).
"""

from __future__ import annotations

import dataclasses
import itertools
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from graphopt import artifact, backends, child, npz
from graphopt.artifact import TensorInfo
from graphopt.backends import Array, Backend, BackendOptions
from graphopt.errors import (
    GraphoptError,
    InputError,
    MemoryLimitError,
    TimeLimitError,
)
from graphopt.target import Target

if TYPE_CHECKING:
    from graphopt import ir
    from graphopt.partition import Piece, Steered

_FEW = 4
"""Nodes among which nobody looks for the one that a compiler fails with."""
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


@dataclass(frozen=True)
class Compiler:
    """A backend at work on one artifact."""

    backend: Backend
    target: Target
    folder: Path
    """Of the artifact."""
    rules: Rules
    _numbers: Iterator[int] = field(default_factory=itertools.count)
    """Of the artifact's parts."""
    _files: Iterator[int] = field(default_factory=itertools.count)
    """Of its files of constants."""

    def compile(self, model: ir.Model, options: BackendOptions, folder: Path) -> dict[str, str]:
        """Compile in a child process; the nodes that are not taken, if there are any."""
        from graphopt import files

        with tempfile.TemporaryDirectory(prefix="graphopt-child-") as scratch:
            path = Path(scratch) / "model.onnx"
            files.save(model, path)
            answer: dict[str, str] = child.call(
                f"{__name__}:compile_here",
                {
                    "backend": self.backend.name,
                    "model": str(path),
                    "target": self.target,
                    "options": options,
                    "folder": str(folder),
                },
                what=f"{self.backend.name} compiler",
                seconds=child.SECONDS if self.rules.seconds is None else self.rules.seconds,
                memory=self.rules.memory,
            )
        return answer

    def write(self, piece: Piece, options: BackendOptions, place: Path | None) -> artifact.Part:
        """A part of the artifact: what was compiled in a place, or what the fallback makes."""
        name = f"part{next(self._numbers)}"
        backend: Backend = self.backend
        if place is not None:
            shutil.copytree(place, self.folder / name)
        else:
            backend = backends.get(FALLBACK)
            options = backends.make_options(backend, options.for_fallback())
            (self.folder / name).mkdir()
            target = fallback_target(self.target)
            backend.compile(piece.model, target, options, self.folder / name)
        return artifact.Part(
            folder=name,
            backend=backend.name,
            inputs=tuple(info(value) for value in piece.model.graph.inputs),
            outputs=tuple(info(value) for value in piece.model.graph.outputs),
            options=dataclasses.asdict(options),
            nodes=len(piece.labels),
        )

    def write_constants(self, arrays: Mapping[str, Array]) -> str:
        """The name of a file of arrays; none for none."""
        if not arrays:
            return ""
        name = f"constants{next(self._files)}.npz"
        npz.write(self.folder / name, arrays)
        return name


class Pieces:
    """A model, or the body of a Loop or an If in it, in pieces.

    Each is compiled by the backend or, failing that, by the fallback. `scratch` keeps what was
    compiled until it is known to remain.
    """

    def __init__(
        self, model: ir.Model, options: BackendOptions, compiler: Compiler, scratch: Path
    ) -> None:
        self._model, self._options = model, options
        self._compiler, self._scratch = compiler, scratch
        self._done: dict[tuple[str, ...], Path] = {}
        self._opened: dict[str, tuple[Pieces, ...]] = {}
        self._steps: Sequence[Piece | Steered] = ()
        self.refused: dict[str, str] = {}
        """The nodes that fall back, by label, with the reason."""

    def cut(self, refused: Mapping[str, str]) -> None:
        """Cut, compile, and cut again without the nodes that turned out not to be taken.

        Raises:
            NodeError: nothing is left for the backend.
        """
        from graphopt.partition import Piece, cut

        closed: set[str] = set()
        while True:
            steps, reasons = cut(self._model, refused, self._options.ranges(), closed)
            more: dict[str, str] = {}
            whole = len(closed)
            for step in steps:
                if isinstance(step, Piece):
                    if step.native and step.labels not in self._done:
                        more |= self._native(step)
                elif step.label not in self._opened and not self._open(step):
                    closed.add(step.label)
            if not more and len(closed) == whole:
                break
            refused = {**reasons, **more}
        if not any(step.native for step in steps):
            raise backends.NodeError(self._compiler.backend.name, reasons, _NOTHING_LEFT)
        self._steps = steps
        self.refused = {label: why for label, why in reasons.items() if label not in self._opened}
        for bodies in self._opened.values():
            for body in bodies:
                self.refused |= body.refused

    def steps(self) -> tuple[artifact.Part | artifact.Flow, ...]:
        """Put what was compiled into the artifact."""
        from graphopt.partition import Piece

        made: list[artifact.Part | artifact.Flow] = []
        for step in self._steps:
            if isinstance(step, Piece):
                place = self._done[step.labels] if step.native else None
                made.append(self._compiler.write(step, _local(self._options, step), place))
                continue
            opened, blocks = step.opened, list[artifact.Block]()
            for body, inner in zip(opened.bodies, self._opened[step.label], strict=True):
                outputs = tuple(info(value) for value in body.outputs)
                constants = inner.constants(body.constants)
                blocks.append(artifact.Block(body.inputs, outputs, inner.steps(), constants))
            flow = artifact.Flow(
                *(opened.kind, step.label, opened.inputs, opened.outputs, tuple(blocks)),
                carried=opened.carried,
                scanned=opened.scanned,
                stacked=opened.stacked,
            )
            made.append(flow)
        return tuple(made)

    def constants(self, given: Mapping[str, Array]) -> str:
        """The artifact's file of what the steps take that is constant, and of other constants."""
        from graphopt.partition import Steered

        found = dict(given)
        for step in self._steps:
            if isinstance(step, Steered):
                found |= step.opened.constants
        return self._compiler.write_constants(found)

    def _open(self, step: Steered) -> bool:
        """Compile the bodies of a Loop or an If; False where the backend takes nothing of them."""
        bodies: list[Pieces] = []
        for piece in step.pieces:
            options = _local(self._options, piece)
            bodies.append(Pieces(piece.model, options, self._compiler, self._scratch))
            bodies[-1]._fill(piece)
        if not any(step.native for body in bodies for step in body._steps):
            return False
        self._opened[step.label] = tuple(bodies)
        return True

    def _fill(self, body: Piece) -> None:
        """Compile a body whole or cut it; the fallback takes it where nothing else does."""
        if not body.labels:
            return
        native = dataclasses.replace(body, native=True)
        self._steps = (native,)
        refused = self._native(native)
        if refused:
            try:
                self.cut(refused)
            except backends.NodeError as error:
                self._steps = (body,)
                self.refused = error.nodes

    def _native(self, piece: Piece) -> dict[str, str]:
        """Compile a piece; the nodes that are not taken after all."""
        place = Path(tempfile.mkdtemp(dir=self._scratch))
        try:
            refused = self._compiler.compile(piece.model, _local(self._options, piece), place)
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
        from graphopt.partition import Piece, cut

        alone = set(labels)
        every = [_label(node) for node in self._model.graph]
        others = {label: "not now" for label in every if label not in alone}
        for piece in cut(self._model, others, self._options.ranges(), every)[0]:
            if not isinstance(piece, Piece) or not piece.native:
                continue
            with tempfile.TemporaryDirectory(prefix="graphopt-try-") as scratch:
                try:
                    options = _local(self._options, piece)
                    self._compiler.compile(piece.model, options, Path(scratch))
                except (InputError, MemoryLimitError, TimeLimitError):
                    continue
                except GraphoptError:
                    return True
        return False


def fallback_target(target: Target) -> Target:
    """What the fallback compiles for: the CPU, any CPU beside a GPU."""
    return target if target.device == "cpu" else Target.portable()


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


def notes(
    backend: Backend,
    steps: Sequence[artifact.Part | artifact.Flow],
    refused: Mapping[str, str],
    folder: Path,
) -> list[str]:
    """What runs where, of a model that was cut, and what the backend says of it: a line each."""
    left = [f"{FALLBACK} runs {label}: {why}" for label, why in refused.items()]
    flows = (flow.node for flow in artifact.flows(steps))
    steered = [f"{backend.name} runs what is in {flow}, which the host steers" for flow in flows]
    return left + steered + backend.remarks(folder)


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
