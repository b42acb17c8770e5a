"""Work in a process of its own: what crashes, hangs or eats memory there is one line here.

For native compilers, and for measurements that must not share a process. The child gets its
request pickled (between two processes of ours: never a file) and answers with JSON; whatever it or
a library prints goes to a log, which is kept where it died.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from graphopt import errors, places
from graphopt.errors import GraphoptError, InputError, MemoryLimitError, TimeLimitError

SECONDS = 3600.0
"""How long a child may take unless told otherwise: no compiler is waited for without end."""
OWN_BYTES = 256 << 20
"""What Python and its libraries take before there is a model, beside a memory limit."""
_LOGS = 20  # kept
_NO_MEMORY = ("bad_alloc", "MemoryError", "out of memory", "Cannot allocate memory")
_MAIN = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from importlib import import_module
import_module(sys.argv[2]).main()
"""


def call(
    function: str,
    arguments: Mapping[str, Any],
    *,
    what: str,
    seconds: float = SECONDS,
    memory: int | None = None,
    environment: Mapping[str, str] | None = None,
) -> Any:
    """Call a function in a child process and return its result.

    Args:
        function: `package.module:name`.
        arguments: by name; anything that can be pickled.
        what: names the work in errors and in the name of the log.
        seconds: after these the child and all that it started are killed.
        memory: bytes that it may allocate, beside those of an idle process.
        environment: variables beside those of this process.

    Returns:
        The result, which has to be plain JSON data.

    Raises:
        TimeLimitError: the time was over.
        MemoryLimitError: it ran out of memory, or was killed.
        InputError: there is no place for its log.
        GraphoptError: what the function raised, as the same class; or it crashed or raised
            something else, and then the line names the log.
    """
    request = pickle.dumps((function, dict(arguments), memory, os.getpid()))
    log = _new_log(what)
    with log.open("wb") as errors_to:
        process = subprocess.Popen(
            command(__name__),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors_to,
            env={**os.environ, **(environment or {})},
            start_new_session=True,  # so that it can be killed with all that it starts
        )
    try:
        answer, _ = process.communicate(request, timeout=seconds)
    except subprocess.TimeoutExpired:
        raise TimeLimitError(
            f"{what} took more than {seconds:g} s and was stopped (log: {log})"
        ) from None
    finally:
        _kill(process)
    return _result(answer, process.returncode, what, log, memory)


def command(module: str) -> list[str]:
    """The command line that calls `main` of a module, found as this process finds its own."""
    return [sys.executable, "-c", _MAIN, json.dumps(sys.path), module]


def main() -> None:
    """The child's side of `call`."""
    function, arguments, memory, parent = pickle.loads(sys.stdin.buffer.read())
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answer:
        os.dup2(2, 1)  # what libraries print is for the log
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
        json.dump(_answer(function, arguments, memory), answer)
        answer.flush()
        # libraries may crash while they are taken apart: everything is said by now
        os._exit(0)


def _answer(function: str, arguments: dict[str, Any], memory: int | None) -> dict[str, Any]:
    """What is sent back: a result, or the class and text of an error."""
    try:
        if memory is not None:
            _limit(memory)
        module, _, name = function.partition(":")
        return {"result": getattr(importlib.import_module(module), name)(**arguments)}
    except GraphoptError as error:
        return {"error": type(error).__name__, "text": str(error)}
    except MemoryError:
        return {"memory": True}
    except Exception as error:  # noqa: BLE001 - it has to be told to the parent, whatever it is
        traceback.print_exc()
        text = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        return {"memory": True} if _is_memory(text) else {"failed": text}


def _result(answer: bytes, code: int, what: str, log: Path, memory: int | None) -> Any:
    """The result out of an answer, or the error that it tells of."""
    limit = "" if memory is None else f" with a memory limit of {memory / (1 << 20):.0f} MB"
    try:
        data: dict[str, Any] = json.loads(answer)
    except ValueError:
        data = {}
    if not data:
        if _is_memory(log.read_text("utf-8", "replace")[-10_000:]):
            raise MemoryLimitError(f"{what} ran out of memory{limit} (log: {log})")
        if -code == signal.SIGKILL:
            how = "was killed, perhaps by the system for want of memory"
            raise MemoryLimitError(f"{what} {how}{limit} (log: {log})")
        if code < 0:
            how = f"crashed with {signal.Signals(-code).name}"
            raise GraphoptError(f"{what} {how}{limit} (log: {log})")
        raise GraphoptError(f"{what} ended with exit code {code} (log: {log})")
    if "memory" in data:
        raise MemoryLimitError(f"{what} ran out of memory{limit} (log: {log})")
    if "failed" in data:
        raise GraphoptError(f"{what} failed: {data['failed']} (log: {log})")
    log.unlink(missing_ok=True)
    if "error" in data:
        raise errors.by_name(data["error"])(data["text"])
    return data["result"]


def _is_memory(text: str) -> bool:
    return any(sign in text for sign in _NO_MEMORY)


def _limit(memory: int) -> None:
    """Bound what this process may allocate."""
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    wanted = memory + OWN_BYTES
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (wanted, hard))


def _end_with(parent: int) -> None:
    """End this process once its parent is gone."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kill a child and all that it started, where anything of it still runs."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            with contextlib.suppress(OSError):
                stream.close()


def _new_log(what: str) -> Path:
    """A new file for what a child prints; the oldest ones of their kind go."""
    folder = places.state("logs")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        old = sorted(folder.glob("*.log"), key=lambda path: path.stat().st_mtime)
        for path in old[: -_LOGS + 1]:
            path.unlink(missing_ok=True)
    except OSError as error:
        where = "logs are kept there, below XDG_STATE_HOME"
        raise InputError(f"{folder}: {error.strerror}; {where}") from None
    name = "".join(c if c.isalnum() else "-" for c in what)[:40]
    return (
        folder
        / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}-{time.time_ns() % 10**6}-{name}.log"
    )
