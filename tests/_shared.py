"""Where tests find extra models that are too large to ship: a folder beside the checkout.

The suite is complete without it: a test that asks for something that is not there is skipped.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

_ROOT = Path(__file__).resolve().parents[1]
_VARIABLE = "GRAPHOPT_SHARED"


def folder() -> Path:
    """The one named by the environment variable GRAPHOPT_SHARED, else `shared` beside the checkout.

    It need not be there.
    """
    return Path(os.environ.get(_VARIABLE) or _ROOT.parent / "shared")


def shared(name: str) -> Path:
    """The file or folder `name` (may hold slashes) of the folder of extra models.

    Skips the calling test, or the module that is being collected, where the file is absent.
    """
    path = folder() / name
    if not path.exists():
        pytest.skip(
            f"extra models not present: no {name} (see {_VARIABLE})", allow_module_level=True
        )
    return path
