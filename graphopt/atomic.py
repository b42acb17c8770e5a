"""Small files that appear whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from graphopt.errors import InputError


def write(path: Path, fill: Callable[[BinaryIO], object]) -> None:
    """Let `fill` write a file beside its place, and move it there once it is on the disk.

    Raises:
        InputError: the place is a folder, a pipe or a device, or cannot be written.
    """
    if path.exists() and not path.is_file():
        raise InputError(f"{path}: exists and is not a file")
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with beside.open("xb") as file:
            fill(file)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror})") from error
    finally:
        beside.unlink(missing_ok=True)
