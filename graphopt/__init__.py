"""graphopt: a compiler-style optimization toolkit on ONNX.

The names below are the public API. They are resolved on first use, so that importing graphopt
costs next to nothing.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graphopt.compilation import compile
    from graphopt.compression import compress
    from graphopt.errors import GraphoptError
    from graphopt.files import load, save
    from graphopt.ir import Model
    from graphopt.measurement import measure
    from graphopt.optimization import optimize
    from graphopt.pass_manager import PassManager
    from graphopt.pruning import prune
    from graphopt.quantization import quantize
    from graphopt.report import Report
    from graphopt.rewriting import Refuse, rewrite
    from graphopt.target import Target
    from graphopt.verification import verify

__version__ = "0.1.0"

# Recent releases of ONNX Runtime tell their makers of the models that they load, unless this is set
# before (their Privacy.md). Models are their owners' affair; 0 in the environment permits it.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

__all__ = [
    "GraphoptError",
    "Model",
    "PassManager",
    "Refuse",
    "Report",
    "Target",
    "compile",
    "compress",
    "load",
    "measure",
    "optimize",
    "prune",
    "quantize",
    "rewrite",
    "save",
    "verify",
]

_HOMES = {
    "GraphoptError": "errors",
    "Model": "ir",
    "PassManager": "pass_manager",
    "Refuse": "rewriting",
    "Report": "report",
    "Target": "target",
    "compile": "compilation",
    "compress": "compression",
    "load": "files",
    "measure": "measurement",
    "optimize": "optimization",
    "prune": "pruning",
    "quantize": "quantization",
    "rewrite": "rewriting",
    "save": "files",
    "verify": "verification",
}


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'graphopt' has no attribute {name!r}")
    return getattr(importlib.import_module(f"graphopt.{home}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
