"""A compiled model in a process of its own, driven from this one.

Runtimes that share a process share its thread pools, its caches and its crashes; what is compared
with something else runs apart. Parent and child exchange pickles over pipes: both are ours.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from graphopt import artifact, child, errors
from graphopt.backends import Array, OpTime, Output
from graphopt.errors import GraphoptError


class Worker:
    """An artifact folder loaded in a child process; see `graphopt.backends.Executable`.

    Args:
        folder: the artifact.
        trust: permit machine code out of it.

    Raises:
        GraphoptError: as `graphopt.load` does, or when the child crashed.
    """

    def __init__(self, folder: Path, *, trust: bool = False) -> None:
        self._folder = folder
        self._process = subprocess.Popen(
            child.command(__name__),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            self.inputs, self.outputs = self._ask("load", str(folder.absolute()), trust)
        except BaseException:
            self.close()
            raise

    @property
    def manifest(self) -> artifact.Manifest:
        """Of the folder."""
        return artifact.read(self._folder)

    @property
    def pid(self) -> int:
        """Of the child."""
        return self._process.pid

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Output]:
        """All outputs by name."""
        found: dict[str, Output] = self._ask("run", dict(feeds))
        return found

    def benchmark(self, feeds: Mapping[str, Array], runs: int) -> npt.NDArray[np.int64]:
        """Nanoseconds of each run, as the child's clock has them."""
        found: npt.NDArray[np.int64] = self._ask("benchmark", dict(feeds), runs)
        return found

    def profile(self, feeds: Mapping[str, Array], runs: int = 10) -> tuple[OpTime, ...]:
        """Time per node."""
        found: tuple[OpTime, ...] = self._ask("profile", dict(feeds), runs)
        return found

    def close(self) -> None:
        """End the child."""
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _ask(self, method: str, *arguments: Any) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            pickle.dump((method, arguments), self._process.stdin)
            self._process.stdin.flush()
            kind, value = pickle.load(self._process.stdout)
        except (OSError, EOFError, pickle.UnpicklingError):
            code = self._process.wait()
            how = f"exit code {code}" if code >= 0 else signal.Signals(-code).name
            raise GraphoptError(f"{self._folder}: running it crashed ({how})") from None
        if kind:
            raise errors.by_name(kind)(value)
        return value


def main() -> None:
    """The child's side: requests come on stdin until it is closed."""
    with os.fdopen(os.dup(1), "wb") as answers:
        os.dup2(2, 1)  # what libraries print is not for the parent
        held: list[Any] = []
        while True:
            try:
                method, arguments = pickle.load(sys.stdin.buffer)
            except EOFError:
                os._exit(0)
            answer: tuple[str, Any]
            try:
                answer = ("", _do(held, method, arguments))
            except GraphoptError as error:
                answer = (type(error).__name__, str(error))
            except Exception as error:  # noqa: BLE001 - the parent has to be told, whatever it is
                answer = ("GraphoptError", f"{type(error).__name__}: {error}"[:400])
            pickle.dump(answer, answers)
            answers.flush()


def _do(held: list[Any], method: str, arguments: tuple[Any, ...]) -> Any:
    if method == "load":
        from graphopt import compilation

        folder, trust = arguments
        held.append(compilation.load(folder, trust=trust))
        return held[0].inputs, held[0].outputs
    return getattr(held[0], method)(*arguments)
