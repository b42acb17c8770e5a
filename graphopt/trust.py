"""Which artifacts this installation built itself, so that their machine code may be loaded.

A key that never leaves the user's state folder signs manifests (HMAC-SHA-256, RFC 2104), and a
manifest vouches for the files beside it by their hashes. So a folder that came from elsewhere, or
was changed, is told from one's own.
"""

from __future__ import annotations

import contextlib
import hmac
import os
from pathlib import Path

from graphopt import places
from graphopt.artifact import MANIFEST, SIGNATURE, regular_size
from graphopt.errors import InputError

_KEY_BYTES = 32
_LONGEST = 128
"""Bytes of a signature with room to spare."""


def sign(folder: Path) -> None:
    """Sign the manifest of a complete folder; without a usable key nothing is written."""
    key = _key(make=True)
    if key is not None:
        (folder / SIGNATURE).write_text(_mac(key, folder) + "\n", "ascii")


def is_own(folder: Path) -> bool:
    """Whether this installation signed the manifest of a folder as it now is."""
    key = _key(make=False)
    if key is None:
        return False
    try:
        if regular_size(folder / SIGNATURE) > _LONGEST:
            return False
        found = (folder / SIGNATURE).read_bytes().strip()
        return hmac.compare_digest(found, _mac(key, folder).encode())
    except (InputError, OSError):
        return False


def _mac(key: bytes, folder: Path) -> str:
    return hmac.digest(key, (folder / MANIFEST).read_bytes(), "sha256").hex()


def _key(*, make: bool) -> bytes | None:
    """The key of this installation, made on first use; None where it cannot be kept safely."""
    path = places.state("") / "key"
    with contextlib.suppress(OSError):
        if make and not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            new = path.with_name(f".key.{os.getpid()}")
            descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            try:
                with os.fdopen(descriptor, "wb") as file:
                    file.write(os.urandom(_KEY_BYTES))
                with contextlib.suppress(FileExistsError):
                    os.link(new, path)  # of several processes that make one, the first wins
            finally:
                new.unlink()
        status = path.stat()
        if status.st_mode & 0o077 or status.st_uid != os.getuid():
            return None  # others may have read or written it
        key = path.read_bytes()
        return key if len(key) == _KEY_BYTES else None
    return None
