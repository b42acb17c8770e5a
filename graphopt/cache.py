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
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from graphopt import artifact, places, trust
from graphopt.errors import GraphoptError

LIMIT_BYTES = 4 << 30
"""Of all entries together, unless the variable GRAPHOPT_CACHE_BYTES says otherwise."""


def key(content: Mapping[str, Any]) -> str:
    """The name of what plain data describes, together with graphopt's own code."""
    text = json.dumps([_code(), content], sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def fetch(name: str, folder: Path) -> artifact.Manifest | None:
    """Copy the files of an entry into an empty folder; None where there is no sound entry."""
    entry = places.cache("compiled") / name
    try:
        manifest = artifact.read(entry)
        if not trust.is_own(entry):
            return None
        artifact.check(entry, manifest)
        os.utime(entry)
        for file in manifest.files:
            (folder / file).parent.mkdir(exist_ok=True)
            shutil.copyfile(entry / file, folder / file)
        artifact.check(folder, manifest)
    except (GraphoptError, OSError):
        for path in folder.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        return None
    return manifest


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
    """Delete the entries that were used longest ago until the rest fits."""
    entries = [entry for entry in base.iterdir() if not entry.name.startswith(".")]
    entries.sort(key=lambda entry: entry.stat().st_mtime, reverse=True)
    total = 0
    for entry in entries:
        total += sum(path.stat().st_size for path in entry.rglob("*"))
        if total > limit:
            shutil.rmtree(entry, ignore_errors=True)


def _code() -> list[list[Any]]:
    """The state of graphopt's own files: another one may compile another way."""
    root = Path(__file__).parent
    found = [root.glob("*.py"), (root / "backends").glob("*.py"), (root / "passes").glob("*.py")]
    files = sorted(path for group in found for path in group)
    return [[path.name, (s := path.stat()).st_size, s.st_mtime_ns] for path in files]
