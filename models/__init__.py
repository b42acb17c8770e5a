"""Two small trained networks to try things on, and held-out samples to score them with.

``train_digits.py`` beside this file makes all of it; it also says where the data comes from.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from graphopt import errors, ir

__all__ = ["names", "path", "samples"]

_FOLDER = Path(__file__).resolve().parent


def names() -> list[str]:
    """The names of the shipped models, sorted: ``digits_cnn`` and ``digits_transformer``."""
    return sorted(file.stem for file in _FOLDER.glob("*.onnx"))


def path(name: str) -> Path:
    """The file of a shipped model. Raises InputError, which lists the names, for any other."""
    if name not in names():
        raise errors.InputError(f"no shipped model {name!r}: there are {', '.join(names())}")
    return _FOLDER / f"{name}.onnx"


def samples() -> dict[str, ir.Array]:
    """450 digits that neither model was trained on, in the form that ``--data`` takes.

    ``image``: float32 [450, 1, 8, 8] in 0..1, the input of both models; ``labels``: int64 [450],
    the digit shown.
    """
    with np.load(_FOLDER / "digits_test.npz", allow_pickle=False) as data:
        return {name: data[name] for name in data.files}
