"""`compile` and `load`: from a model to an artifact folder, and from there to what runs.

Importing this module, and loading and running, needs neither onnx nor onnx-ir.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphopt import __version__, artifact, backends
from graphopt.artifact import Manifest
from graphopt.digests import sha256
from graphopt.errors import InputError, MissingError, TimeLimitError, VerificationError
from graphopt.target import Target

if TYPE_CHECKING:
    from graphopt import flow, ir
    from graphopt.backends import Array, Backend, BackendOptions, Executable
    from graphopt.files import ModelLike
    from graphopt.optimization import Verify
    from graphopt.pass_manager import Pass
    from graphopt.report import Report
    from graphopt.timing import Progress


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
    fallback: bool = True,
    cache: bool = True,
    time_limit: float | None = None,
    memory_limit: int | None = None,
    tune: float = 0.0,
    feeds: Mapping[str, Array] | None = None,
    check: bool = True,
    progress: Progress | None = None,
    report: Report | None = None,
) -> Path:
    """Compile a model into an artifact folder, which appears whole or not at all.

    Args:
        model: see `graphopt.files.load`; it is left as it is.
        target: the device, see `Target.names`.
        out: the folder to make. An empty folder is filled; another artifact is replaced only with
            `overwrite`; anything else is never touched.
        backend: a name of `graphopt.backends.names()`; None takes the first that can, `auto` the
            fastest of those that are installed, measured here (`graphopt.selection`).
        options: the backend's options by name, see `describe_options`; text is converted.
        level: what `graphopt.optimize` does before; 0 leaves the model as it is, apart from what
            the backend needs.
        passes: in place of a level, as for `graphopt.optimize`.
        verify: when that is compared with the original, as for `graphopt.optimize`.
        overwrite: replace an artifact that is there.
        fallback: leave the nodes that a native backend does not take to ONNX Runtime on the CPU;
            which ones and why stands in the manifest and in the report's notes.
        cache: take what a native backend made of the same before, and keep what it makes.
        time_limit: seconds that a native compiler may take; an hour where not given.
        memory_limit: bytes that a native compiler may allocate.
        tune: minutes to look for better options, by measuring here; the winner's are in the
            manifest.
        feeds: arrays by input name to measure and to check with; random if not given.
        check: run machine code that was made, where it runs here, and compare with the model,
            unless `verify` is off; what the cache holds was checked before.
        progress: called with the fraction done and what is being done, for `auto` and `tune`.
        report: filled with what was done before.

    Returns:
        The folder.

    Raises:
        InputError: a model, target, option or folder that cannot be used.
        MissingError: no backend, or not this one, compiles for the target here.
        GraphoptError: the backend refused the model, or its compiler crashed: the line names the
            log; what else `graphopt.optimize` raises.
        TimeLimitError: the compiler was stopped.
    """
    from graphopt import building, files, pieces, trust
    from graphopt import cache as kept

    aim = Target.parse(target)
    if backend == "auto" or tune:
        from graphopt import selection
        from graphopt.passes import PIPELINES

        again = functools.partial(
            compile,
            model,
            aim,
            fallback=fallback,
            cache=cache,
            time_limit=time_limit,
            memory_limit=memory_limit,
            check=False,  # all are compared with the original there
        )
        asked: dict[str, Any] = {"level": level, "passes": passes, "verify": verify}
        standard = PIPELINES[level] if passes is None and 0 <= level < len(PIPELINES) else passes
        ways: dict[selection.Way, dict[str, Any]] = {
            "asked": asked,
            "as it is": {"level": 0, "verify": "off"},
            "standard": {**asked, "passes": standard},
        }
        best, search = selection.fastest(
            files.load(model),
            aim,
            Path(out),
            lambda place, name, some, way: again(place, backend=name, options=some, **ways[way]),
            names=None if backend in (None, "auto") else [backend],
            options=options or {},
            feeds=feeds,
            minutes=tune,
            overwrite=overwrite,
            progress=progress,
        )
        if report is not None:
            report.notes += search.notes(best)
        return Path(out)
    chosen = choose(aim, backend)
    settings = backends.make_options(chosen, options or {})
    folder, notes = Path(out), list[str]()
    with artifact.publish(folder, overwrite=overwrite) as staging:
        lowered, pipeline = files.load(model), ""
        legal = chosen.legalize(aim) if chosen.native_code or (level and passes is None) else ()
        if level or passes is not None or legal:
            lowered, pipeline = _lower(lowered, aim, legal, level, passes, verify, report)
        rules = pieces.Rules(time_limit, memory_limit, fallback, cache)
        built = building.build(lowered, aim, chosen, settings, staging, rules)
        source = Path(model) if isinstance(model, str | os.PathLike) else None
        artifact.write(
            staging,
            Manifest(
                backend=chosen.name,
                target=aim,
                inputs=tuple(
                    pieces.info(v) for v in lowered.graph.inputs if not v.is_initializer()
                ),
                outputs=tuple(pieces.info(value) for value in lowered.graph.outputs),
                options=dataclasses.asdict(settings),
                versions={"graphopt": __version__, **chosen.versions()},
                source=source.name if source else "",
                source_sha256=sha256(source) if source else "",
                pipeline=pipeline,
                files={},
                parts=built.parts,
                constants=built.constants,
                fallback=built.refused,
            ),
        )
        if chosen.native_code:
            trust.sign(staging)
            if check and verify != "off" and (built.key or not cache):
                notes += _checked(staging, lowered, chosen, aim, settings, feeds)
            if built.key:
                kept.store(built.key, staging)
    if report is not None:
        report.notes += [*pieces.notes(chosen, built.parts, built.refused, folder), *notes]
    return folder


def _checked(
    folder: Path,
    model: ir.Model,
    backend: Backend,
    target: Target,
    options: BackendOptions,
    feeds: Mapping[str, Array] | None,
) -> list[str]:
    """Compare machine code with the model; why not, where that cannot be done here.

    Raises:
        VerificationError: it computes something else.
        GraphoptError: it does not run.
    """
    from graphopt.building import verify_artifact

    reason = backend.can_run(target)
    if reason is None:
        try:
            reason = verify_artifact(folder, model, feeds, bindings=options.sizes())
        except TimeLimitError as error:
            reason = str(error)
        except VerificationError as error:
            raise VerificationError(
                f"{backend.name} computes something else than the model: {error}; "
                "--verify off takes it as it is"
            ) from None
    return [] if reason is None else [f"what was made was not compared with the model: {reason}"]


def load(path: str | os.PathLike[str], *, trust: bool = False) -> Executable:
    """Load an artifact folder, after checking its files against its manifest.

    Args:
        path: what `compile` made.
        trust: permit machine code out of the folder to run, for backends whose artifacts are
            machine code. Not needed for what this installation compiled itself; hashes tell
            damage, not who made a folder.

    Raises:
        InputError: not an artifact, one that was changed, or machine code without `trust`.
        MissingError: the backend or the device is not there.
        GraphoptError: the runtime refused the files.
    """
    folder = Path(path)
    manifest = artifact.read(folder)
    names = {manifest.backend, *(part.backend for part in artifact.compiled(manifest.parts))}
    wanted = [backends.get(name) for name in sorted(names)]
    if not trust and any(backend.native_code for backend in wanted):
        from graphopt.trust import is_own

        if not is_own(folder):
            raise InputError(
                f"{folder}: loading it runs machine code out of it, and this installation did not "
                "make it: trust it (--trust) or do not"
            )
    for backend in wanted:
        reason = backend.is_available()
        if reason is not None:
            raise MissingError(f"{folder} needs the backend {backend.name}: {reason}")
    main = backends.get(manifest.backend)
    reason = main.can_run(manifest.target)
    if reason is not None:
        raise MissingError(f"{folder} cannot run here: {reason}")
    artifact.check(folder, manifest)
    if manifest.parts:
        return _chain(folder, manifest)
    return main.load(folder, manifest)


def _chain(folder: Path, manifest: Manifest) -> Executable:
    """The pieces of a model that was cut, loaded."""
    from graphopt.chain import Chain

    names = tuple(info.name for info in manifest.inputs)
    whole = artifact.Block(names, manifest.outputs, manifest.parts, manifest.constants)
    return Chain(manifest.inputs, _block(folder, manifest, whole))


def _block(folder: Path, manifest: Manifest, block: artifact.Block) -> flow.Block:
    """A block whose steps are loaded."""
    from graphopt import flow, npz

    steps: list[flow.Step] = []
    for step in block.steps:
        if isinstance(step, artifact.Part):
            steps.append(flow.Compiled(_part(folder, manifest, step)))
            continue
        blocks = tuple(_block(folder, manifest, each) for each in step.blocks)
        names = step.inputs, step.outputs
        if step.kind == "If":
            steps.append(flow.If(*names, blocks))
        elif step.kind == "Loop":
            steps.append(flow.Loop(*names, blocks[0], step.carried))
        else:
            axes = step.scanned, step.stacked
            steps.append(flow.Scan(*names, blocks[0], step.carried, *axes))
    constants = npz.read(folder / block.constants) if block.constants else {}
    return flow.Block(block.inputs, block.outputs, tuple(steps), constants)


def _part(folder: Path, manifest: Manifest, part: artifact.Part) -> backends.Part:
    """A part, loaded as an artifact of its own."""
    from graphopt.pieces import fallback_target

    start = part.folder + "/"
    native = part.backend == manifest.backend
    own = dataclasses.replace(
        manifest,
        backend=part.backend,
        target=manifest.target if native else fallback_target(manifest.target),
        inputs=part.inputs,
        outputs=part.outputs,
        options=part.options,
        files={
            name.removeprefix(start): digest
            for name, digest in manifest.files.items()
            if name.startswith(start)
        },
        parts=(),
    )
    return backends.get(part.backend).load(folder / part.folder, own)


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
    legal: Sequence[Pass],
    level: int,
    passes: str | Path | Sequence[Pass | str] | None,
    verify: Verify,
    report: Report | None,
) -> tuple[ir.Model, str]:
    """The model after the passes asked for and the backend's own, and their pipeline text."""
    from graphopt.optimization import arranged, optimize, select
    from graphopt.report import Report

    chosen, _ = select(level, passes, (), ())
    record = Report() if report is None else report
    lowered = optimize(
        model,
        passes=arranged(chosen, legal),
        target=target,
        verify=verify,
        report=record,
    )
    return lowered, record.pipeline
