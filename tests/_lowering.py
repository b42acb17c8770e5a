"""The ONNX node tests through a backend: built whole, cut, refused, crashed, or wrong.

Each case runs in a process forked from one that has the backend's libraries loaded, and the
compiler runs right in it: a child of its own for each would take a hundred times as long. What ends
such a process would be one line of the compiler's child in earnest, and is counted as a crash here.
"""

from __future__ import annotations

import dataclasses
import importlib
import multiprocessing
import os
import pkgutil
import tempfile
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from graphopt import artifact, backends, child, compilation
from graphopt.errors import GraphoptError, MissingError
from graphopt.pass_manager import load_pass, pass_names
from graphopt.target import Target
from tests._conformance import difference, run, variants

KINDS = ("built", "cut", "refused", "crashed", "failed", "wrong")
"""Whole; with nodes left to the fallback; not at all, with a reason; the process ended; something
else than an error of ours; it runs, and differs from ONNX Runtime without optimizations."""
_SECONDS = 120.0


@dataclass(frozen=True)
class Lowered:
    """What came of one case."""

    kind: str
    reason: str = ""
    """Of the first node that was not taken; what is wrong."""
    compared: bool = False
    """Its outputs agree with ONNX Runtime's."""


def preload(backend: str) -> None:
    """Import what a backend compiles with, for all the processes to come."""
    reason = backends.get(backend).is_available()
    if reason is not None:
        raise MissingError(reason)
    for name in ("onnxruntime", "graphopt.building", "graphopt.optimization"):
        importlib.import_module(name)
    for name in pass_names():
        load_pass(name)
    for module in pkgutil.iter_modules(backends.__path__):
        if module.name.startswith(f"_{backend}_"):
            importlib.import_module(f"{backends.__name__}.{module.name}")


def model_of(case: Any) -> tuple[Any, dict[str, Any]]:
    """A case's model and feeds: inputs but the first are initializers where they can be."""
    found = {variant: (model, feeds) for variant, model, feeds in variants(case)}
    return found.get("B", found["A"])


def lower(model: Any, feeds: Mapping[str, Any], backend: str, target: str) -> Lowered:
    """Compile a ModelProto, and run it where this machine can."""
    here, there = multiprocessing.Pipe(duplex=False)
    context = multiprocessing.get_context("fork")
    process = context.Process(target=_lower, args=(there, model, feeds, backend, target))
    process.start()
    there.close()
    try:
        if not here.poll(_SECONDS):
            process.kill()
            return Lowered("crashed", f"took more than {_SECONDS:g} s")
        return here.recv()
    except EOFError:
        process.join()
        return Lowered("crashed", f"exit code {process.exitcode}")
    finally:
        process.join()
        here.close()


def _lower(
    answer: Connection, model: Any, feeds: Mapping[str, Any], backend: str, target: str
) -> None:
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        answer.send(_outcome(model, feeds, backend, target))
    finally:
        answer.close()
        os._exit(0)


def _outcome(model: Any, feeds: Mapping[str, Any], backend: str, target: str) -> Lowered:
    child.call = _here  # this process is a child already
    with tempfile.TemporaryDirectory() as scratch:
        try:
            folder = compilation.compile(
                *(model, target, Path(scratch) / "a"),
                backend=backend,
                cache=False,
                verify="off",
            )
            found = artifact.read(folder)
            reason = next((f"{node}: {why}" for node, why in found.fallback.items()), "")
            made = Lowered("cut" if found.fallback else "built", reason)
            if backends.get(backend).can_run(Target.parse(target)) is not None:
                return made
            return _compared(made, folder, model, feeds)
        except GraphoptError as error:
            return Lowered("refused", str(error))
        except Exception:  # noqa: BLE001
            return Lowered("failed", traceback.format_exc())


def _compared(made: Lowered, folder: Path, model: Any, feeds: Mapping[str, Any]) -> Lowered:
    results = compilation.load(folder, trust=True).run(feeds)
    try:
        wanted = run(model, feeds)
        if difference(wanted, run(model, feeds), 0.0):
            return made
    except Exception:  # noqa: BLE001 - without an oracle nothing is compared
        return made
    problem = difference(wanted, results)
    return Lowered("wrong", problem) if problem else dataclasses.replace(made, compared=True)


def _here(function: str, arguments: Mapping[str, Any], **_: Any) -> Any:
    module, name = function.split(":")
    return getattr(importlib.import_module(module), name)(**arguments)
