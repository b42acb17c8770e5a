"""From a model that is ready for a backend to the files of an artifact.

What backends that write machine code made is kept (`graphopt.cache`). A model that one of them
takes only in part is cut (`graphopt.pieces`). `verify_artifact` checks what was made.
"""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from graphopt import __version__, artifact, backends, cache
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
from graphopt.pieces import Compiler, Pieces, Rules
from graphopt.target import Target

if TYPE_CHECKING:
    from graphopt import ir

_ROUNDED = 0.05
"""Of its scale, what the results of a quantized model may move: sums that lie between two steps are
rounded the other way, and a network carries that on."""


@dataclass(frozen=True)
class Built:
    """What came of building: where the model was cut, and why."""

    parts: tuple[artifact.Part | artifact.Flow, ...] = ()
    constants: str = ""
    """The file of what the parts take that is constant; empty where there is none."""
    refused: Mapping[str, str] = field(default_factory=dict[str, str])
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
    from graphopt import ir

    if not backend.native_code:
        backend.compile(model, target, options, folder)
        return Built()
    with tempfile.TemporaryDirectory(prefix="graphopt-compile-") as scratch:
        name = ""
        if rules.cache:
            name = _key(model, target, backend, options, Path(scratch), rules.fallback)
            kept = cache.fetch(name, folder)
            if kept is not None:
                return Built(kept.parts, kept.constants, kept.fallback)
        compiler = Compiler(backend, target, folder, rules)
        pieces = Pieces(model, options, compiler, Path(scratch))
        try:
            refused = compiler.compile(model, options, folder)
        except (InputError, MissingError, MemoryLimitError, TimeLimitError):
            raise
        except GraphoptError as error:
            labels = tuple(ir.label(node) for node in model.graph)
            refused = pieces.culprits(labels, str(error)) if rules.fallback else {}
            if len(refused) in (0, len(labels)):
                raise
            _clear(folder)
        if not refused:
            return Built(key=name)
        if not rules.fallback:
            raise backends.NodeError(backend.name, refused)
        pieces.cut(refused)
        outputs = {value.name or "": ir.array(value) for value in model.graph.outputs}
        constants = pieces.constants({k: a for k, a in outputs.items() if a is not None})
        return Built(pieces.steps(), constants, pieces.refused, name)


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
