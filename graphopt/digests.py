"""SHA-256 of files, remembered until a file is touched.

Hashing takes about 0.8 ms a megabyte and OpenSSL, which `hashlib` loads, 3 to 5 ms by itself:
loading an artifact would pay that each time. As git's index
does for files, a record in the user's cache holds what the system says of a file (device, inode,
size, times of its last modification and change) beside its digest. Whoever writes to the file
changes that; what was written a moment ago is not remembered, as clocks of files tick slowly.
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

from graphopt import places

_SETTLED_NS = 100_000_000
_RECORDS = 500  # kept


def sha256(path: Path) -> str:
    """SHA-256 of a file in hexadecimal, read in pieces."""
    import hashlib  # with all of OpenSSL

    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remembered(path: Path) -> str:
    """The same, from the record of a file that was not touched since."""
    status = path.stat()
    if os.name != "posix":  # there is no time of change elsewhere
        return sha256(path)
    record, now = _record(status), time.time_ns()
    known = _read(record, _state(status))
    if known:
        return known
    digest = sha256(path)
    if now - status.st_ctime_ns > _SETTLED_NS and _state(path.stat()) == _state(status):
        _write(record, f"{_state(status)} {digest}\n")
    return digest


def _record(status: os.stat_result) -> Path:
    return places.cache("digests") / f"{status.st_dev:x}-{status.st_ino:x}"


def _state(status: os.stat_result) -> str:
    return f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}"


def _read(record: Path, state: str) -> str:
    """The digest of a record, if it is this user's own and for this state of the file."""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        owner = record.lstat()
        if owner.st_uid != os.getuid() or owner.st_mode & 0o022:
            return ""
        found, _, digest = record.read_text("ascii").rstrip("\n").rpartition(" ")
        if found == state and len(digest) == 64:
            os.utime(record)
            return digest
    return ""


def _write(record: Path, text: str) -> None:
    """Keep a record, and not too many of them; where that cannot be, none is kept."""
    with contextlib.suppress(OSError):
        record.parent.mkdir(parents=True, exist_ok=True)
        beside = record.with_name(f".{record.name}.{os.getpid()}")
        descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with os.fdopen(descriptor, "w", encoding="ascii") as file:
                file.write(text)
            beside.replace(record)
        finally:
            beside.unlink(missing_ok=True)  # the disk may be full
        old = sorted(record.parent.iterdir(), key=lambda path: path.stat().st_mtime)
        for path in old[:-_RECORDS]:
            path.unlink(missing_ok=True)
