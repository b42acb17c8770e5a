"""The way from a Relax module to a shared library: layout, kernels, fusion, schedules, code."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphopt.backends import _tvm_link
from graphopt.backends._tvm_import import import_model
from graphopt.errors import GraphoptError
from graphopt.target import Target

if TYPE_CHECKING:
    from graphopt import ir
    from graphopt.backends._tvm_options import Options

tvm: Any = importlib.import_module("tvm")
relax: Any = importlib.import_module("tvm.relax")

LIBRARY = "model.so"
LOG = "kernels.json"


def compile_model(model: ir.Model, target: Target, options: Options, folder: Path) -> None:
    """Write a model's library and the log of its kernels into a folder.

    Raises:
        GraphoptError: a node that cannot be imported, or TVM's own failure, in one line.
    """
    module = import_model(model, options.sizes())
    aim = _tvm_link.tvm_target(target, options.threads)
    try:
        executable = tvm.compile(module, aim)
        _export(executable, folder / LIBRARY, target)
    except (RuntimeError, ValueError, TypeError, AttributeError, KeyError, AssertionError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise GraphoptError(f"tvm: {type(error).__name__}: {lines[-1][:300]}") from error
    (folder / LOG).write_text(json.dumps({}, indent=1) + "\n", "utf-8")


def _export(executable: Any, path: Path, target: Target) -> None:
    def join(output: str, objects: list[str], **_: Any) -> None:
        _tvm_link.link(objects, output, target.arch)

    executable.export_library(str(path), fcompile=join)
