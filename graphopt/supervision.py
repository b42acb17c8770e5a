"""The command in a process of its own: a crash of native code is one line and leaves nothing.

ONNX Runtime and the like run models inside the process that asks them to. What ends such a process
ends the command without a word, so that here a parent waits for it, which does no work itself: it
passes signals on, tells of a crash, and removes the temporary folder.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

_ENDED = {"SIGINT": "interrupted", "SIGTERM": "terminated", "SIGHUP": "terminated"}
_PASSED_ON = {number for number in signal.Signals if number.name in {*_ENDED, "SIGQUIT"}}


def supervised(command: Callable[[], object]) -> None:
    """Call a command, in a child process where the system has what that takes (Linux).

    The child's exit code becomes this process's; a signal that ends it is told on stderr, with
    exit code 4 for a crash. Call it before anything starts a thread.

    Raises:
        SystemExit: always, with a child.
    """
    if not hasattr(signal, "sigwaitinfo"):
        command()
        return
    # blocked ones wait until they are asked for: none is lost between the fork and the loop
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {*_PASSED_ON, signal.SIGCHLD})
    folder, parent = _temporary(), os.getpid()
    child = os.fork()
    if child == 0:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
        if os.environ.get("GRAPHOPT_TRACEBACK"):
            import faulthandler

            faulthandler.enable()
        command()
        sys.exit()
    status = _wait(child)
    if folder is not None:
        _remove(folder)
    sys.exit(_told(status))


def _temporary() -> Path | None:
    """A new folder in which the child and its children put theirs; None where none can be made.

    What `tempfile` does, without the time that importing it takes.
    """
    folder = Path(os.environ.get("TMPDIR", "/tmp")) / f"graphopt-{os.getpid()}-{time.time_ns():x}"
    try:
        folder.mkdir(0o700)
    except OSError:
        return None
    os.environ["TMPDIR"] = str(folder)
    return folder


def _end_with(parent: int) -> None:
    """End this process, as a signal does, once its parent is gone."""
    while os.getppid() == parent:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)


def _wait(child: int) -> int:
    """Pass signals on until the child has ended. Its exit code, negative for a signal."""
    while True:
        told = signal.sigwaitinfo({*_PASSED_ON, signal.SIGCHLD})
        if told.si_signo == signal.SIGCHLD:
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                return os.waitstatus_to_exitcode(status)
        elif told.si_pid:  # what a terminal sends, in nobody's name, the child has got itself
            os.kill(child, told.si_signo)


def _remove(folder: Path) -> None:
    try:
        folder.rmdir()
    except OSError:
        import shutil

        shutil.rmtree(folder, ignore_errors=True)


def _told(code: int) -> int:
    """The exit code of a command, after a line about the signal that ended it."""
    if code >= 0:
        return code
    name = signal.Signals(-code).name
    if name == "SIGKILL":
        text = "killed, perhaps by the system for want of memory; see --memory-limit"
    else:
        text = _ENDED.get(name) or (
            f"native code crashed with {name}, most likely ONNX Runtime on this model "
            "(GRAPHOPT_TRACEBACK=1 shows where)"
        )
    with contextlib.suppress(OSError):
        sys.stderr.write(f"graphopt: {text}\n")
    return 128 - code if name in _ENDED else 4
