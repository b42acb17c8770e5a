"""What tests let a child process do."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from graphopt.errors import InputError, MissingError


def double(number: int) -> int:
    """Well-behaved, though a library prints."""
    print("a library says hello")
    return 2 * number


def variable(name: str) -> str:
    """A variable of the environment."""
    return os.environ[name]


def crash(number: int) -> None:
    """Die by a signal."""
    print("the last words", file=sys.stderr, flush=True)
    os.kill(os.getpid(), number)


def leave(code: int) -> None:
    """End without an answer."""
    os._exit(code)


def hang(marker: str) -> None:
    """Wait for ever, and so does a process that this one started."""
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    other = subprocess.Popen(command)
    Path(marker).write_text(str(other.pid), encoding="ascii")
    time.sleep(60)


def eat(count: int) -> int:
    """Allocate."""
    return len(bytearray(count))


def refuse(kind: str) -> None:
    """Raise errors of ours and others."""
    raise {
        "input": InputError("no such dial"),
        "missing": MissingError("no such extra"),
        "other": KeyError("an\nold key"),
        "disk": OSError(28, os.strerror(28)),
    }[kind]
