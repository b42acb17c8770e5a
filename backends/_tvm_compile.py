"""The way from a Relax module to a shared library: layout, kernels, fusion, schedules, code."""

from __future__ import annotations

import dataclasses
import importlib
import json
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphopt.backends import _tvm_cuda, _tvm_link, _tvm_statements
from graphopt.backends._tvm_call import is_constant
from graphopt.backends._tvm_executable import ERRORS, LIBRARY, NOTES, OBJECTS, last_line
from graphopt.backends._tvm_import import import_model
from graphopt.backends._tvm_kernels import Kernels
from graphopt.backends._tvm_legalize import first_table, gpu_table, table
from graphopt.backends._tvm_loops import Machine
from graphopt.backends._tvm_ranges import index_ranges
from graphopt.backends._tvm_schedule import Log, schedule_all
from graphopt.backends._tvm_tiles import Registers
from graphopt.errors import GraphoptError
from graphopt.target import Target

if TYPE_CHECKING:
    from graphopt import ir
    from graphopt.backends._tvm_options import Options

tvm: Any = importlib.import_module("tvm")
relax: Any = importlib.import_module("tvm.relax")

_AGAIN = "LegalizeOps"
"""TVM's pass that would make kernels of the Reshapes that are views already."""
_VIEWS = "RewriteDataflowReshape"
"""TVM's pass that makes views of Reshapes."""


def compile_model(model: ir.Model, target: Target, options: Options, folder: Path) -> None:
    """Write a model's library and the log of its kernels into a folder.

    Raises:
        GraphoptError: a node that cannot be imported, or TVM's own failure, in one line.
    """
    module = import_model(model, options.sizes())
    threads = options.threads or 4
    aim = _tvm_link.tvm_target(target, threads)
    machine = Machine(Registers.of(target), threads)
    kernels = Kernels(machine.registers)
    search: dict[str, Any] = {}
    try:
        if options.tune:
            from graphopt.backends import _tvm_tune

            kernels, search = _tvm_tune.tune(module, aim, machine, options, target)
        if target.device == "cuda":
            _tvm_cuda.hook(target)
            lowered, log = lower_for_gpu(module, aim)
        else:
            lowered, log = lower(module, aim, machine, kernels)
        _require_loadable(lowered)
        executable = generate(lowered, aim)
        _export(executable, folder, target, options.format)
    except ERRORS as error:
        raise GraphoptError(f"tvm: {type(error).__name__}: {last_line(error)}") from error
    notes = {"ranges": index_ranges(model), "search": search, **dataclasses.asdict(log)}
    (folder / NOTES).write_text(json.dumps(notes, indent=1, sort_keys=True) + "\n", "utf-8")


def lower(module: Any, aim: Any, machine: Machine, kernels: Kernels) -> tuple[Any, Log]:
    """From operators to scheduled kernels."""
    steps = relax.transform
    with aim, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = steps.DecomposeOpsForInference()(module)
        module = _channels_last(steps.CanonicalizeBindings()(module))
        return schedule_all(_fuse(module, first_table(kernels), table(kernels)), machine)


def lower_for_gpu(module: Any, aim: Any) -> tuple[Any, Log]:
    """From operators to scheduled kernels for a GPU."""
    from graphopt.backends import _tvm_gpu

    steps, own = relax.transform, gpu_table()
    with aim, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = steps.DecomposeOpsForInference()(module)
        module = relax.backend.DispatchSortScan()(steps.CanonicalizeBindings()(module))
        return _tvm_gpu.schedule_all(_fuse(module, own, own), aim)


def _fuse(module: Any, first: dict[str, Any], second: dict[str, Any]) -> Any:
    """Operators as loops by two tables of legalizations, and those that belong together as one."""
    steps = relax.transform
    return tvm.transform.Sequential(
        [
            steps.Normalize(),
            steps.LegalizeOps(customize_legalize_map=first),
            steps.CanonicalizeBindings(),
            steps.DeadCodeElimination(),
            steps.LegalizeOps(customize_legalize_map=second),
            steps.ConvertToDataflow(),  # around If there is none, and nothing is fused
            steps.AnnotateTIROpPattern(),
            steps.FoldConstant(),
            steps.FuseOps(),
            steps.FuseTIR(),
            steps.DeadCodeElimination(),
        ]
    )(module)


def _require_loadable(module: Any) -> None:
    """Raise GraphoptError for constants without elements: libraries that have them do not load."""
    empty: list[Any] = []

    def visit(expression: Any) -> None:
        if is_constant(expression) and 0 in expression.value.shape:
            empty.append(expression)

    relax.analysis.post_order_visit(module["main"], visit)
    if empty:
        raise GraphoptError("tvm: a constant without elements, which it writes and cannot load")


def generate(lowered: Any, aim: Any) -> Any:
    """Code for scheduled kernels.

    Memory is not planned where there are branches: what one of them allocates, TVM's planner lets
    later tensors use even if the other was taken, and the process ends. A Reshape is a copy where
    TVM fails to prove what divides its free sizes.
    """
    _tvm_statements.register()
    disabled = [_AGAIN, *(["StaticPlanBlockMemory"] if _branches(lowered) else [])]

    def build() -> Any:
        with tvm.transform.PassContext(disabled_pass=disabled):
            return tvm.compile(lowered, aim, tir_pipeline=_tvm_statements.PIPELINE)

    try:
        return build()
    except ERRORS as error:
        if _VIEWS not in str(error):
            raise
    disabled.append(_VIEWS)
    return build()


def _branches(module: Any) -> bool:
    found: list[Any] = []

    def visit(expression: Any) -> None:
        if isinstance(expression, relax.If):
            found.append(expression)

    relax.analysis.post_order_visit(module["main"], visit)
    return bool(found)


def _channels_last(module: Any) -> Any:
    """The module with channels last as far as that goes; as it is where TVM cannot."""
    try:
        return relax.transform.ConvertLayout({"relax.nn.conv2d": ["NHWC", "HWIO"]})(module)
    except (
        RuntimeError,
        ValueError,
        TypeError,
        IndexError,
    ):  # some operator's inference of layouts
        return module


def _export(executable: Any, folder: Path, target: Target, form: str) -> None:
    arch = target.arch if target.device == "cpu" else "x86_64"

    def join(output: str, objects: list[str], **_: Any) -> None:
        if form == "tar":
            _tvm_link.pack(objects, output)
        else:
            _tvm_link.link(objects, output, arch)

    executable.export_library(str(folder / (OBJECTS if form == "tar" else LIBRARY)), fcompile=join)
