"""Folders of this user that graphopt keeps things in: caches, and state that outlives them.

They follow the XDG base directory specification: `$XDG_CACHE_HOME/graphopt` and
`$XDG_STATE_HOME/graphopt`, by default below `~/.cache` and `~/.local/state`.
"""

from __future__ import annotations

import os
from pathlib import Path


def cache(name: str) -> Path:
    """The folder `name` for what can be made again; it need not exist yet."""
    return _base("XDG_CACHE_HOME", ".cache") / "graphopt" / name


def state(name: str) -> Path:
    """The folder `name` for what cannot: keys, logs, records of searches."""
    return _base("XDG_STATE_HOME", ".local/state") / "graphopt" / name


def _base(variable: str, default: str) -> Path:
    given = os.environ.get(variable, "")
    return Path(given) if Path(given).is_absolute() else Path("~").expanduser() / default
