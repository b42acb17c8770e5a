"""The options of the TVM backend, apart from it so that what it stands on can name them."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

from graphopt.backends import BackendOptions
from graphopt.errors import InputError

_DIMS = re.compile(r"\w[\w.:/-]*=[1-9]\d*(,\w[\w.:/-]*=[1-9]\d*)*")


@dataclass(frozen=True)
class Options(BackendOptions):
    """How a model is compiled and run. Zero threads is one per core of the machine it runs on."""

    threads: int = 0
    """Threads that share the work of one kernel."""
    dims: str = ""
    """Sizes of free dimensions, `batch=1,seq=128`: kernels for them alone, and faster ones."""
    tune: int = 0
    """Minutes to search for better kernels, here; what is found is never slower than the rules'."""
    format: Literal["so", "tar"] = "so"
    """A library, or the objects of one, which the machine that runs it links."""
    log: str = ""
    """A file that the search's measurements are added to, and read from when it goes on."""

    def __post_init__(self) -> None:
        if self.threads < 0 or self.tune < 0:
            raise InputError("threads and tune are 0 or more")
        if self.dims and not _DIMS.fullmatch(self.dims):
            raise InputError(f"dims is like batch=1,seq=128, not {self.dims!r}")

    def sizes(self) -> dict[str, int]:
        """`dims` as a dictionary."""
        pairs = (item.partition("=") for item in self.dims.split(",") if item)
        return {name: int(size) for name, _, size in pairs}

    def for_fallback(self) -> dict[str, Any]:
        """As many threads."""
        return {"threads": self.threads}

    def for_piece(self, ranges: str, dims: Collection[str]) -> Self:
        """`dims` of those that the part has."""
        kept = [item for item in self.dims.split(",") if item.partition("=")[0] in dims]
        return replace(self, dims=",".join(kept))
