"""What holds for the whole run: one thread, steady property tests, no import by a wrong name."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest
from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")
settings.register_profile("steady", deadline=None, derandomize=True)
settings.load_profile("steady")


@pytest.fixture(scope="session", autouse=True)
def own_folders(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Caches, logs and keys of the tests are not the user's."""
    for kind in ("cache", "state"):
        os.environ[f"XDG_{kind.upper()}_HOME"] = str(tmp_path_factory.mktemp(kind))


@pytest.fixture(scope="session", autouse=True)
def no_module_twice() -> Iterator[None]:
    """`graphopt.passes` must not also have been imported as `passes`: every class would be two."""
    yield
    leaked = {
        name for name in sys.modules if name.split(".")[0] in ("passes", "backends", "models")
    }
    assert not leaked, f"imported at top level, not below graphopt: {sorted(leaked)}"
