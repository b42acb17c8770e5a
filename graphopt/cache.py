"""Compiled models kept by content, so that the same one is not compiled twice.

An entry is an artifact folder, signed like any other (`graphopt.trust`): one that somebody else
put there or touched is not used. The entries that were used longest ago go first.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from graphopt import artifact, places, trust
from graphopt.errors import GraphoptError

LIMIT_BYTES = 4 << 30
"""Of all entries together, unless the variable GRAPHOPT_CACHE_BYTES says otherwise."""
_ABANDONED = 3600.0
"""Seconds after which a copy that is not complete never will be."""


def key(content: Mapping[str, Any]) -> str:
    """The name of what plain data describes, together with graphopt's own code."""
    text = json.dumps([_code(), content], sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def fetch(name: str, folder: Path) -> artifact.Manifest | None:
    """Copy the files of an entry into an empty folder; None where there is no sound entry.

    One that is not sound is deleted, so that a new one can take its place.
    """
    entry = places.cache("compiled") / name
    try:
        manifest = artifact.read(entry)
        if trust.is_own(entry):
            artifact.check(entry, manifest)
            os.utime(entry)
            for file in manifest.files:
                (folder / file).parent.mkdir(exist_ok=True)
                shutil.copyfile(entry / file, folder / file)
            artifact.check(folder, manifest)
            return manifest
    except (GraphoptError, OSError):
        for path in folder.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    shutil.rmtree(entry, ignore_errors=True)
    return None


def store(name: str, folder: Path) -> None:
    """Keep a copy of a complete, signed artifact; where that cannot be, nothing is kept."""
    base = places.cache("compiled")
    with contextlib.suppress(GraphoptError, OSError):
        base.mkdir(parents=True, exist_ok=True)
        new = base / f".{name}.{os.getpid()}"
        try:
            shutil.copytree(folder, new)
            with contextlib.suppress(FileExistsError, OSError):
                new.rename(base / name)
        finally:
            shutil.rmtree(new, ignore_errors=True)
        _shrink(base, int(os.environ.get("GRAPHOPT_CACHE_BYTES") or LIMIT_BYTES))


def _shrink(base: Path, limit: int) -> None:
    """Delete the entries that were used longest ago until the rest fits, and what was left half."""
    entries = sorted(base.iterdir(), key=lambda entry: entry.stat().st_mtime, reverse=True)
    total = 0
    for entry in entries:
        if entry.name.startswith("."):  # somebody copies, or was killed meanwhile
            gone = time.time() - entry.stat().st_mtime > _ABANDONED
        else:
            total += sum(path.stat().st_size for path in entry.rglob("*"))
            gone = total > limit
        if gone:
            shutil.rmtree(entry, ignore_errors=True)


def _code() -> list[list[Any]]:
    """The state of graphopt's own files: another one may compile another way."""
    root = Path(__file__).parent
    files = sorted([*root.glob("*.py"), *root.glob("*/*.py")])
    return [[path.name, (s := path.stat()).st_size, s.st_mtime_ns] for path in files]
