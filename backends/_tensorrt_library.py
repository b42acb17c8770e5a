"""TensorRT's Python bindings, whichever are installed, and its one logger."""

from __future__ import annotations

import importlib
import re
from functools import cache
from typing import Any

from graphopt.errors import MissingError

HINT = "pip install 'graphopt[tensorrt]'"
_MODULES = ("tensorrt", "tensorrt_rtx", "tensorrt_rtx_bindings")
"""Full TensorRT first: it is there only where somebody put it."""


@cache
def library() -> Any:
    """The bindings (untyped). MissingError where none can be imported, with the reason."""
    reasons: list[str] = []
    for name in _MODULES:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError:
            continue
        except (ImportError, OSError, RuntimeError) as error:
            reasons.append(f"{name} is not usable ({' '.join(str(error).split())[:200]})")
    why = "; ".join(reasons) or "TensorRT is not installed"
    raise MissingError(f"{why}: {HINT}")


@cache
def log() -> Log:
    """The log of this process: TensorRT keeps the first logger that it is given for good."""
    trt = library()

    serious = (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR)

    def note(_: object, severity: Any, message: str) -> None:
        if severity in serious:
            found.errors.append(tidy(message))

    found = Log()
    found.logger = derive(trt.ILogger, log=note)
    return found


def derive(base: Any, **members: Any) -> Any:
    """An object of a class below one of the library's, which TensorRT calls back."""

    def begin(self: object) -> None:
        base.__init__(self)

    return type(base.__name__, (base,), {"__init__": begin, **members})()


class Log:
    """What TensorRT said of its errors since somebody last took them."""

    def __init__(self) -> None:
        self.errors: list[str] = []
        self.logger: Any = None

    def take(self) -> list[str]:
        """The errors so far, each once, and forget them."""
        taken = list(dict.fromkeys(self.errors))
        self.errors.clear()
        return taken


def tidy(message: str) -> str:
    """A message as one line, without the library's source positions and codes."""
    text = " ".join(message.split())
    text = re.sub(r"^(IBuilder::\w+: )?Error Code \d+: ", "", text)
    text = re.sub(r"\[\w+\.(cpp|h|hpp)::[^\]]*\]\s*", "", text)
    text = re.sub(r"In \w+\.cpp:?\w*:\d+\s*", "", text)
    return text[:400]


def architectures() -> dict[str, Any]:
    """What the library builds for by name (`sm_89`); empty where it builds for its own GPU only."""
    kinds = getattr(library(), "ComputeCapability", None)
    members: dict[str, Any] = {} if kinds is None else kinds.__members__
    return {f"sm_{name[2:]}": value for name, value in members.items() if name.startswith("SM")}
