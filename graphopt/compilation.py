"""`compile` and `load`: from a model to an artifact folder, and from there to what runs.

Importing this module, and loading and running, needs neither onnx nor onnx-ir.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphopt import __version__, artifact, backends
from graphopt.artifact import Manifest, TensorInfo
from graphopt.errors import InputError, MissingError
from graphopt.target import Target

if TYPE_CHECKING:
    from graphopt import ir
    from graphopt.backends import Backend, Executable
    from graphopt.files import ModelLike
    from graphopt.optimization import Verify
    from graphopt.pass_manager import Pass
    from graphopt.report import Report


def compile(
    model: ModelLike,
    target: str | Target,
    out: str | os.PathLike[str],
    *,
    backend: str | None = None,
    options: Mapping[str, Any] | None = None,
    level: int = 2,
    passes: str | Path | Sequence[Pass | str] | None = None,
    verify: Verify = "end",
    overwrite: bool = False,
    report: Report | None = None,
) -> Path:
    """Compile a model into an artifact folder, which appears whole or not at all.

    Args:
        model: a path, bytes, an `onnx.ModelProto` or an `onnx_ir.Model`; it is left as it is.
        target: the device, see `Target.names`.
        out: the folder to make. An empty folder is filled; another artifact is replaced only with
            `overwrite`; anything else is never touched.
        backend: a name of `graphopt.backends.names()`; None takes the first that can.
        options: the backend's options by name, see `describe_options`; text is converted.
        level: what `graphopt.optimize` does before; 0 leaves the model as it is, apart from what
            the backend needs.
        passes: in place of a level, as for `graphopt.optimize`.
        verify: when that is compared with the original, as for `graphopt.optimize`.
        overwrite: replace an artifact that is there.
        report: filled with what was done before.

    Returns:
        The folder.

    Raises:
        InputError: a model, target, option or folder that cannot be used.
        MissingError: no backend, or not this one, compiles for the target here.
        GraphoptError: the backend refused the model; what else `graphopt.optimize` raises.
    """
    from graphopt import files

    aim = Target.parse(target)
    chosen = choose(aim, backend)
    settings = backends.make_options(chosen, options or {})
    folder = Path(out)
    with artifact.publish(folder, overwrite=overwrite) as staging:
        lowered, pipeline = files.load(model), ""
        if level or passes is not None or chosen.legalize(aim):
            lowered, pipeline = _lower(lowered, aim, chosen, level, passes, verify, report)
        chosen.compile(lowered, aim, settings, staging)
        source = Path(model) if isinstance(model, str | os.PathLike) else None
        artifact.write(
            staging,
            Manifest(
                backend=chosen.name,
                target=aim,
                inputs=tuple(_info(v) for v in lowered.graph.inputs if not v.is_initializer()),
                outputs=tuple(_info(value) for value in lowered.graph.outputs),
                options=dataclasses.asdict(settings),
                versions={"graphopt": __version__, **chosen.versions()},
                source=source.name if source else "",
                source_sha256=artifact.sha256(source) if source else "",
                pipeline=pipeline,
                files={},
            ),
        )
    return folder


def load(path: str | os.PathLike[str], *, trust: bool = False) -> Executable:
    """Load an artifact folder, after checking its files against its manifest.

    Args:
        path: what `compile` made.
        trust: permit machine code out of the folder to run, for backends whose artifacts are
            machine code. Hashes tell damage, not who made a folder.

    Raises:
        InputError: not an artifact, one that was changed, or machine code without `trust`.
        MissingError: the backend or the device is not there.
        GraphoptError: the runtime refused the files.
    """
    folder = Path(path)
    manifest = artifact.read(folder)
    backend = backends.get(manifest.backend)
    if backend.native_code and not trust:
        raise InputError(f"{folder}: loading it runs machine code out of it; trust it or do not")
    reason = backend.is_available()
    if reason is not None:
        raise MissingError(f"{folder} needs the backend {backend.name}: {reason}")
    artifact.check(folder, manifest)
    return backend.load(folder, manifest)


def choose(target: Target, name: str | None = None) -> Backend:
    """The backend of a name, or the first that can compile for a target.

    Raises:
        InputError: no backend of that name.
        MissingError: it cannot compile for the target here, with the reason.
    """
    candidates = [backends.get(n) for n in (backends.names() if name is None else (name,))]
    reasons = {backend.name: backend.can_compile(target) for backend in candidates}
    for backend in candidates:
        if reasons[backend.name] is None:
            return backend
    why = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    raise MissingError(f"nothing here compiles for {target.name}: {why}")


def _lower(
    model: ir.Model,
    target: Target,
    backend: Backend,
    level: int,
    passes: str | Path | Sequence[Pass | str] | None,
    verify: Verify,
    report: Report | None,
) -> tuple[ir.Model, str]:
    """The model after the passes asked for and the backend's own, and their pipeline text."""
    from graphopt.optimization import optimize, select
    from graphopt.report import Report

    chosen, _ = select(level, passes, (), ())
    record = Report() if report is None else report
    lowered = optimize(
        model,
        passes=[*chosen, *backend.legalize(target)],
        target=target,
        verify=verify,
        report=record,
    )
    return lowered, record.pipeline


def _info(value: ir.Value) -> TensorInfo:
    """Name, dtype and shape of an input or output as the manifest has them."""
    from graphopt import ir

    kind, shape = value.type, value.shape
    if isinstance(kind, ir.TensorType) or kind is None:
        dtype = "?" if kind is None else _dtype(kind.dtype)
    else:
        dtype = str(kind).lower()
    dims = None if shape is None else tuple(_dim(dim) for dim in shape)
    return TensorInfo(value.name or "", dtype, dims)


def _dim(dim: int | ir.SymbolicDim) -> int | str:
    return dim if isinstance(dim, int) else str(dim.value or "?")


def _dtype(dtype: ir.DataType) -> str:
    """numpy's name (`float32`), also of the dtypes that only ml_dtypes has; `string` for text."""
    from graphopt import ir

    return "string" if dtype == ir.DataType.STRING else dtype.numpy().name
